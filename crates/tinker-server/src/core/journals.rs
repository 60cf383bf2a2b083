//! The logs of training runs: what they leave to be done at start, and which of them are open.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tinker_types::{RequestId, TrainingRunId};

use super::run_snapshots::snapshots;
use super::{Core, lock};
use crate::attempts::MAX_RETRIES;
use crate::clock::now;
use crate::error::{Error, Result};
use crate::future_store::Scope;
use crate::journal::Journal;
use crate::operation::Outcome;

/// Runs used within this time are taken up at start; older ones when somebody asks for them.
const TAKE_UP_WITHIN_MS: i64 = 24 * 60 * 60 * 1000;

impl Core {
    /// Goes on with what was accepted and not finished.
    pub(super) fn take_up(&self) {
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
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::Sender;

    use tinker_engine::CpuOptions;
    use tinker_types::LoraConfig;

    use super::super::CoreOptions;
    use super::*;
    use crate::catalog::Run;
    use crate::clock::Clock;
    use crate::device::{Device, Loader};
    use crate::disk::{Disk, OsDisk};
    use crate::engine::Command;
    use crate::limits::Limits;
    use crate::memory::Memory;
    use crate::models::ModelRegistry;
    use crate::operation::{OpKind, run_request_id};
    use crate::paths::Paths;

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
