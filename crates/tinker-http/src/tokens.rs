//! The token that a credential is exchanged for: fetched once, kept fresh beside the calls, and
//! replaced when a server refuses it.

use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tinker_types::{AUTH_TOKEN, TokenResponse};
use tokio::task::AbortHandle;

use crate::auth::Token;
use crate::call::Call;
use crate::client::{Client, Inner};
use crate::clock::Clock;
use crate::credentials::CredentialOrigin;
use crate::error::{ErrorKind, Result};
use crate::machine::RetryPolicy;
use crate::pools::TrafficClass;

/// Time for the refresh of a token that is still valid.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed refresh of a token that is still valid.
const TOKEN_PAUSE: Duration = Duration::from_secs(60);

/// The token in use.
#[derive(Debug, Default)]
pub(crate) struct TokenCell {
    token: Mutex<Option<Token>>,
    /// Held over an exchange, so that one serves all who wait for it; those with connections of their
    /// own wait for credential commands only.
    turn: tokio::sync::Mutex<()>,
    keeper: Mutex<Option<AbortHandle>>,
}

impl TokenCell {
    fn token(&self) -> MutexGuard<'_, Option<Token>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token, if `accept` has nothing against it.
    fn get(&self, accept: impl Fn(&Token) -> bool) -> Option<String> {
        let token = self.token();
        let token = token.as_ref().filter(|token| accept(token))?;
        Some(token.as_str().to_owned())
    }

    fn keeper(&self) -> MutexGuard<'_, Option<AbortHandle>> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for TokenCell {
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper().take() {
            keeper.abort();
        }
    }
}

impl Client {
    /// A token for the next request; another one than `refused`.
    ///
    /// A token in its last minute is replaced first. If that fails and it is still valid, it serves,
    /// and the next attempt comes a minute later; unless the credential itself was refused.
    ///
    /// With connections of its own, as of a runtime apart, it makes a short exchange, even beside
    /// one that another runtime has under way, and leaves no task behind. Only where a command prints
    /// the credential it waits: one that works once for each credential must not run twice at once.
    pub(crate) async fn token(
        &self,
        refused: Option<&str>,
        apart: Option<&reqwest::Client>,
    ) -> Result<String> {
        let is_apart = apart.is_some();
        let cell = &self.inner().token;
        let is_other = |token: &Token| refused != Some(token.as_str());
        let serves = || cell.get(|token| is_other(token) && !token.is_urgent(self.now()));
        if let Some(text) = serves() {
            return Ok(text);
        }
        let runs_command = *self.credential_origin() == CredentialOrigin::Command;
        let _turn = match is_apart && !runs_command {
            true => None,
            false => Some(cell.turn.lock().await),
        };
        if let Some(text) = serves() {
            return Ok(text);
        }
        let fallback = cell.get(|token| is_other(token) && token.is_valid(self.now()));
        let briefly = is_apart || fallback.is_some();
        let exchanged = self.exchange_credential(briefly, apart.cloned()).await;
        match (exchanged, fallback) {
            (Ok(text), _) => {
                if !is_apart {
                    self.keep_fresh();
                }
                Ok(text)
            }
            (Err(error), Some(text)) if *error.kind() != ErrorKind::Unauthenticated => {
                tracing::warn!(%error, "the token was not refreshed; the old one is used");
                let until = self.now() + TOKEN_PAUSE;
                if let Some(token) = &mut *cell.token() {
                    token.tolerate_until(until);
                }
                Ok(text)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Exchanges the credential and keeps the token: in one short attempt if `briefly`, over
    /// connections of its own if it is given some.
    async fn exchange_credential(
        &self,
        briefly: bool,
        apart: Option<reqwest::Client>,
    ) -> Result<String> {
        let empty = serde_json::Map::new();
        let call = Call::post(self, TrafficClass::Session, AUTH_TOKEN, &empty)?;
        let mut call = call.with_raw_key().apart(apart);
        if briefly {
            call = call.retry(RetryPolicy::never()).timeout(TOKEN_TIMEOUT);
        }
        let answer = Box::pin(self.send(call)).await?;
        let text = answer.json::<TokenResponse>()?.jwt;
        let token = Token::received(text.clone(), self.now(), Clock::draw());
        *self.inner().token.token() = Some(token);
        Ok(text)
    }

    /// Starts the task that replaces the token half way through its life, unless it runs.
    fn keep_fresh(&self) {
        let mut keeper = self.inner().token.keeper();
        if keeper.as_ref().is_none_or(AbortHandle::is_finished) {
            let task = tokio::spawn(keep(self.downgrade()));
            *keeper = Some(task.abort_handle());
        }
    }

    /// One round of the keeper: the time until the next, or none if it should end.
    async fn refresh_token(&self) -> Option<Duration> {
        let cell = &self.inner().token;
        let now = self.now();
        let due = cell.token().as_ref()?.refresh_at();
        if due > now {
            return Some(due - now);
        }
        let _turn = cell.turn.lock().await;
        match self.exchange_credential(true, None).await {
            Ok(_) => Some(Duration::ZERO),
            Err(error) => {
                tracing::warn!(%error, "the token was not refreshed; it is tried again in a minute");
                let mut token = cell.token();
                let token = token.as_mut()?;
                // Near its end, calls replace the token themselves and report why they cannot.
                let next = self.now() + TOKEN_PAUSE;
                let is_refused = *error.kind() == ErrorKind::Unauthenticated;
                if is_refused && token.is_urgent(next) {
                    return None;
                }
                token.refresh_again_at(next);
                Some(TOKEN_PAUSE)
            }
        }
    }
}

/// Keeps the token of a client fresh while there is one.
async fn keep(client: Weak<Inner>) {
    while let Some(client) = client.upgrade().map(Client::from_inner) {
        let clock = client.inner().clock;
        let Some(wait) = client.refresh_token().await else {
            return;
        };
        drop(client);
        clock.sleep(wait).await;
    }
}
