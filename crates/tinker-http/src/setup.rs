//! The start-up sequence: settings with the raw key, a token if the server wants one, and the
//! settings that may change.

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tinker_types::{
    AUTH_TOKEN, CLIENT_CONFIG, ClientConfig, ClientConfigRequest, DYNAMIC_CONFIG, DynamicConfig,
    TokenResponse,
};

use crate::auth::Token;
use crate::builder::PROTOCOL_VERSION;
use crate::call::Call;
use crate::client::Client;
use crate::error::{ErrorKind, Result};
use crate::limits::ByteGate;
use crate::machine::RetryPolicy;
use crate::pools::TrafficClass;

/// Time for a refresh of the dynamic settings.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for the refresh of a token that is still valid.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed refresh of a token that is still valid.
const TOKEN_PAUSE: Duration = Duration::from_secs(60);

/// What the server said at the start, and the budgets that follow from it.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) config: ClientConfig,
    dynamic: Mutex<Dynamic>,
    /// Large results being fetched.
    pub(crate) result_bytes: ByteGate,
    /// Forward-backward bodies being sent.
    pub(crate) train_bytes: ByteGate,
    /// Whether the server has refused a pass in protobuf.
    pub(crate) takes_json_only: AtomicBool,
}

#[derive(Debug, Clone)]
struct Dynamic {
    config: DynamicConfig,
    fetched_at: Duration,
}

/// The token in use; the lock is held while a new one is fetched.
#[derive(Debug, Default)]
pub(crate) struct TokenCell(tokio::sync::Mutex<Option<Token>>);

impl Client {
    /// The server's settings for clients; fetched by the first call.
    ///
    /// Endpoint: `POST /api/v1/client/config`.
    ///
    /// # Errors
    /// If the server cannot be reached in time or refuses the key.
    pub async fn config(&self) -> Result<&ClientConfig> {
        Ok(&self.setup().await?.config)
    }

    pub(crate) async fn setup(&self) -> Result<&Setup> {
        // Boxed: start-up makes calls itself.
        let start = || Box::pin(self.start_up());
        self.inner().setup.get_or_try_init(start).await
    }

    async fn start_up(&self) -> Result<Setup> {
        let request = ClientConfigRequest {
            sdk_version: PROTOCOL_VERSION.to_owned(),
        };
        let call = Call::post(self, TrafficClass::Session, CLIENT_CONFIG, &request)?.with_raw_key();
        let config: ClientConfig = self.send(call).await?.json()?;
        let dynamic = self.fetch_dynamic_config(&config).await;
        Ok(Setup {
            result_bytes: ByteGate::new(config.inflight_response_bytes_semaphore_size),
            train_bytes: ByteGate::new(config.fwdbwd_dispatch_bytes_semaphore_size),
            takes_json_only: AtomicBool::new(false),
            dynamic: Mutex::new(Dynamic {
                config: dynamic.unwrap_or_default(),
                fetched_at: self.now(),
            }),
            config,
        })
    }

    /// The settings that may change, as last fetched.
    ///
    /// # Errors
    /// If start-up fails.
    pub async fn dynamic_config(&self) -> Result<DynamicConfig> {
        let setup = self.setup().await?;
        Ok(setup.dynamic().config.clone())
    }

    /// Fetches the settings that may change if they are old; failures leave them as they are.
    ///
    /// Endpoint: `POST /api/v1/client/dynamic_config`.
    pub async fn refresh_dynamic_config(&self) {
        let Ok(setup) = self.setup().await else {
            return;
        };
        let last = setup.dynamic().clone();
        let interval = Duration::from_secs(last.config.refresh_interval_sec.max(10));
        if self.now() < last.fetched_at + interval {
            return;
        }
        let fetched = self.fetch_dynamic_config(&setup.config).await;
        let mut dynamic = setup.dynamic();
        dynamic.fetched_at = self.now();
        if let Some(config) = fetched {
            dynamic.config = config;
        }
    }

    /// One attempt; servers without the endpoint mean the defaults.
    async fn fetch_dynamic_config(&self, config: &ClientConfig) -> Option<DynamicConfig> {
        let request = ClientConfigRequest {
            sdk_version: PROTOCOL_VERSION.to_owned(),
        };
        let call = Call::post(self, TrafficClass::Session, DYNAMIC_CONFIG, &request)
            .ok()?
            .retry(RetryPolicy::never())
            .timeout(REFRESH_TIMEOUT);
        match self.send_configured(call, config).await {
            Ok(answer) => answer.json().ok(),
            Err(error) if matches!(error.status(), Some(404 | 405)) => {
                Some(DynamicConfig::default())
            }
            Err(error) => {
                tracing::warn!(%error, "dynamic settings were not fetched");
                None
            }
        }
    }

    /// A token that is good for the next request; a new one if `refused` is the one in use.
    ///
    /// While the token in use is valid, a failing refresh delays one call a minute, briefly.
    pub(crate) async fn token(&self, refused: Option<&str>) -> Result<String> {
        let mut slot = self.inner().token.0.lock().await;
        let now = self.now();
        let in_use = slot
            .as_mut()
            .filter(|token| token.is_valid(now) && refused != Some(token.as_str()));
        let Some(token) = in_use else {
            let text = self.exchange_key(self.exchange_call()?).await?;
            *slot = Some(Token::received(text.clone(), self.now()));
            return Ok(text);
        };
        if !token.is_due(now) {
            return Ok(token.as_str().to_owned());
        }
        let call = self.exchange_call()?;
        let call = call.retry(RetryPolicy::never()).timeout(TOKEN_TIMEOUT);
        match self.exchange_key(call).await {
            Ok(text) => *token = Token::received(text, self.now()),
            // A refusal is final.
            Err(error) if *error.kind() == ErrorKind::Unauthenticated => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "the token was not refreshed; the old one is used");
                token.replace_at(self.now() + TOKEN_PAUSE);
            }
        }
        Ok(token.as_str().to_owned())
    }

    /// The credential itself, not what it is exchanged for.
    pub(crate) async fn credential(&self) -> Result<String> {
        Ok(self.inner().key.expose().to_owned())
    }

    fn exchange_call(&self) -> Result<Call> {
        let empty = serde_json::Map::new();
        Ok(Call::post(self, TrafficClass::Session, AUTH_TOKEN, &empty)?.with_raw_key())
    }

    async fn exchange_key(&self, call: Call) -> Result<String> {
        let answer = Box::pin(self.send(call)).await?;
        Ok(answer.json::<TokenResponse>()?.jwt)
    }
}

impl Setup {
    fn dynamic(&self) -> std::sync::MutexGuard<'_, Dynamic> {
        self.dynamic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
