//! A session: what its training runs and samplers share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tinker_http::{Client, ErrorKind, PROTOCOL_VERSION};
use tinker_types::{
    ClientConfig, CreateSessionRequest, CreateSessionTag, FinishReason, FinishSessionRequest,
    ProjectId, SessionId, UserMetadata,
};
use tokio::runtime::Handle;

use crate::dispatch::Dispatch;
use crate::error::{Error, Result};
use crate::heartbeat::{Heartbeat, INTERVAL};
use crate::ledger::Ledger;
use crate::submissions::Submissions;

/// What a session is called and filed under.
#[derive(Debug, Clone)]
pub(crate) struct SessionOptions {
    pub(crate) heartbeat_interval: Duration,
    pub(crate) tags: Vec<String>,
    pub(crate) user_metadata: UserMetadata,
    pub(crate) project_id: Option<ProjectId>,
    pub(crate) display_name: Option<String>,
    /// Where steps are noted.
    pub(crate) ledger: Option<Arc<Ledger>>,
    /// What the program's training runs have under way.
    pub(crate) submissions: Submissions,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            heartbeat_interval: INTERVAL,
            tags: Vec::new(),
            user_metadata: UserMetadata::new(),
            project_id: None,
            display_name: None,
            ledger: None,
            submissions: Submissions::default(),
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
    pub(crate) ledger: Option<Arc<Ledger>>,
    pub(crate) submissions: Submissions,
    heartbeat: Heartbeat,
    n_models: AtomicU64,
    n_samplers: AtomicU64,
    n_losses: AtomicU64,
    is_finished: AtomicBool,
}

impl Session {
    pub(crate) async fn open(http: Client, options: SessionOptions) -> Result<Self> {
        let runtime = Handle::try_current()
            .map_err(|_| Error::InvalidRequest("the clients need a tokio runtime".into()))?;
        let interval = options.heartbeat_interval;
        let ledger = options.ledger.clone();
        let submissions = options.submissions.clone();
        let config = http.config().await?.clone();
        let id = match to_go_on_with(&http, ledger.as_deref()).await? {
            Some(id) => id,
            None => {
                let id = create(&http, options).await?;
                if let Some(ledger) = &ledger {
                    ledger.note_session(&id).await?;
                }
                id
            }
        };
        http.note_session(id.as_str());
        Ok(Self {
            ledger,
            submissions,
            ..Self::around(runtime, http, config, id, interval)
        })
    }

    /// A session that another process opened; this one keeps it alive, too.
    pub(crate) async fn join(http: Client, id: SessionId, interval: Duration) -> Result<Self> {
        let runtime = Handle::try_current()
            .map_err(|_| Error::InvalidRequest("the clients need a tokio runtime".into()))?;
        let config = http.config().await?.clone();
        Ok(Self::around(runtime, http, config, id, interval))
    }

    fn around(
        runtime: Handle,
        http: Client,
        config: ClientConfig,
        id: SessionId,
        interval: Duration,
    ) -> Self {
        Self {
            heartbeat: Heartbeat::start(&runtime, http.clone(), id.clone(), interval),
            id,
            http,
            runtime,
            dispatch: Dispatch::new(&config),
            ledger: None,
            submissions: Submissions::default(),
            config,
            n_models: AtomicU64::new(0),
            n_samplers: AtomicU64::new(0),
            n_losses: AtomicU64::new(0),
            is_finished: AtomicBool::new(false),
        }
    }

    /// The number of the next training run.
    pub(crate) fn next_model(&self) -> u64 {
        self.n_models.fetch_add(1, Ordering::Relaxed)
    }

    /// The number of the next sampler.
    pub(crate) fn next_sampler(&self) -> u64 {
        self.n_samplers.fetch_add(1, Ordering::Relaxed)
    }

    /// The number of the next uploaded loss.
    pub(crate) fn next_loss(&self) -> u64 {
        self.n_losses.fetch_add(1, Ordering::Relaxed)
    }

    /// Fails once the session was ended here.
    pub(crate) fn check_open(&self) -> Result<()> {
        match self.is_finished.load(Ordering::Relaxed) {
            true => Err(Error::Closed),
            false => Ok(()),
        }
    }

    /// Ends the session; only the first call does.
    pub(crate) async fn finish(&self, reason: FinishReason, detail: Option<String>) -> Result<()> {
        if self.is_finished.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        self.heartbeat.stop();
        self.http.drain_reports().await;
        let request = FinishSessionRequest { reason, detail };
        Ok(self.http.finish_session(&self.id, &request).await?)
    }
}

/// The session of the ledger, unless the server ended it before it had a training run.
async fn to_go_on_with(http: &Client, ledger: Option<&Ledger>) -> Result<Option<SessionId>> {
    let Some((ledger, id)) = ledger.and_then(|ledger| Some((ledger, ledger.take_session()?)))
    else {
        return Ok(None);
    };
    if ledger.has_runs(&id) {
        return Ok(Some(id));
    }
    match http.session_heartbeat(&id).await {
        Err(error) if matches!(error.kind(), ErrorKind::Expired | ErrorKind::NotFound) => Ok(None),
        _ => Ok(Some(id)),
    }
}

async fn create(http: &Client, options: SessionOptions) -> Result<SessionId> {
    let request = CreateSessionRequest {
        tags: options.tags,
        user_metadata: options.user_metadata,
        sdk_version: PROTOCOL_VERSION.to_owned(),
        project_id: options.project_id,
        display_name: options.display_name,
        tag: CreateSessionTag,
    };
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
    Ok(id)
}
