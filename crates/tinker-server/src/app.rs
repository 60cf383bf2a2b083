//! The state of the HTTP layer, and the way of a request into the log and to the engine.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use tinker_engine::{CpuOptions, Family, Precision, Quantization};
use tinker_types::{
    ClientConfig, CreateModelRequest, LoadWeightsRequest, LoraConfig, OptimizerConfig, RequestId,
    SampleRequest, SessionId, TrainingRunId, TypeError, UntypedFuture, UserMetadata,
};
use tokio::sync::Notify;

use crate::api_error::{ApiError, ApiResult};
use crate::caller;
use crate::catalog::Run;
use crate::clock::{Clock, now};
use crate::core::{Core, CoreOptions, lock};
use crate::device::{Device, Loader};
use crate::disk::{Disk, OsDisk};
use crate::engine::{Command, EngineThread, check_optimizer, family};
use crate::error::Result;
use crate::inference::Tokenizers;
use crate::journal::Accepted;
use crate::keys::KeyLimits;
use crate::limits::Limits;
use crate::memory::Memory;
use crate::models::ModelRegistry;
use crate::operation::{OpKind, run_request_id, sample_request_id};
use crate::options::default_client_config;
use crate::summary::Observer;
use crate::token::ApiToken;

/// What an [`App`] is made of; tests put a failing disk or another backend in.
#[derive(Clone)]
pub struct AppOptions {
    /// Data directory.
    pub home: PathBuf,
    /// Token to ask for, beside the keys of the data directory.
    pub token: ApiToken,
    /// Model directories on offer beside the embedded model.
    pub models: Vec<PathBuf>,
    /// More of them, by the names under which they are on offer; see [`crate::check_model_name`].
    pub named_models: BTreeMap<String, PathBuf>,
    /// Threads of the engine; 0 takes one per core.
    pub threads: usize,
    /// Settings handed to clients.
    pub client_config: ClientConfig,
    /// Version to report.
    pub version: String,
    /// Bounds on requests and queues.
    pub limits: Limits,
    /// What sessions and idle things are measured with.
    pub clock: Clock,
    /// Where everything is written.
    pub disk: Arc<dyn Disk>,
    /// How `load` holds the weights of base models; `None` as in their files.
    pub weights: Option<Quantization>,
    /// What `load` computes with.
    pub precision: Precision,
    /// What computes.
    pub device: Device,
    /// How base models are loaded onto it.
    pub loader: Loader,
    /// Where those go that it does not take.
    pub second_loader: Option<Loader>,
    /// How much there is.
    pub memory: Memory,
}

impl std::fmt::Debug for AppOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AppOptions")
            .field("home", &self.home)
            .finish_non_exhaustive()
    }
}

impl AppOptions {
    /// The CPU engine on the real disk with default limits.
    #[must_use]
    pub fn new(home: PathBuf, token: ApiToken) -> Self {
        Self {
            home,
            token,
            models: Vec::new(),
            named_models: BTreeMap::new(),
            threads: 0,
            client_config: default_client_config(),
            version: env!("CARGO_PKG_VERSION").into(),
            limits: Limits::default(),
            clock: Clock::default(),
            disk: Arc::new(OsDisk),
            weights: None,
            precision: Precision::default(),
            device: Device::Cpu,
            loader: Loader::cpu(CpuOptions::default()),
            second_loader: None,
            memory: Memory::of_machine(),
        }
    }
}

/// Everything a handler needs.
#[derive(Debug)]
pub struct App {
    pub(crate) core: Arc<Core>,
    engine: Mutex<EngineThread>,
    /// Held while a training run is entered: of two requests for one number, the run is that of
    /// the one which is accepted.
    pub(crate) entering: Mutex<()>,
    token: ApiToken,
    client_config: ClientConfig,
    pub(crate) tokenizers: Tokenizers,
    born: Instant,
    last_request_ms: AtomicU64,
    /// Wakes those who wait for results when the server stops.
    stop: Notify,
    stopping: AtomicBool,
}

impl App {
    /// Opens a data directory and starts the engine. Nothing else may have it open.
    ///
    /// # Errors
    /// If the directory cannot be read or written.
    pub fn open(options: AppOptions) -> Result<Self> {
        let (engine, inbox) = mpsc::channel();
        let core = Core::open(
            CoreOptions {
                models: ModelRegistry::new(options.home.clone(), &options.models)?
                    .with_names(&options.named_models)?
                    .held_as(options.weights, options.precision),
                home: options.home,
                disk: options.disk,
                limits: options.limits,
                clock: options.clock,
                device: options.device,
                loader: options.loader,
                second_loader: options.second_loader,
                memory: options.memory,
                threads: options.threads,
                version: options.version,
            },
            engine,
        )?;
        let engine = EngineThread::start(Arc::clone(&core), inbox)?;
        Ok(Self {
            core,
            engine: Mutex::new(engine),
            entering: Mutex::default(),
            token: options.token,
            client_config: options.client_config,
            tokenizers: Tokenizers::default(),
            born: Instant::now(),
            last_request_ms: AtomicU64::new(0),
            stop: Notify::new(),
            stopping: AtomicBool::new(false),
        })
    }

    pub(crate) const fn token(&self) -> &ApiToken {
        &self.token
    }

    pub(crate) const fn client_config(&self) -> &ClientConfig {
        &self.client_config
    }

    /// Notes that somebody is there.
    pub(crate) fn touch(&self) {
        let now = self.born.elapsed().as_millis() as u64;
        self.last_request_ms.fetch_max(now, Ordering::Relaxed);
    }

    /// Time since the last request or work.
    pub(crate) fn idle_for(&self) -> Duration {
        if lock(&self.engine).is_working() {
            self.touch();
        }
        let last = Duration::from_millis(self.last_request_ms.load(Ordering::Relaxed));
        self.born.elapsed().saturating_sub(last)
    }

    /// Looks at the server from outside.
    #[must_use]
    pub fn observer(self: &Arc<Self>) -> Observer {
        Observer(Arc::clone(self))
    }

    /// Why the server cannot do its work, if it cannot.
    pub(crate) fn check_health(&self) -> ApiResult<()> {
        self.check_open()?;
        if lock(&self.engine).is_alive() {
            Ok(())
        } else {
            Err(ApiError::unavailable(
                "the engine has ended: start the server again",
            ))
        }
    }

    /// Refuses new work and sends those who wait for results away to ask again.
    pub(crate) fn begin_stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.stop.notify_waiters();
    }

    /// Does at once what the engine does every half minute: ends waits, frees memory, removes what is
    /// old. Returns when it is done.
    pub fn tidy_up(&self) {
        let (done, is_done) = mpsc::channel();
        self.core.send(Command::Sweep(done));
        // An engine that has ended does nothing any more.
        let _ = is_done.recv();
    }

    /// Finishes the running operation, saves snapshots and flushes everything.
    ///
    /// # Errors
    /// If the last flush fails; the log has everything that was acknowledged.
    pub fn stop(&self) -> Result<()> {
        self.begin_stop();
        lock(&self.engine).stop();
        self.core.flush()
    }

    pub(crate) const fn stop_signal(&self) -> &Notify {
        &self.stop
    }

    /// How long to hold those who wait for results: not at all once the server stops.
    pub(crate) fn poll_hold(&self) -> Duration {
        if self.stopping.load(Ordering::Relaxed) {
            Duration::ZERO
        } else {
            self.core.limits.poll_hold
        }
    }

    pub(crate) fn check_open(&self) -> ApiResult<()> {
        if self.stopping.load(Ordering::Relaxed) {
            Err(ApiError::stopping())
        } else {
            Ok(())
        }
    }

    // Into the log

    /// Accepts an operation of a training run.
    pub(crate) fn submit(
        &self,
        run: &TrainingRunId,
        seq: u64,
        kind: OpKind,
        body: &[u8],
    ) -> ApiResult<UntypedFuture> {
        self.check_open()?;
        let id = run_request_id(run, seq).map_err(malformed)?;
        let journal = self.core.journal(run)?;
        self.core.catalog.touch_run(run);
        let session = self.core.catalog.run(run)?.session_id;
        // It may take a look at the disk, for which nobody else is to wait.
        let room = self.check_room(kind, body);
        let mut journal = lock(&journal);
        if !kind.creates_run() && journal.is_empty() {
            return Err(ApiError::bad_request(format!(
                "training run {run} holds copied checkpoints and cannot be trained: load_weights makes a run of one"
            )));
        }
        self.check_load(body.len(), || journal.must_take(&id, seq))?;
        if !journal.knows(&id, seq) {
            self.take_up(&session)?;
            room?;
        }
        let limit = self.core.limits.max_pending_operations;
        match journal.accept(&id, kind, seq, body, limit)? {
            Accepted::Known => {}
            Accepted::New => {
                let numbered = (seq, id.clone());
                self.core.send_operation(run, numbered, kind, body.len());
            }
            Accepted::Conflict(known) => {
                return Err(ApiError::unprocessable(format!(
                    "operation {seq} of training run {run} was accepted as another {} (request {id}): a number stands for one request",
                    name_of(known)
                )));
            }
            Accepted::TooFar(next) => {
                return Err(ApiError::bad_request(format!(
                    "operation {seq} of training run {run} is too far from the next one, which is {next}: operations are numbered without gaps"
                )));
            }
            Accepted::Full(n) => {
                return Err(ApiError::busy(format!(
                    "training run {run} has {n} unfinished operations: wait for some of them"
                )));
            }
        }
        Ok(UntypedFuture {
            request_id: id,
            model_id: Some(run.clone()),
            sample_sequence_ids: None,
        })
    }

    /// Refuses an operation that there is no room to log. It may be sent again, but for a creation,
    /// which nothing waits for; a save has a result that says so, since its log entry is small.
    fn check_room(&self, kind: OpKind, body: &[u8]) -> ApiResult<()> {
        if kind.saves() {
            return Ok(());
        }
        let what = format!("the {} request", name_of(kind));
        let checked = self.core.quota.check(body.len() as u64, &what);
        checked.map_err(|error| match kind.creates_run() {
            true => ApiError::bad_request(error.to_string()),
            false => error.into(),
        })
    }

    /// Refuses what a key queues beyond its limits, unless it must be taken all the same.
    fn check_load(&self, n_bytes: usize, must_take: impl FnOnce() -> bool) -> ApiResult<()> {
        match self.core.over_limit(n_bytes) {
            Some(why) if !must_take() => Err(ApiError::busy(why)),
            _ => Ok(()),
        }
    }

    /// Refuses a session beyond the limit of its key.
    pub(crate) fn check_sessions(&self) -> ApiResult<()> {
        self.check_open_things(|limits, (n_sessions, _)| {
            (n_sessions, 1, limits.sessions, "open sessions")
        })
    }

    /// Refuses a training run beyond the limit of its key.
    fn check_adapters(&self) -> ApiResult<()> {
        self.check_open_things(|limits, (_, n_runs)| {
            (n_runs, 1, limits.adapters, "training runs in open sessions")
        })
    }

    /// Notes that there is work in a session. One that was ended or silent is open again by it, with its
    /// training runs: it is refused if these are more than the limits of the key leave room for.
    pub(crate) fn take_up(&self, session: &SessionId) -> ApiResult<()> {
        let catalog = &self.core.catalog;
        if let Some(n_more) = catalog.n_closed(session)? {
            self.check_sessions()?;
            self.check_open_things(|limits, (_, n_runs)| {
                // Those of one session are not too many alone.
                let (most, n_more) = (limits.adapters, n_more.min(limits.adapters));
                let what = "training runs in open sessions beside those of this one";
                (n_runs, n_more, most, what)
            })?;
        }
        Ok(catalog.work_in(session)?)
    }

    /// Refuses to open more than a key may: how many there are, how many are added, the limit, and what.
    fn check_open_things(
        &self,
        measure: impl FnOnce(&KeyLimits, (usize, usize)) -> (usize, usize, usize, &'static str),
    ) -> ApiResult<()> {
        let Some((key, limits)) = caller::current().and_then(|c| Some((c.key?, c.limits))) else {
            return Ok(());
        };
        let (n, n_more, most, what) = measure(&limits, self.core.catalog.n_open(&key));
        if n.saturating_add(n_more) <= most {
            return Ok(());
        }
        Err(ApiError::busy(format!(
            "API key {key} has {n} {what}, and its limit is {most}: end a session, or wait until those that are silent close"
        )))
    }

    /// Accepts an operation whose number is part of the request, which starts at 1.
    pub(crate) fn submit_numbered(
        &self,
        run: &TrainingRunId,
        seq: u64,
        kind: OpKind,
        body: &[u8],
    ) -> ApiResult<UntypedFuture> {
        if seq == 0 {
            return Err(ApiError::bad_request(format!(
                "seq_id of an operation of training run {run} is missing or 0: operations are numbered from 1"
            )));
        }
        self.submit(run, seq, kind, body)
    }

    /// Accepts the creation of a training run.
    pub(crate) fn create_model(
        &self,
        request: &CreateModelRequest,
        body: &[u8],
    ) -> ApiResult<UntypedFuture> {
        self.check_open()?;
        optimizer_family(&request.optimizer_config)?;
        let model = self.core.models.resolve(&request.base_model)?;
        let lora = request.lora_config.clone().unwrap_or_default();
        if lora.rank == 0 {
            return Err(ApiError::bad_request("lora_config.rank must be at least 1"));
        }
        if !(lora.train_attn || lora.train_mlp || lora.train_unembed) {
            return Err(ApiError::bad_request(
                "lora_config trains nothing: set train_attn, train_mlp or train_unembed",
            ));
        }
        let key = (&request.session_id, request.model_seq_id);
        let _entering = lock(&self.entering);
        let run = self.new_run(key, |id| {
            let optimizer = request.optimizer_config.clone();
            new_row(
                id,
                model.name,
                lora,
                request.user_metadata.clone(),
                optimizer,
            )
        })?;
        self.submit(&run, 0, OpKind::CreateModel, body)
    }

    /// Accepts the creation of a training run from a checkpoint.
    pub(crate) fn create_from_weights(
        &self,
        key: (&SessionId, u64),
        request: &LoadWeightsRequest,
        body: &[u8],
    ) -> ApiResult<UntypedFuture> {
        self.check_open()?;
        let run = TrainingRunId::of_session(key.0, key.1);
        let _entering = lock(&self.entering);
        // A repeated request is answered even if its checkpoint is gone by now.
        if !self.is_created(&run)? {
            if let Some(config) = &request.optimizer_config {
                optimizer_family(config)?;
            }
            let kind = tinker_types::CheckpointKind::Training;
            let checkpoint = self.core.catalog.checkpoint(&request.path, kind)?;
            check_optimizer(request)?;
            let asked = request
                .base_model
                .as_ref()
                .filter(|b| **b != checkpoint.base_model);
            if let Some(asked) = asked {
                return Err(ApiError::bad_request(format!(
                    "{} was trained on {}, not on {asked}",
                    request.path, checkpoint.base_model
                )));
            }
            self.core.models.resolve(&checkpoint.base_model)?;
            // A state goes on with the optimizer that made it; weights alone may take another.
            let own = self.core.catalog.optimizer_of(&request.path);
            let optimizer = match &request.optimizer_config {
                Some(config) if request.optimizer && config.family != own.family => {
                    return Err(ApiError::bad_request(format!(
                        "{} was trained with optimizer {}, not with {}: load its weights without optimizer",
                        request.path, own.family, config.family
                    )));
                }
                Some(config) => config.clone(),
                None => own,
            };
            let metadata = request.user_metadata.clone();
            self.new_run(key, |id| {
                new_row(
                    id,
                    checkpoint.base_model,
                    checkpoint.lora,
                    metadata,
                    optimizer,
                )
            })?;
        }
        self.submit(&run, 0, OpKind::CreateFromWeights, body)
    }

    /// Enters a run into the catalog unless it is there. Another request for the same number is
    /// told so when its operation is submitted.
    fn new_run(
        &self,
        (session, number): (&SessionId, u64),
        row: impl FnOnce((TrainingRunId, SessionId)) -> Run,
    ) -> ApiResult<TrainingRunId> {
        self.core.catalog.session(session)?;
        let id = TrainingRunId::of_session(session, number);
        if !self.is_created(&id)? {
            self.take_up(session)?;
            self.check_adapters()?;
            self.core
                .catalog
                .put_run(row((id.clone(), session.clone())))?;
        }
        Ok(id)
    }

    /// Whether a run's creation was accepted. A row alone is what a refused log entry leaves.
    pub(crate) fn is_created(&self, run: &TrainingRunId) -> ApiResult<bool> {
        if self.core.catalog.run(run).is_err() {
            return Ok(false);
        }
        let journal = self.core.journal(run)?;
        let is_empty = lock(&journal).is_empty();
        Ok(!is_empty)
    }

    /// Accepts a sample.
    pub(crate) fn sample(&self, request: &SampleRequest, body: &[u8]) -> ApiResult<UntypedFuture> {
        self.check_open()?;
        let Some(sampler) = &request.sampling_session_id else {
            return Err(ApiError::bad_request(
                "sampling_session_id is missing: create_sampling_session gives one; or name a base_model or a model_path",
            ));
        };
        let (n, most) = (request.num_samples, self.core.limits.max_num_samples);
        if n == 0 || n > most {
            return Err(ApiError::bad_request(format!(
                "num_samples {n} must be between 1 and {most}"
            )));
        }
        let Some(seq) = request.seq_id else {
            return Err(ApiError::bad_request("seq_id of the sample is missing"));
        };
        let id = sample_request_id(sampler, seq).map_err(malformed)?;
        let session = self.core.live_sampler(sampler)?.session_id;
        self.check_load(body.len(), || self.core.samples().must_take(&id, seq))?;
        let limit = self.core.limits.max_pending_samples;
        let room = self.check_room(OpKind::Sample, body);
        let mut samples = self.core.samples();
        if !samples.knows(&id, seq) {
            self.take_up(&session)?;
            room?;
        }
        match samples.accept(&id, OpKind::Sample, seq, body, limit)? {
            Accepted::Known => {}
            Accepted::New => self.core.send_sample(id.clone(), body.len()),
            Accepted::Conflict(_) => {
                return Err(ApiError::unprocessable(format!(
                    "sample {seq} of sampler {sampler} was accepted with another content (request {id}): a number stands for one request"
                )));
            }
            // Samples may have any number.
            Accepted::TooFar(_) => {}
            Accepted::Full(n) => {
                return Err(ApiError::busy(format!("{n} samples wait already")));
            }
        }
        let names = (0..n).map(|i| format!("{id}:{i}")).collect();
        Ok(UntypedFuture {
            request_id: id,
            model_id: None,
            sample_sequence_ids: Some(names),
        })
    }

    /// Frees the memory of a run. Not logged: it changes no state.
    pub(crate) fn unload(&self, run: &TrainingRunId) -> ApiResult<UntypedFuture> {
        self.check_open()?;
        self.core.journal(run)?;
        let id: RequestId = format!("{run}:unload:{}", uuid::Uuid::now_v7())
            .parse()
            .map_err(malformed)?;
        self.core.futures.insert_in_memory(id.clone());
        self.core.send(Command::Unload {
            run: run.clone(),
            request_id: id.clone(),
        });
        Ok(UntypedFuture {
            request_id: id,
            model_id: Some(run.clone()),
            sample_sequence_ids: None,
        })
    }
}

fn malformed(error: TypeError) -> ApiError {
    ApiError::bad_request(error.to_string())
}

fn optimizer_family(config: &OptimizerConfig) -> ApiResult<Family> {
    family(config).map_err(|error| ApiError::bad_request(error.to_string()))
}

/// The row of a run that begins now.
fn new_row(
    (id, session_id): (TrainingRunId, SessionId),
    base_model: String,
    lora: LoraConfig,
    user_metadata: Option<UserMetadata>,
    optimizer: OptimizerConfig,
) -> Run {
    Run {
        id,
        session_id,
        base_model,
        lora,
        user_metadata,
        created_at: now(),
        last_request_at: now(),
        corrupted: None,
        optimizer,
    }
}

pub(crate) const fn name_of(kind: OpKind) -> &'static str {
    match kind {
        OpKind::CreateModel => "create_model",
        OpKind::CreateFromWeights | OpKind::LoadWeights => "load_weights",
        OpKind::ForwardBackward => "forward_backward",
        OpKind::OptimStep => "optim_step",
        OpKind::ZeroGrad => "zero_grad",
        OpKind::GradientStats => "gradient_stats",
        OpKind::SaveWeights => "save_weights",
        OpKind::SaveWeightsForSampler => "save_weights_for_sampler",
        OpKind::SaveWeightsExternal => "save_weights_external",
        OpKind::Sample => "sample",
        OpKind::Missing => "missing",
    }
}
