//! The start-up sequence: settings with the raw key, and then, with a token if the server wants one,
//! the settings that may change.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tinker_types::{
    CLIENT_CONFIG, ClientConfig, ClientConfigRequest, DYNAMIC_CONFIG, DynamicConfig,
};

use crate::builder::PROTOCOL_VERSION;
use crate::call::Call;
use crate::client::Client;
use crate::clock::Clock;
use crate::credentials::CredentialOrigin;
use crate::error::Result;
use crate::limits::ByteGate;
use crate::machine::RetryPolicy;
use crate::pools::TrafficClass;

/// Time for a refresh of the dynamic settings.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(10);

/// The setting of a server that takes nothing but what a credential command prints.
const COMMAND: &str = "credential_cmd";

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

#[derive(Debug)]
struct Dynamic {
    config: DynamicConfig,
    /// When they were last asked for.
    fetched_at: Duration,
}

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
        let insists = config.pjwt_auth_enabled && config.credential_default_source == COMMAND;
        let inner = self.inner();
        inner.insists_on_command.store(insists, Ordering::Relaxed);
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
        if !setup.dynamic().is_due(self.now()) {
            return;
        }
        if let Some(config) = self.fetch_dynamic_config(&setup.config).await {
            setup.dynamic().config = config;
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

    /// How long billing refusals are waited out: as long as was chosen, else as the server says.
    pub(crate) fn billing_pause(&self, chosen: Duration) -> Duration {
        match self.inner().setup.get() {
            Some(setup) if chosen == RetryPolicy::default().billing_pause => {
                Duration::from_secs(setup.config.billing_exception_max_pause_duration_sec)
            }
            _ => chosen,
        }
    }

    /// The credential itself, not what it is exchanged for.
    pub(crate) async fn credential(&self) -> Result<String> {
        let inner = self.inner();
        let insists = inner.insists_on_command.load(Ordering::Relaxed);
        // A command may use up what it works only once with: it never runs twice at once.
        let _turn = match inner.credentials.origin(insists) {
            CredentialOrigin::Command => Some(inner.command_turn.lock().await),
            _ => None,
        };
        inner.credentials.current(insists, Clock::wall()).await
    }

    /// Where it comes from.
    pub(crate) fn credential_origin(&self) -> &CredentialOrigin {
        let inner = self.inner();
        let insists = inner.insists_on_command.load(Ordering::Relaxed);
        inner.credentials.origin(insists)
    }
}

impl Dynamic {
    /// Whether they are to be fetched now; who is told so fetches them, and nobody else meanwhile.
    fn is_due(&mut self, now: Duration) -> bool {
        let interval = Duration::from_secs(self.config.refresh_interval_sec.max(10));
        let is_due = now >= self.fetched_at.saturating_add(interval);
        if is_due {
            self.fetched_at = now;
        }
        is_due
    }
}

impl Setup {
    fn dynamic(&self) -> std::sync::MutexGuard<'_, Dynamic> {
        self.dynamic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
