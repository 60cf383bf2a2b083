//! What requests and the engine's thread share: catalog, journals, futures and the way to the engine.

mod held;
mod journals;
mod run_snapshots;
mod samples;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tinker_types::{FinishSessionRequest, RequestId, SessionId, TinkerPath, TrainingRunId};

use crate::accounts::Accounts;
use crate::app::name_of;
use crate::attempts::Attempts;
use crate::bundle;
use crate::caller::{self, Caller};
use crate::catalog::Catalog;
use crate::clock::Clock;
use crate::completions::Completions;
use crate::connections::Connections;
use crate::custom_loss::CustomLosses;
use crate::db::Db;
use crate::deletions::finish_deletions;
use crate::device::{Device, Loader};
use crate::disk::{Disk, create_dir, remove_dir};
use crate::engine::Command;
use crate::error::Result;
use crate::future_store::{FutureStore, Scope};
use crate::journal::Journal;
use crate::keys::Keys;
use crate::limits::Limits;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::models::ModelRegistry;
use crate::operation::{OpKind, Outcome};
use crate::paths::Paths;
use crate::pending::{Count, Pending, session_of};
use crate::quota::Quota;
use crate::segment_log::Syncer;
use crate::watchers::Watchers;
pub(crate) use held::Held;
pub(crate) use run_snapshots::{newest_snapshot, snapshot_dir, snapshots};

/// The shared state below the HTTP layer.
pub(crate) struct Core {
    pub(crate) paths: Paths,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) quota: Quota,
    pub(crate) limits: Limits,
    pub(crate) clock: Clock,
    pub(crate) catalog: Catalog,
    pub(crate) accounts: Accounts,
    /// The uploads, and files of uploads, that requests are at work on; held while one begins.
    pub(crate) uploads: Mutex<HashSet<PathBuf>>,
    pub(crate) keys: Keys,
    pub(crate) connections: Arc<Connections>,
    pub(crate) metrics: Metrics,
    pub(crate) futures: Arc<FutureStore>,
    pub(crate) completions: Completions,
    pub(crate) watchers: Watchers,
    pub(crate) custom_losses: CustomLosses,
    pub(crate) models: ModelRegistry,
    pub(crate) device: Device,
    pub(crate) loader: Loader,
    /// For models that the loader does not take.
    pub(crate) second_loader: Option<Loader>,
    pub(crate) memory: Memory,
    pub(crate) threads: usize,
    pub(crate) version: String,
    db: Db,
    syncer: Syncer,
    journals: Mutex<HashMap<TrainingRunId, Arc<Mutex<Journal>>>>,
    samples: Mutex<Journal>,
    /// Held while a checkpoint's directory and row change.
    checkpoints: Mutex<()>,
    attempts: Mutex<Attempts>,
    pending: Mutex<Pending>,
    /// Runs whose next operation is held back by a passing fault.
    held: Mutex<HashMap<TrainingRunId, Held>>,
    /// Samples that a passing fault keeps from starting, with the fault.
    held_samples: Mutex<HashMap<RequestId, String>>,
    /// Runs whose log a passing fault kept from being taken up.
    left_out: Mutex<Vec<TrainingRunId>>,
    engine: Mutex<Sender<Command>>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("paths", &self.paths)
            .finish_non_exhaustive()
    }
}

/// What [`Core::open`] needs.
pub(crate) struct CoreOptions {
    pub(crate) home: PathBuf,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) limits: Limits,
    pub(crate) clock: Clock,
    pub(crate) models: ModelRegistry,
    pub(crate) device: Device,
    pub(crate) loader: Loader,
    pub(crate) second_loader: Option<Loader>,
    pub(crate) memory: Memory,
    pub(crate) threads: usize,
    pub(crate) version: String,
}

/// Locks a mutex; a panic elsewhere does not make its data unusable, since writes are one step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    /// Opens a data directory. Commands for the engine go to `engine`.
    ///
    /// # Errors
    /// If the directory cannot be read or written.
    pub(crate) fn open(mut options: CoreOptions, engine: Sender<Command>) -> Result<Arc<Self>> {
        let paths = Paths::new(&options.home);
        let limit = options.limits.max_disk_bytes;
        let quota;
        (quota, options.disk) = Quota::new(limit, paths.root(), paths.temp(), options.disk);
        bundle::restore_replaced(options.disk.as_ref(), paths.root())?;
        create_dir(options.disk.as_ref(), paths.root())?;
        let db = Db::open(&paths.database())?;
        let catalog = Catalog::open(db.clone(), options.clock.clone())?;
        finish_deletions(options.disk.as_ref(), &paths, &catalog)?;
        // What is in there was not finished when the last server ended.
        remove_dir(&paths.temp())?;
        create_dir(options.disk.as_ref(), &paths.temp())?;
        let futures: Arc<FutureStore> = Arc::default();
        let syncer = Syncer::start();
        let samples = Journal::open(
            Arc::clone(&options.disk),
            syncer.clone(),
            &paths.sample_log(),
            Scope::Samples,
            Arc::clone(&futures),
        )?;
        let custom_losses = CustomLosses::new(paths.custom_losses(), Arc::clone(&options.disk));
        let attempts = Attempts::open(Arc::clone(&options.disk), paths.attempts());
        let core = Arc::new(Self {
            attempts: Mutex::new(attempts),
            paths,
            disk: options.disk,
            quota,
            connections: Connections::new(options.limits.max_connections),
            limits: options.limits,
            clock: options.clock,
            catalog,
            accounts: Accounts::new(db.clone()),
            uploads: Mutex::default(),
            db,
            keys: Keys::open(&options.home)?,
            metrics: Metrics::default(),
            pending: Mutex::default(),
            futures,
            completions: Completions::default(),
            watchers: Watchers::default(),
            custom_losses,
            models: options.models,
            device: options.device,
            loader: options.loader,
            second_loader: options.second_loader,
            memory: options.memory,
            threads: options.threads,
            version: options.version,
            syncer,
            journals: Mutex::default(),
            samples: Mutex::new(samples),
            checkpoints: Mutex::default(),
            held: Mutex::default(),
            held_samples: Mutex::default(),
            left_out: Mutex::default(),
            engine: Mutex::new(engine),
        });
        core.take_up();
        Ok(core)
    }

    /// Hands an accepted operation of a training run, whose request has so many bytes, to the engine.
    pub(crate) fn send_operation(
        &self,
        run: &TrainingRunId,
        (seq, request_id): (u64, RequestId),
        kind: OpKind,
        n_bytes: usize,
    ) {
        self.note_accepted(&request_id, kind, n_bytes);
        self.send(Command::Operation {
            run: run.clone(),
            seq,
            request_id,
            kind,
        });
    }

    /// Hands an accepted sample, whose request has so many bytes, to the engine.
    pub(crate) fn send_sample(&self, request_id: RequestId, n_bytes: usize) {
        self.note_accepted(&request_id, OpKind::Sample, n_bytes);
        self.send(Command::Sample { request_id });
    }

    fn note_accepted(&self, id: &RequestId, kind: OpKind, n_bytes: usize) {
        let owner = self.catalog.owner_of(session_of(id.as_str()));
        let (n_bytes, now) = (n_bytes as u64, Instant::now());
        self.pending().accept(id, kind, (owner, n_bytes), now);
    }

    /// Does something as whoever a session belongs to, and as their key allows now.
    pub(crate) fn on_behalf_of<T>(&self, session: &SessionId, work: impl FnOnce() -> T) -> T {
        let caller = match self.catalog.owner_of(session.as_str()) {
            None => Caller::own(),
            Some(key) => self
                .keys
                .named(&key)
                .unwrap_or_else(|| Caller::removed(key)),
        };
        caller::work_for(caller, work)
    }

    /// Why the current caller may queue no operation with so many bytes more for now.
    pub(crate) fn over_limit(&self, n_bytes: usize) -> Option<String> {
        let caller = caller::current()?;
        let (key, limits) = (caller.key?, caller.limits);
        let load = self.pending().load(&key);
        if load.n_operations >= limits.operations {
            return Some(format!(
                "API key {key} has {} unfinished operations, and its limit is {}: wait for some of them",
                load.n_operations, limits.operations
            ));
        }
        // One that is alone above the limit would never be taken.
        if load.n_operations > 0 && load.n_bytes.saturating_add(n_bytes as u64) > limits.bytes {
            return Some(format!(
                "API key {key} has unfinished requests of {} bytes, and its limit is {}: wait for some of them",
                load.n_bytes, limits.bytes
            ));
        }
        None
    }

    /// Hands a command to the engine's thread. Without one the server is stopping, and what was
    /// logged is taken up at the next start.
    pub(crate) fn send(&self, command: Command) {
        if lock(&self.engine).send(command).is_err() {
            tracing::debug!("the engine has stopped");
        }
    }

    /// The metadata database.
    pub(crate) const fn db(&self) -> &Db {
        &self.db
    }

    /// The operations that are being tried again.
    pub(crate) fn attempts(&self) -> MutexGuard<'_, Attempts> {
        lock(&self.attempts)
    }

    /// What was accepted and has no result yet.
    pub(crate) fn pending(&self) -> MutexGuard<'_, Pending> {
        lock(&self.pending)
    }

    /// How many operations of each kind have no result yet.
    pub(crate) fn queue(&self) -> BTreeMap<&'static str, Count> {
        self.pending().counts(name_of)
    }

    /// Counts an operation whose result is about to be published.
    pub(crate) fn count_end(&self, id: &RequestId, outcome: &Outcome) {
        let ended = self.pending().end(id, Instant::now());
        if let Some((kind, took)) = ended {
            self.metrics.end_operation(name_of(kind), outcome, took);
        }
    }

    /// The training run of a future, if it is one of a run that this server knows.
    pub(crate) fn run_of(&self, id: &RequestId) -> Option<TrainingRunId> {
        let (run, _seq) = id.as_str().rsplit_once(":op:")?;
        let run: TrainingRunId = run.parse().ok()?;
        self.catalog.run(&run).ok().map(|run| run.id)
    }

    /// Keeps everybody else from changing checkpoints, so that directory and row stay together.
    pub(crate) fn change_checkpoints(&self) -> MutexGuard<'_, ()> {
        lock(&self.checkpoints)
    }

    /// Notes in the audit log what became of a checkpoint.
    pub(crate) fn note_checkpoint(&self, event: &'static str, path: &TinkerPath) {
        self.accounts
            .note(event, serde_json::json!({ "tinker_path": path }));
    }

    /// Ends a session and removes the weights that lived with it.
    ///
    /// # Errors
    /// [`crate::error::Error::NotFound`], or the database refuses.
    pub(crate) fn finish_session(&self, id: &SessionId, how: FinishSessionRequest) -> Result<()> {
        self.catalog.finish_session(id, how)?;
        let (_, samplers) = self.catalog.of_session(id);
        for sampler in samplers {
            self.discard_sampler_weights(&sampler);
        }
        Ok(())
    }

    /// Writes what is kept in memory between requests.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn flush(&self) -> Result<()> {
        self.catalog.flush_times()?;
        self.accounts.flush()?;
        self.samples().sync()?;
        let journals: Vec<_> = lock(&self.journals).values().cloned().collect();
        for journal in journals {
            lock(&journal).sync()?;
        }
        Ok(())
    }
}
