//! The start-up sequence: settings with the raw key, a token if the server wants one, and the
//! settings that may change.

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

/// What the server said at the start, and the budgets that follow from it.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) config: ClientConfig,
    dynamic: Mutex<Dynamic>,
    /// Large results being fetched.
    pub(crate) result_bytes: ByteGate,
    /// Forward-backward bodies being sent.
    pub(crate) train_bytes: ByteGate,
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
            Err(error) if *error.kind() == ErrorKind::NotFound => Some(DynamicConfig::default()),
            Err(error) => {
                tracing::warn!(%error, "dynamic settings were not fetched");
                None
            }
        }
    }

    /// A token that is good for the next request; a new one if `refused` is the one in use.
    pub(crate) async fn token(&self, refused: Option<&str>) -> Result<String> {
        let mut slot = self.inner().token.0.lock().await;
        let now = self.now();
        if let Some(token) = &*slot
            && !token.is_due(now)
            && refused != Some(token.as_str())
        {
            return Ok(token.as_str().to_owned());
        }
        match (self.exchange_key().await, &*slot) {
            (Ok(text), _) => {
                *slot = Some(Token::received(text.clone(), self.now()));
                Ok(text)
            }
            // A refusal is final; otherwise the token in use serves as long as it lives.
            (Err(error), Some(token))
                if *error.kind() != ErrorKind::Unauthenticated
                    && refused.is_none()
                    && token.is_valid(now) =>
            {
                tracing::warn!(%error, "the token was not refreshed; the old one is used");
                Ok(token.as_str().to_owned())
            }
            (Err(error), _) => Err(error),
        }
    }

    async fn exchange_key(&self) -> Result<String> {
        let empty = serde_json::Map::new();
        let call = Call::post(self, TrafficClass::Session, AUTH_TOKEN, &empty)?.with_raw_key();
        let answer = Box::pin(self.send(call)).await?;
        Ok(answer.json::<TokenResponse>()?.jwt)
    }
}

impl Setup {
    fn dynamic(&self) -> std::sync::MutexGuard<'_, Dynamic> {
        self.dynamic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
