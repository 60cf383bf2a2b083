//! A session: what its training runs and samplers share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tinker_http::{Client, PROTOCOL_VERSION};
use tinker_types::{
    ClientConfig, CreateSessionRequest, CreateSessionTag, FinishReason, FinishSessionRequest,
    ProjectId, SessionId, UserMetadata,
};
use tokio::runtime::Handle;

use crate::dispatch::Dispatch;
use crate::error::{Error, Result};
use crate::heartbeat::{Heartbeat, INTERVAL};

/// What a session is called and filed under.
#[derive(Debug, Clone)]
pub(crate) struct SessionOptions {
    pub(crate) heartbeat_interval: Duration,
    pub(crate) tags: Vec<String>,
    pub(crate) user_metadata: UserMetadata,
    pub(crate) project_id: Option<ProjectId>,
    pub(crate) display_name: Option<String>,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            heartbeat_interval: INTERVAL,
            tags: Vec::new(),
            user_metadata: UserMetadata::new(),
            project_id: None,
            display_name: None,
        }
    }
}

/// An open session. Its heartbeat ends with the last client that uses it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) http: Client,
    pub(crate) runtime: Handle,
    pub(crate) config: ClientConfig,
    pub(crate) dispatch: Dispatch,
    heartbeat: Heartbeat,
    n_models: AtomicU64,
    n_samplers: AtomicU64,
    is_finished: AtomicBool,
}

impl Session {
    pub(crate) async fn open(http: Client, options: SessionOptions) -> Result<Self> {
        let runtime = Handle::try_current()
            .map_err(|_| Error::InvalidRequest("the clients need a tokio runtime".into()))?;
        let interval = options.heartbeat_interval;
        let request = CreateSessionRequest {
            tags: options.tags,
            user_metadata: options.user_metadata,
            sdk_version: PROTOCOL_VERSION.to_owned(),
            project_id: options.project_id,
            display_name: options.display_name,
            tag: CreateSessionTag,
        };
        let config = http.config().await?.clone();
        let answer = http.create_session(&request).await?;
        let id = answer.session_id;
        if let Some(message) = answer.info_message {
            tracing::info!(session.id = %id, "server: {message}");
        }
        if let Some(message) = answer.warning_message {
            tracing::warn!(session.id = %id, "server: {message}");
        }
        if let Some(message) = answer.error_message {
            tracing::error!(session.id = %id, "server: {message}");
        }
        Ok(Self {
            heartbeat: Heartbeat::start(&runtime, http.clone(), id.clone(), interval),
            id,
            http,
            runtime,
            dispatch: Dispatch::new(&config),
            config,
            n_models: AtomicU64::new(0),
            n_samplers: AtomicU64::new(0),
            is_finished: AtomicBool::new(false),
        })
    }

    /// The number of the next training run.
    pub(crate) fn next_model(&self) -> u64 {
        self.n_models.fetch_add(1, Ordering::Relaxed)
    }

    /// The number of the next sampler.
    pub(crate) fn next_sampler(&self) -> u64 {
        self.n_samplers.fetch_add(1, Ordering::Relaxed)
    }

    /// Ends the session; only the first call does.
    pub(crate) async fn finish(&self, reason: FinishReason, detail: Option<String>) -> Result<()> {
        if self.is_finished.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        self.heartbeat.stop();
        let request = FinishSessionRequest { reason, detail };
        Ok(self.http.finish_session(&self.id, &request).await?)
    }
}
