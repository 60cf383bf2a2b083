//! The entry: where the server is, who asks, and what to create there.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tinker_http::{
    ApiKey, BaseUrl, Client, ClientBuilder, Credentials, Event, InFlight, PollPolicy, RequestType,
    RetryPolicy, Timeouts,
};
use tinker_types::{
    CheckpointKind, CreateModelRequest, CreateModelTag, FinishReason, LoadWeightsRequest,
    LoadWeightsTag, ProjectId, ServerCapabilities, SessionId, TinkerPath, TrainingRunId,
    UserMetadata,
};
use tokio::sync::OnceCell;

use crate::admin_client::AdminClient;
use crate::console;
use crate::error::{Error, Result};
use crate::ledger::Ledger;
use crate::options::{CopyOptions, SamplingSource, StateOptions, TrainingOptions};
use crate::resolve::resolve;
use crate::rest_client::RestClient;
use crate::sampler_handle::SamplerHandle;
use crate::sampling_client::SamplingClient;
use crate::session::{Session, SessionOptions};
use crate::submissions::Submissions;
use crate::training_client::TrainingClient;

/// Creates training and sampling clients. Cheap to clone; clones share one session.
///
/// Sends nothing until it is first used. The session is kept alive while this client, or one that
/// it created, exists.
#[derive(Debug, Clone)]
pub struct ServiceClient {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    http: Client,
    options: SessionOptions,
    session: OnceCell<Arc<Session>>,
}

/// Settings of a [`ServiceClient`]. Setters cannot fail; [`build`](Self::build) can.
#[derive(Debug, Clone)]
pub struct ServiceClientBuilder {
    http: ClientBuilder,
    options: SessionOptions,
    ledger: Option<PathBuf>,
}

impl ServiceClientBuilder {
    /// The key to authenticate with. This, or [`credentials`](Self::credentials), is required.
    #[must_use]
    pub fn api_key(mut self, key: ApiKey) -> Self {
        self.http = self.http.api_key(key);
        self
    }

    /// What to authenticate with, where it need not be a key that is known yet: a command that
    /// prints one, a file of stored keys.
    #[must_use]
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.http = self.http.credentials(credentials);
        self
    }

    /// The project to file the session under.
    #[must_use]
    pub fn project(mut self, project: ProjectId) -> Self {
        self.options.project_id = Some(project);
        self
    }

    /// The session's name for people.
    #[must_use]
    pub fn display_name(mut self, name: impl Into<String>) -> Self {
        self.options.display_name = Some(name.into());
        self
    }

    /// Annotations of the session.
    #[must_use]
    pub fn user_metadata(mut self, metadata: UserMetadata) -> Self {
        self.options.user_metadata = metadata;
        self
    }

    /// Labels of the session; duplicates are dropped.
    #[must_use]
    pub fn tags(mut self, tags: impl IntoIterator<Item = String>) -> Self {
        self.options.tags = tags.into_iter().collect();
        self.options.tags.sort_unstable();
        self.options.tags.dedup();
        self
    }

    /// The program's name and version, for `User-Agent`.
    #[must_use]
    pub fn user_agent(mut self, product: impl Into<String>) -> Self {
        self.http = self.http.user_agent(product);
        self
    }

    /// A header to send with every request, such as an access gateway's.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.http = self.http.header(name, value);
        self
    }

    /// A proxy for every request, instead of the system's.
    #[must_use]
    pub fn proxy(mut self, address: impl Into<String>) -> Self {
        self.http = self.http.proxy(address);
        self
    }

    /// How long a server that cannot be reached is waited for, such as one that restarts.
    #[must_use]
    pub fn wait_for_server(mut self, time: Duration) -> Self {
        self.http = self.http.wait_for_server(time);
        self
    }

    /// Time between two heartbeats of the session. Default 10 s; sessions expire without them.
    #[must_use]
    pub const fn heartbeat_interval(mut self, interval: Duration) -> Self {
        self.options.heartbeat_interval = interval;
        self
    }

    /// How calls are repeated.
    #[must_use]
    pub fn retry_policy(mut self, policy: RetryPolicy) -> Self {
        self.http = self.http.retry_policy(policy);
        self
    }

    /// How results are waited for.
    #[must_use]
    pub fn poll_policy(mut self, policy: PollPolicy) -> Self {
        self.http = self.http.poll_policy(policy);
        self
    }

    /// How long each traffic class waits for an answer.
    #[must_use]
    pub fn timeouts(mut self, timeouts: Timeouts) -> Self {
        self.http = self.http.timeouts(timeouts);
        self
    }

    /// Is told what is waited for: a lost server and its return, queue states, retries. Called from
    /// the clients' tasks, so it must not block.
    #[must_use]
    pub fn observer(mut self, observer: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        self.http = self.http.observer(observer);
        self
    }

    /// Notes every training operation in the file at `path` before it is sent, and its answer
    /// afterwards: the step ledger of one run of a program.
    ///
    /// A program that was killed and is started again with the same ledger makes the same calls
    /// again, in the same order and with the same data. It goes on with the same session and
    /// training runs; operations whose answers are known are not sent, the others are sent with the
    /// number and the bytes that they had, so that each is applied once. Samples are numbered by the
    /// order of their calls and are not in the ledger: in the same order they are drawn again alike, in
    /// another the server refuses them. One process uses a ledger
    /// at a time. A noted operation costs one write that is synced to the disk; those that wait
    /// share one.
    #[must_use]
    pub fn ledger(mut self, path: impl Into<PathBuf>) -> Self {
        self.ledger = Some(path.into());
        self
    }

    /// Agrees to reports to the service about what fails, without data or secrets. Default no.
    #[must_use]
    pub fn telemetry(mut self, agreed: bool) -> Self {
        self.http = self.http.telemetry(agreed);
        self
    }

    /// Writes down all that is said to the server, without secrets; see
    /// [`cassette`](crate::cassette).
    #[must_use]
    pub fn record(mut self, recorder: tinker_http::Recorder) -> Self {
        self.http = self.http.record(recorder);
        self
    }

    /// Checks the settings and takes the ledger, if there is one. Sends nothing.
    ///
    /// # Errors
    /// If the base URL, the key, a header or the proxy is malformed, or the key is missing;
    /// [`Error::Ledger`] if the ledger is damaged or in use.
    pub fn build(mut self) -> Result<ServiceClient> {
        let http = self.http.build()?;
        if let Some(path) = self.ledger {
            self.options.ledger = Some(Arc::new(Ledger::open(&path)?));
        }
        // Clones of a builder make clients that do not wait for each other.
        self.options.submissions = Submissions::default();
        Ok(ServiceClient {
            shared: Arc::new(Shared {
                http,
                options: self.options,
                session: OnceCell::new(),
            }),
        })
    }
}

impl ServiceClient {
    /// A builder for the server at `base_url`, such as `http://127.0.0.1:8000`.
    #[must_use]
    pub fn builder(base_url: impl Into<String>) -> ServiceClientBuilder {
        ServiceClientBuilder {
            http: Client::builder(base_url),
            options: SessionOptions::default(),
            ledger: None,
        }
    }

    /// Lists the base models on offer. Needs no session.
    ///
    /// Endpoint: `GET /api/v1/get_server_capabilities`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_server_capabilities(&self) -> Result<ServerCapabilities> {
        Ok(self.shared.http.get_server_capabilities().await?)
    }

    /// Asks once, without repetition, whether the credential is accepted and the account is set up.
    /// Needs no session.
    ///
    /// Endpoint: `GET /api/v1/get_server_capabilities`.
    ///
    /// # Errors
    /// Of kind `Unauthenticated` if the credential is refused, `BillingPaused` if billing is
    /// missing, `Connect` if the server cannot be reached.
    pub async fn check_accessible(&self) -> Result<()> {
        Ok(self.shared.http.check_accessible().await?)
    }

    /// Creates a training run with a fresh adapter.
    ///
    /// Endpoints: `POST /api/v1/create_model`, `POST /api/v1/get_info`.
    ///
    /// # Errors
    /// If the rank is 0, nothing would be trained, or the server knows no such base model.
    pub async fn create_lora_training_client(
        &self,
        base_model: impl Into<String>,
        options: impl Into<TrainingOptions>,
    ) -> Result<TrainingClient> {
        let options: TrainingOptions = options.into();
        options.check()?;
        let session = self.session().await?;
        let request = CreateModelRequest {
            session_id: session.id.clone(),
            model_seq_id: session.next_model(),
            base_model: base_model.into(),
            user_metadata: options.user_metadata,
            lora_config: Some(options.lora),
            optimizer_config: options.optimizer,
            tag: CreateModelTag,
        };
        let summary = summary_of(&request);
        let create = async {
            let started = session.http.now();
            let future = session.http.create_model(&request).await?;
            let took = session.http.now().saturating_sub(started);
            let id = &future.request_id;
            let resolved = session.http.retrieve_create_model(id, Some(took)).await?;
            Ok(resolve(RequestType::CreateModel, id, resolved)?.model_id)
        };
        let number = request.model_seq_id;
        open_created(
            &session,
            create_once(&session, number, &request, summary, Box::pin(create)),
        )
        .await
    }

    /// Creates a training run from a training checkpoint, with a new optimizer.
    ///
    /// Endpoints: `POST /api/v1/load_weights`, `POST /api/v1/get_info`.
    ///
    /// # Errors
    /// If the path is not of a training checkpoint, or the server cannot load it.
    pub async fn create_training_client_from_state(
        &self,
        path: &TinkerPath,
        options: StateOptions,
    ) -> Result<TrainingClient> {
        self.load(path, options, false).await
    }

    /// Creates a training run from a training checkpoint, optimizer state included: it continues as
    /// if it had never stopped.
    ///
    /// Endpoints: `POST /api/v1/load_weights`, `POST /api/v1/get_info`.
    ///
    /// # Errors
    /// If the path is not of a training checkpoint, or the server cannot load it.
    pub async fn create_training_client_from_state_with_optimizer(
        &self,
        path: &TinkerPath,
        options: StateOptions,
    ) -> Result<TrainingClient> {
        self.load(path, options, true).await
    }

    async fn load(
        &self,
        path: &TinkerPath,
        options: StateOptions,
        with_optimizer: bool,
    ) -> Result<TrainingClient> {
        Error::check_kind(path, CheckpointKind::Training)?;
        let session = self.session().await?;
        let model_seq_id = session.next_model();
        let request = LoadWeightsRequest {
            session_id: Some(session.id.clone()),
            model_seq_id: Some(model_seq_id),
            model_id: None,
            seq_id: None,
            base_model: options.base_model,
            user_metadata: options.user_metadata,
            optimizer_config: if with_optimizer {
                None
            } else {
                options.optimizer
            },
            path: path.clone(),
            optimizer: with_optimizer,
            weights_access_token: options.weights_access_token,
            tag: LoadWeightsTag,
        };
        let summary = format!("one that continues {path}");
        let load = async {
            let started = session.http.now();
            let future = session.http.load_weights(&request).await?;
            let took = session.http.now().saturating_sub(started);
            let id = &future.request_id;
            let resolved = session.http.retrieve_load_weights(id, Some(took)).await?;
            let loaded = resolve(RequestType::LoadWeights, id, resolved)?;
            // Servers need not say: the rule is shared.
            let model_id = loaded.model_id;
            Ok(model_id.unwrap_or_else(|| TrainingRunId::of_session(&session.id, model_seq_id)))
        };
        open_created(
            &session,
            create_once(&session, model_seq_id, &request, summary, Box::pin(load)),
        )
        .await
    }

    /// Creates a sampler of a base model or of a sampler checkpoint.
    ///
    /// Endpoints: `POST /api/v1/create_sampling_session`, `GET /api/v1/samplers/{id}`.
    ///
    /// # Errors
    /// If the path is not of a sampler checkpoint (the error names its twin), or the server knows
    /// no such model or checkpoint.
    pub async fn create_sampling_client(
        &self,
        source: impl Into<SamplingSource>,
    ) -> Result<SamplingClient> {
        SamplingClient::create(self.session().await?, source.into()).await
    }

    /// A client of the same service, with the same connections and settings, that will open a session
    /// of its own.
    #[must_use]
    pub fn with_new_session(&self) -> Self {
        Self {
            shared: Arc::new(Shared {
                http: self.shared.http.clone(),
                options: self.shared.options.clone(),
                session: OnceCell::new(),
            }),
        }
    }

    /// What the training runs of this client have under way to the server.
    pub(crate) fn submissions(&self) -> &Submissions {
        &self.shared.options.submissions
    }

    /// A client as of [`with_new_session`](Self::with_new_session) that notes its steps in the ledger
    /// at `path`; see [`ServiceClientBuilder::ledger`].
    ///
    /// # Errors
    /// [`Error::Ledger`] if the ledger is damaged or in use.
    pub fn with_ledger(&self, path: impl AsRef<Path>) -> Result<Self> {
        let ledger = Some(Arc::new(Ledger::open(path.as_ref())?));
        Ok(Self {
            shared: Arc::new(Shared {
                http: self.shared.http.clone(),
                options: SessionOptions {
                    ledger,
                    ..self.shared.options.clone()
                },
                session: OnceCell::new(),
            }),
        })
    }

    /// Asks whether the server has the model of a run.
    pub(crate) async fn describe(&self, run: &TrainingRunId) -> Result<()> {
        self.shared.http.get_info(run).await?;
        Ok(())
    }

    pub(crate) async fn sleep(&self, time: Duration) {
        self.shared.http.sleep(time).await;
    }

    /// Opens the sampler of a handle that another process made with
    /// [`SamplingClient::get_sampler_handle`], or the official client with its own.
    ///
    /// The new client has numbers of its own for its samples, keeps the sampler's session alive
    /// beside the process that opened it, and uses this client's credentials and settings.
    ///
    /// Endpoint: `POST /api/v1/join_sampling_session`, where servers want it.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if the sampler is on another server; or if the call fails.
    pub async fn create_sampling_client_from_handle(
        &self,
        handle: &SamplerHandle,
    ) -> Result<SamplingClient> {
        let http = &self.shared.http;
        handle.check_server(&http.base_url().to_string())?;
        let interval = self.shared.options.heartbeat_interval;
        let session = Session::join(http.clone(), handle.session_id.clone(), interval).await?;
        SamplingClient::join(Arc::new(session), handle).await
    }

    /// What this client and those it created have under way, oldest first: calls being sent and
    /// results awaited, with age, state, retries and bytes. Samples that still wait to be submitted
    /// are not in it.
    #[must_use]
    pub fn in_flight(&self) -> Vec<InFlight> {
        self.shared.http.in_flight()
    }

    /// Goes on at `base_url` with everything that is under way: the server, with its state and its
    /// key, has another port now.
    pub fn move_to(&self, base_url: BaseUrl) {
        self.shared.http.move_to(base_url);
    }

    /// Looks at runs, checkpoints and sessions. Needs no session.
    #[must_use]
    pub fn rest_client(&self) -> RestClient {
        RestClient::new(self.shared.http.clone())
    }

    /// Looks at an organization's audit log, usage and storage. Needs no session.
    #[must_use]
    pub fn admin_client(&self) -> AdminClient {
        AdminClient::new(self.shared.http.clone())
    }

    /// Copies a checkpoint into this client's project; returns the copy's path. Needs no session.
    ///
    /// Endpoint: `POST /api/v1/copy_weights`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if this client has no project or the time to live is out of range,
    /// and if the call fails.
    pub async fn copy_weights(
        &self,
        path: &TinkerPath,
        options: CopyOptions,
    ) -> Result<TinkerPath> {
        let Some(project) = &self.shared.options.project_id else {
            return Err(Error::InvalidRequest(
                "no project to copy to: name one when the client is built, or copy with RestClient"
                    .into(),
            ));
        };
        self.rest_client()
            .copy_weights(path, project, options)
            .await
    }

    /// The page of this client's session in the hosted service's console, or of all sessions while
    /// it has none. Sends nothing.
    #[must_use]
    pub fn get_console_url(&self) -> String {
        match self.shared.session.get() {
            Some(session) => console::session_url(&session.id),
            None => console::sessions_url(),
        }
    }

    /// The session, opened if need be.
    ///
    /// Endpoint: `POST /api/v1/create_session`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn session_id(&self) -> Result<SessionId> {
        Ok(self.session().await?.id.clone())
    }

    /// Ends the session, if there is one, and its heartbeat: one attempt of 3 s, so that a lost
    /// server holds nobody up; it ends the session itself when heartbeats cease. Further calls do
    /// nothing.
    ///
    /// Endpoint: `POST /api/v1/sessions/{id}/finish`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn close(&self, reason: FinishReason, detail: Option<String>) -> Result<()> {
        match self.shared.session.get() {
            Some(session) => session.finish(reason, detail).await,
            None => Ok(()),
        }
    }

    pub(crate) async fn session(&self) -> Result<Arc<Session>> {
        let shared = &self.shared;
        let open = || async {
            let session = Session::open(shared.http.clone(), shared.options.clone()).await?;
            Ok::<_, Error>(Arc::new(session))
        };
        let session = shared.session.get_or_try_init(open).await?;
        session.check_open()?;
        Ok(Arc::clone(session))
    }
}

/// The client of a run that `created` brings.
async fn open_created(
    session: &Arc<Session>,
    created: impl Future<Output = Result<TrainingRunId>>,
) -> Result<TrainingClient> {
    let opened = match created.await {
        Ok(run) => TrainingClient::open(Arc::clone(session), run).await,
        Err(error) => Err(error),
    };
    opened.inspect_err(|error| error.report(&session.http))
}

/// Creates a training run, unless the ledger has it.
async fn create_once(
    session: &Session,
    number: u64,
    request: &impl Serialize,
    summary: String,
    create: impl Future<Output = Result<TrainingRunId>>,
) -> Result<TrainingRunId> {
    let Some(ledger) = &session.ledger else {
        return create.await;
    };
    let bytes = serde_json::to_vec(request)
        .map_err(|error| Error::InvalidRequest(format!("the request has no JSON form: {error}")))?;
    if let Some(run) = ledger.create(&session.id, number, &bytes, summary).await? {
        return Ok(run);
    }
    let run = create.await?;
    ledger.note_created(&session.id, number, &run).await?;
    Ok(run)
}

/// A training run in a few words, for people who mix two ledgers up.
fn summary_of(request: &CreateModelRequest) -> String {
    let lora = request.lora_config.clone().unwrap_or_default();
    let seed = lora.seed.map_or("no".to_owned(), |seed| seed.to_string());
    format!(
        "a new adapter of {} (rank {}, seed {seed})",
        request.base_model, lora.rank
    )
}
