//! What requests and the engine's thread share: catalog, journals, futures and the way to the engine.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tinker_types::{
    FinishSessionRequest, RequestId, SamplingSessionId, SessionId, TinkerPath, TrainingRunId,
};

use crate::accounts::Accounts;
use crate::app::name_of;
use crate::attempts::{Attempts, MAX_RETRIES};
use crate::bundle;
use crate::caller::{self, Caller};
use crate::catalog::{Catalog, Sampler};
use crate::clock::{Clock, now};
use crate::completions::{Completions, Ended, SamplerClient};
use crate::custom_loss::CustomLosses;
use crate::db::Db;
use crate::deletions::finish_deletions;
use crate::device::{Device, Loader};
use crate::disk::{Disk, create_dir, remove_dir};
use crate::engine::Command;
use crate::error::{Error, Result};
use crate::future_store::{FutureStore, Scope};
use crate::journal::Journal;
use crate::keys::Keys;
use crate::limits::Limits;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::models::ModelRegistry;
use crate::operation::{Form, OpKind, Outcome};
use crate::paths::Paths;
use crate::pending::{Count, Pending, session_of};
use crate::quota::Quota;
use crate::segment_log::Syncer;
use crate::watchers::Watchers;

/// Runs used within this time are taken up at start; older ones when somebody asks for them.
const TAKE_UP_WITHIN_MS: i64 = 24 * 60 * 60 * 1000;

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

/// Why an operation does not run for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) seq: u64,
    /// The fault with its path.
    pub(crate) fault: String,
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

    /// Goes on with what was accepted and not finished.
    fn take_up(&self) {
        for run in self.catalog.runs() {
            let recent = now() - run.last_request_at < TAKE_UP_WITHIN_MS;
            if recent {
                self.take_up_run(run.id);
            }
            // Its futures are known now; most have nothing left to do.
            self.close_settled_journals();
        }
        self.take_up_samples();
    }

    fn take_up_samples(&self) {
        let found = self.samples().found();
        let unfinished = found.into_iter().filter(|f| f.finished.is_none());
        let ids: Vec<RequestId> = unfinished.map(|f| f.request_id).collect();
        let is_safe = self.attempts().begin_samples(&ids);
        for request_id in ids {
            if is_safe {
                self.send_sample(request_id, 0);
            } else {
                let outcome = Outcome::refused(format!(
                    "the sample was waiting {} times in a row when the server died, perhaps for want of memory, and is not tried again: ask for less at once",
                    MAX_RETRIES + 1
                ));
                self.finish_sample(&request_id, outcome);
            }
        }
    }

    fn take_up_run(&self, run: TrainingRunId) {
        let Err(error) = self.journal(&run) else {
            return;
        };
        tracing::error!(run.id = %run, error = error.with_causes(), "cannot take up a training run");
        if error.is_passing() {
            lock(&self.left_out).push(run);
        }
    }

    /// Tries again to take up the runs that a passing fault kept out.
    pub(crate) fn take_up_left_out(&self) {
        let runs = std::mem::take(&mut *lock(&self.left_out));
        for run in runs {
            self.take_up_run(run);
        }
    }

    /// Notes that an operation is held back. True: it was not before, or by another fault.
    pub(crate) fn hold_back(&self, run: &TrainingRunId, held: Held) -> bool {
        let before = lock(&self.held).insert(run.clone(), held.clone());
        before.as_ref() != Some(&held)
    }

    /// Notes that a run goes on.
    pub(crate) fn let_go(&self, run: &TrainingRunId) {
        lock(&self.held).remove(run);
    }

    /// The samples that a passing fault keeps from starting, with the fault.
    pub(crate) fn held_samples(&self) -> MutexGuard<'_, HashMap<RequestId, String>> {
        lock(&self.held_samples)
    }

    /// Says which fault holds a future back, one of its own operation or of one before it.
    pub(crate) fn held_by_fault(&self, id: &RequestId) -> Option<String> {
        if let Some(fault) = self.held_samples().get(id) {
            return Some(format!(
                "the sample is tried again until this passes: {fault}"
            ));
        }
        let Held { seq, fault } = self.held_operation(id)?;
        Some(format!(
            "operation {seq} of this run is tried again until this passes: {fault}"
        ))
    }

    fn held_operation(&self, id: &RequestId) -> Option<Held> {
        let held = lock(&self.held);
        if held.is_empty() {
            return None;
        }
        let (run, seq) = id.as_str().rsplit_once(":op:")?;
        let (run, seq): (TrainingRunId, u64) = (run.parse().ok()?, seq.parse().ok()?);
        held.get(&run).filter(|held| held.seq <= seq).cloned()
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

    /// The journal of a training run, opened on first use.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a run that is unknown to the current caller; or its log is damaged, which
    /// is recorded.
    pub(crate) fn journal(&self, run: &TrainingRunId) -> Result<Arc<Mutex<Journal>>> {
        self.catalog.check_run(run)?;
        let mut journals = lock(&self.journals);
        if let Some(journal) = journals.get(run) {
            return Ok(Arc::clone(journal));
        }
        let marked = self.catalog.run(run)?.corrupted;
        let opened = self.open_journal(run);
        if let Err(error @ Error::Corrupt { .. }) = &opened {
            self.catalog.mark_corrupted(run, &error.to_string())?;
        }
        let journal = opened?;
        // Its file was put back, or cut.
        let log = self.paths.run_log(run).display().to_string();
        if marked.is_some_and(|why| why.starts_with(&log)) {
            self.catalog.unmark_corrupted(run)?;
        }
        for found in journal.found() {
            if found.finished.is_none() {
                self.attempts().note_unfinished(found.request_id.clone());
                self.send_operation(run, (found.seq, found.request_id), found.kind, 0);
            }
        }
        let journal = Arc::new(Mutex::new(journal));
        journals.insert(run.clone(), Arc::clone(&journal));
        Ok(journal)
    }

    /// The logs that are open; no other is opened meanwhile.
    pub(crate) fn open_journals(
        &self,
    ) -> MutexGuard<'_, HashMap<TrainingRunId, Arc<Mutex<Journal>>>> {
        lock(&self.journals)
    }

    /// The metadata database.
    pub(crate) const fn db(&self) -> &Db {
        &self.db
    }

    /// Closes the logs that nobody uses and that have nothing unfinished. They are opened again on
    /// demand.
    pub(crate) fn close_settled_journals(&self) {
        lock(&self.journals).retain(|_, journal| {
            // Whoever wants one has to come by here: without another handle, nobody has it.
            Arc::strong_count(journal) > 1 || !lock(journal).is_settled()
        });
    }

    /// Forgets results older than `limit` whose logs are closed; they are found again on demand.
    pub(crate) fn forget_unused_futures(&self, limit: Duration) {
        let journals = lock(&self.journals);
        self.futures
            .forget_unused(limit, |run| journals.contains_key(run));
    }

    fn open_journal(&self, run: &TrainingRunId) -> Result<Journal> {
        let mut journal = Journal::open(
            Arc::clone(&self.disk),
            self.syncer.clone(),
            &self.paths.run_log(run),
            Scope::Run(run.clone()),
            Arc::clone(&self.futures),
        )?;
        let oldest = snapshots(&self.paths.snapshots(run))?.into_iter().next();
        // A snapshot may hold an operation whose result a crash kept from the log.
        let is_finished = |seq: &u64| journal.is_finished_to(*seq);
        if let Some(seq) = oldest.filter(is_finished) {
            journal.raise_floor(seq);
        }
        Ok(journal)
    }

    /// The operations that are being tried again.
    pub(crate) fn attempts(&self) -> MutexGuard<'_, Attempts> {
        lock(&self.attempts)
    }

    /// The log of all samples.
    pub(crate) fn samples(&self) -> MutexGuard<'_, Journal> {
        lock(&self.samples)
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

    /// Records the result of a sample and wakes those who wait for it.
    pub(crate) fn finish_sample(&self, id: &RequestId, outcome: Outcome) {
        let ended = Ended {
            id: id.clone(),
            failed: outcome.is_failure(),
            n_bytes: Some(outcome.body.len() as u64),
        };
        self.count_end(id, &outcome);
        self.samples().finish(id, outcome);
        // A poll that was waiting may have been answered already.
        let was_fetched = || self.futures.was_delivered(id);
        self.completions.note(ended, was_fetched);
        self.watchers.end(id);
        self.attempts().note_sample_over(id);
    }

    /// The samples of a client that ended and whose results nobody fetched since the start.
    pub(crate) fn ended_samples(&self, client: &SamplerClient) -> Vec<Ended> {
        let found = self.samples().found().into_iter();
        found
            .filter(|f| SamplerClient::of(&f.request_id).as_ref() == Some(client))
            .filter(|f| !self.futures.was_delivered(&f.request_id))
            .filter_map(|f| {
                Some(Ended {
                    failed: f.finished? == Form::Failed,
                    id: f.request_id,
                    n_bytes: None,
                })
            })
            .collect()
    }

    /// The training run of a future, if it is one of a run that this server knows.
    pub(crate) fn run_of(&self, id: &RequestId) -> Option<TrainingRunId> {
        let (run, _seq) = id.as_str().rsplit_once(":op:")?;
        let run: TrainingRunId = run.parse().ok()?;
        self.catalog.run(&run).ok().map(|run| run.id)
    }

    /// The directory of a sampler's weights; `None` for the base model alone.
    pub(crate) fn sampler_dir(&self, sampler: &Sampler) -> Option<PathBuf> {
        match (&sampler.model_path, &sampler.request_id) {
            (Some(path), _) => Some(self.paths.checkpoint(path)),
            (None, Some(_)) => Some(self.own_weights(sampler)),
            (None, None) => None,
        }
    }

    /// Where the weights of a sampler are that lives with its session.
    pub(crate) fn own_weights(&self, sampler: &Sampler) -> PathBuf {
        let saved_by = sampler.request_id.as_ref().filter(|_| sampler.inflight);
        let run = saved_by
            .and_then(|id| id.parse().ok())
            .and_then(|id| self.run_of(&id));
        match run {
            Some(run) => self.paths.inflight(&run),
            None => self.paths.sampler(&sampler.id),
        }
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
    /// [`Error::NotFound`], or the database refuses.
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

    /// The sampler of an id.
    ///
    /// # Errors
    /// [`Error::NotFound`]; also if its checkpoint was deleted.
    pub(crate) fn live_sampler(&self, id: &SamplingSessionId) -> Result<Sampler> {
        let sampler = self.catalog.sampler(id)?;
        if let Some(path) = &sampler.model_path
            && self.catalog.find_checkpoint(path).is_none()
        {
            return Err(self.catalog.no_checkpoint(path));
        }
        Ok(sampler)
    }
}

/// The operations that a run has snapshots of, oldest first.
///
/// # Errors
/// If the directory cannot be read.
pub(crate) fn snapshots(dir: &Path) -> Result<Vec<u64>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read", dir, error)),
    };
    let mut found: Vec<u64> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// The directory of a snapshot.
pub(crate) fn snapshot_dir(snapshots: &Path, seq: u64) -> PathBuf {
    snapshots.join(format!("{seq:010}"))
}

/// What is to be had of a run's snapshots.
pub(crate) struct NewestSnapshot {
    /// The newest one that can be read.
    pub(crate) found: Option<(bundle::Manifest, tinker_engine::AdapterState)>,
    /// A passing fault that kept a newer one from being read.
    pub(crate) passed_over: Option<Error>,
}

/// The newest snapshot of a run that can be read.
///
/// # Errors
/// If the directory cannot be read, or a newer program wrote into it.
pub(crate) fn newest_snapshot(disk: &dyn Disk, dir: &Path) -> Result<NewestSnapshot> {
    let mut passed_over = None;
    for seq in snapshots(dir)?.into_iter().rev() {
        match bundle::read(disk, &snapshot_dir(dir, seq), true) {
            Ok(found) => {
                return Ok(NewestSnapshot {
                    found: Some(found),
                    passed_over,
                });
            }
            Err(error @ Error::Newer { .. }) => return Err(error),
            Err(error) => {
                tracing::error!(
                    error = error.with_causes(),
                    "skipping an unreadable snapshot"
                );
                if error.is_passing() {
                    passed_over.get_or_insert(error);
                }
            }
        }
    }
    Ok(NewestSnapshot {
        found: None,
        passed_over,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Run;
    use crate::disk::OsDisk;
    use crate::operation::{OpKind, run_request_id};
    use std::fs::File;
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tinker_engine::CpuOptions;
    use tinker_types::LoraConfig;

    fn open(home: &Path) -> Arc<Core> {
        open_on(home, Arc::new(OsDisk), std::sync::mpsc::channel().0)
    }

    fn open_on(home: &Path, disk: Arc<dyn Disk>, engine: Sender<Command>) -> Arc<Core> {
        let options = CoreOptions {
            home: home.to_owned(),
            disk,
            limits: Limits::default(),
            clock: Clock::default(),
            models: ModelRegistry::new(home.to_owned(), &[]).unwrap(),
            device: Device::Cpu,
            loader: Loader::cpu(CpuOptions::default()),
            second_loader: None,
            memory: Memory::of_machine(),
            threads: 1,
            version: "0".into(),
        };
        Core::open(options, engine).unwrap()
    }

    fn run(core: &Core) -> TrainingRunId {
        let id: TrainingRunId = "s:train:0".parse().unwrap();
        let row = Run {
            id: id.clone(),
            session_id: "s".parse().unwrap(),
            base_model: "m".into(),
            lora: LoraConfig::default(),
            user_metadata: None,
            created_at: now(),
            last_request_at: now(),
            corrupted: None,
            optimizer: Default::default(),
        };
        core.catalog.put_run(row).unwrap();
        id
    }

    /// A disk without files for as long as its switch is on.
    #[derive(Debug, Default)]
    struct Away(AtomicBool);

    impl Disk for Away {
        fn open(&self, path: &Path) -> io::Result<File> {
            if self.0.load(Ordering::SeqCst) {
                return Err(io::Error::from_raw_os_error(5));
            }
            OsDisk.open(path)
        }
        fn create_dir_all(&self, path: &Path) -> io::Result<()> {
            OsDisk.create_dir_all(path)
        }
        fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
            OsDisk.write_new(path, bytes)
        }
        fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()> {
            OsDisk.append(file, path, bytes)
        }
        fn truncate(&self, file: &File, len: u64) -> io::Result<()> {
            OsDisk.truncate(file, len)
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            OsDisk.rename(from, to)
        }
    }

    #[test]
    fn a_run_that_a_passing_fault_left_out_is_taken_up_later() {
        let home = tempfile::tempdir().unwrap();
        let core = open(home.path());
        let run = run(&core);
        let id = run_request_id(&run, 0).unwrap();
        let journal = core.journal(&run).unwrap();
        lock(&journal)
            .accept(&id, OpKind::CreateModel, 0, b"{}", 10)
            .unwrap();
        core.samples().sync().unwrap();
        drop((journal, core));
        // The log of samples is needed at once and is not on that disk.
        std::fs::remove_dir_all(Paths::new(home.path()).sample_log()).unwrap();
        let disk = Arc::new(Away::default());
        disk.0.store(true, Ordering::SeqCst);
        let (sender, inbox) = std::sync::mpsc::channel();

        let core = open_on(home.path(), disk.clone(), sender);
        core.take_up_left_out();
        assert!(inbox.try_recv().is_err(), "nothing can be read");
        disk.0.store(false, Ordering::SeqCst);
        core.take_up_left_out();

        let taken_up = inbox.try_recv().unwrap();
        assert!(matches!(taken_up, Command::Operation { request_id, .. } if request_id == id));
        core.take_up_left_out();
        assert!(inbox.try_recv().is_err(), "only once");
    }

    fn n_open(core: &Core) -> usize {
        core.close_settled_journals();
        lock(&core.journals).len()
    }

    #[test]
    fn a_log_is_closed_once_nothing_is_pending_and_opens_again_with_its_results() {
        let home = tempfile::tempdir().unwrap();
        let core = open(home.path());
        let run = run(&core);
        let id = run_request_id(&run, 0).unwrap();
        let journal = core.journal(&run).unwrap();
        lock(&journal)
            .accept(&id, OpKind::CreateModel, 0, b"{}", 10)
            .unwrap();
        drop(journal);
        assert_eq!(n_open(&core), 1);

        let journal = core.journal(&run).unwrap();
        lock(&journal).finish(&id, Outcome::json(&1));
        assert_eq!(n_open(&core), 1, "somebody has it");
        drop(journal);
        assert_eq!(n_open(&core), 0);
        assert_eq!(core.futures.len(), 1);

        core.futures.leave_to_log(Duration::ZERO);
        let again = core.journal(&run).unwrap();
        core.forget_unused_futures(Duration::ZERO);
        assert_eq!(core.futures.len(), 1, "its log is open");
        drop(again);
        assert_eq!(n_open(&core), 0);
        core.forget_unused_futures(Duration::from_secs(60));
        assert_eq!(core.futures.len(), 1, "it is young");
        core.forget_unused_futures(Duration::ZERO);
        assert_eq!(core.futures.len(), 0);

        let again = core.journal(&run).unwrap();
        assert_eq!(core.futures.len(), 1, "somebody asked");
        assert!(lock(&again).found()[0].finished.is_some());
        let result = lock(&again).result(&id).unwrap();
        assert_eq!(result.as_deref(), Some(&b"1"[..]));
        drop((again, core));
        assert_eq!(lock(&open(home.path()).journals).len(), 0);
    }
}
