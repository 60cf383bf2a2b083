//! The engine on its own thread: one training operation, then a share of sampling, in turn.

mod base;
mod counting;
mod gaps;
mod held;
mod loading;
mod optimizers;
mod prompt_scores;
mod rebuild;
mod room;
mod runs;
mod samples;
mod saves;
mod snapshots;
mod training;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tinker_types::{ErrorCategory, RequestId, TrainingRunId};

use crate::attempts::MAX_RETRIES;
use crate::core::{Core, Held, lock};
use crate::error::{Error, Result};
use crate::metrics::Loaded;
use crate::operation::{OpKind, Outcome};
use crate::pending::session_of;
use crate::scheduler::TrainQueue;
use base::Base;
use held::HeldSamples;
pub(crate) use loading::check_optimizer;
pub(crate) use optimizers::family;
use room::{Claims, WaitingSamples};
use runs::ActiveRun;
pub(crate) use saves::expiry;

/// How often an idle engine looks for adapters and checkpoints that are no longer needed.
const HOUSEKEEPING: Duration = Duration::from_secs(30);

/// How long a result that nobody fetches stays in memory beside its log.
const RESULTS_IN_MEMORY: Duration = Duration::from_secs(60);

/// How long it is known without its log that a result is there.
const FUTURES_IN_MEMORY: Duration = Duration::from_secs(10 * 60);

/// How long the list of a sampler's finished samples is kept for a client that does not ask for it.
const COMPLETIONS_IN_MEMORY: Duration = Duration::from_secs(10 * 60);

/// What the engine's thread is told. Requests themselves are read from the log.
#[derive(Debug)]
pub(crate) enum Command {
    /// An operation of a training run was accepted.
    Operation {
        run: TrainingRunId,
        seq: u64,
        request_id: RequestId,
        kind: OpKind,
    },
    /// A sample was accepted.
    Sample { request_id: RequestId },
    /// Nobody waits for this sample any more.
    Cancel(RequestId),
    /// Free a run's memory; it comes back with the next operation.
    Unload {
        run: TrainingRunId,
        request_id: RequestId,
    },
    /// The weights in this directory were deleted.
    ForgetWeights(PathBuf),
    /// Do at once what is done every half minute, and say so.
    Sweep(std::sync::mpsc::Sender<()>),
    /// Finish the running operation, save, and leave.
    Stop,
    /// Leave at once; what is in the log is enough.
    Abandon,
}

/// An accepted operation in the queue.
#[derive(Debug)]
struct Queued {
    request_id: RequestId,
    kind: OpKind,
}

/// What came of trying an operation.
#[derive(Debug)]
enum Attempt {
    /// It has a result.
    Done(Outcome),
    /// A passing fault kept its run out of memory. Nothing was done; it is tried again.
    Held(Error),
}

impl From<Error> for Attempt {
    fn from(error: Error) -> Self {
        if error.is_passing() {
            Self::Held(error)
        } else {
            Self::Done(error.into())
        }
    }
}

/// The running thread.
#[derive(Debug)]
pub(crate) struct EngineThread {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
    working: Arc<AtomicBool>,
}

impl EngineThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the operating system refuses.
    pub(crate) fn start(core: Arc<Core>, inbox: Receiver<Command>) -> Result<Self> {
        let working = Arc::new(AtomicBool::new(false));
        let worker = Worker {
            core: Arc::clone(&core),
            inbox,
            queue: TrainQueue::default(),
            bases: HashMap::new(),
            runs: HashMap::new(),
            held_samples: HeldSamples::default(),
            waiting: WaitingSamples::default(),
            claims: Claims::default(),
            working: Arc::clone(&working),
        };
        let thread = std::thread::Builder::new()
            .name("engine".into())
            // Long prompts recurse nowhere, but kernels keep tiles on the stack.
            .stack_size(8 << 20)
            .spawn(move || worker.run())
            .map_err(|e| Error::io("start a thread for", std::path::Path::new("engine"), e))?;
        Ok(Self {
            core,
            thread: Some(thread),
            working,
        })
    }

    /// Whether it can still do anything.
    pub(crate) fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|t| !t.is_finished())
    }

    /// Whether it computes something or has something to compute.
    pub(crate) fn is_working(&self) -> bool {
        self.working.load(Ordering::Relaxed)
    }

    /// Finishes the running operation, saves every run that changed, and ends the thread.
    pub(crate) fn stop(&mut self) {
        self.end(Command::Stop);
    }

    fn end(&mut self, command: Command) {
        self.core.send(command);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread ended in a panic");
        }
    }
}

impl Drop for EngineThread {
    /// Ends the thread as a crash would, after the running operation.
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end(Command::Abandon);
        }
    }
}

/// Whether the thread goes on.
enum Next {
    GoOn,
    /// Leave, after saving everything or not.
    Leave {
        save: bool,
    },
}

/// The thread's state.
#[derive(Debug)]
struct Worker {
    core: Arc<Core>,
    inbox: Receiver<Command>,
    queue: TrainQueue<Queued>,
    /// Base models in memory, by name.
    bases: HashMap<String, Base>,
    runs: HashMap<TrainingRunId, ActiveRun>,
    held_samples: HeldSamples,
    waiting: WaitingSamples,
    claims: Claims,
    working: Arc<AtomicBool>,
}

impl Worker {
    fn run(mut self) {
        let mut swept = Instant::now();
        loop {
            // A thread that ended here would leave everybody waiting without a word.
            let turn = self.guarded(|worker| worker.turn(&mut swept));
            if let Some(Next::Leave { save }) = turn {
                if save {
                    self.core.attempts().take_back_samples();
                    self.save_all();
                }
                return;
            }
        }
    }

    /// Reads what there is to do and does some of it.
    fn turn(&mut self, swept: &mut Instant) -> Next {
        if let leave @ Next::Leave { .. } = self.take_commands() {
            return leave;
        }
        // Now, while everything that arrived is known.
        if swept.elapsed() > HOUSEKEEPING {
            *swept = Instant::now();
            self.sweep();
        }
        let started = Instant::now();
        self.queue.wake(started);
        self.retry_samples(started);
        self.retry_waiting(started);
        if let Some((run, seq, queued)) = self.queue.pop() {
            self.operate(&run, seq, queued);
        }
        // Sampling gets as much time as training just had, and at least one step.
        let share = started.elapsed();
        self.sample_for(share);
        self.note_loaded();
        Next::GoOn
    }

    /// Says what is in memory, for those who watch.
    fn note_loaded(&self) {
        self.core.metrics.set_loaded(Loaded {
            n_models: self.bases.len(),
            n_training: self.runs.len(),
            n_sampling: self.bases.values().map(Base::n_weights).sum(),
        });
    }

    /// Does something that must not end the thread; `None` after a panic.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> Option<T> {
        let guarded = std::panic::AssertUnwindSafe(|| work(&mut *self));
        if let Ok(done) = std::panic::catch_unwind(guarded) {
            return Some(done);
        }
        tracing::error!("the engine failed; its runs are rebuilt from snapshots and logs");
        self.runs.clear();
        for (_, base) in std::mem::take(&mut self.bases) {
            for id in base.sampling.requests() {
                self.core.finish_sample(&id, engine_failed());
            }
        }
        None
    }

    /// Reads all commands that are there, waiting for one if there is nothing to do.
    fn take_commands(&mut self) -> Next {
        let busy = self.queue.has_ready() || self.bases.values().any(Base::is_sampling);
        let wake = [
            self.queue.next_wake(),
            self.held_samples.next_wake(),
            self.waiting.next_wake(),
        ];
        let wake = wake.into_iter().flatten().min();
        // What is held back is still to be done.
        self.working
            .store(busy || wake.is_some(), Ordering::Relaxed);
        if !busy {
            let pause = wake.map(|at| at.saturating_duration_since(Instant::now()));
            match self
                .inbox
                .recv_timeout(HOUSEKEEPING.min(pause.unwrap_or(HOUSEKEEPING)))
            {
                Ok(command) => {
                    self.working.store(true, Ordering::Relaxed);
                    if let leave @ Next::Leave { .. } = self.take(command) {
                        return leave;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Next::Leave { save: true },
                Err(RecvTimeoutError::Timeout) => return Next::GoOn,
            }
        }
        while let Ok(command) = self.inbox.try_recv() {
            if let leave @ Next::Leave { .. } = self.take(command) {
                return leave;
            }
        }
        Next::GoOn
    }

    fn take(&mut self, command: Command) -> Next {
        match command {
            Command::Operation {
                run,
                seq,
                request_id,
                kind,
            } => {
                let next = self.core.journal(&run).map_or(0, |j| lock(&j).next_seq());
                let owner = self.core.catalog.owner_of(session_of(run.as_str()));
                let owner = owner.as_ref().map_or("", |key| key.as_str());
                self.queue.open(&run, owner, next);
                self.queue.push(&run, seq, Queued { request_id, kind });
            }
            Command::Sample { request_id } => {
                let admitted = self.guarded(|worker| worker.admit(&request_id));
                if admitted.is_none() {
                    self.fail_sample(&request_id);
                }
            }
            Command::Cancel(request_id) => self.cancel(&request_id),
            Command::Unload { run, request_id } => {
                let unloaded = self.guarded(|worker| worker.unload(&run));
                let outcome = unloaded.unwrap_or_else(engine_failed);
                self.core.futures.complete(&request_id, outcome, None);
            }
            Command::ForgetWeights(dir) => {
                self.bases
                    .values_mut()
                    .for_each(|base| base.forget_weights(&dir));
            }
            Command::Sweep(done) => {
                self.guarded(Self::sweep);
                self.note_loaded();
                // Whoever asked may have left.
                let _ = done.send(());
            }
            Command::Stop => return Next::Leave { save: true },
            Command::Abandon => return Next::Leave { save: false },
        }
        Next::GoOn
    }

    /// Executes an operation and publishes its result. A panic in the engine fails the operation
    /// and throws the engine's state away; runs are rebuilt from snapshot and log.
    fn operate(&mut self, run: &TrainingRunId, seq: u64, queued: Queued) {
        self.unclaim(run);
        let guarded = std::panic::AssertUnwindSafe(|| self.attempt(run, seq, &queued));
        let executed = std::panic::catch_unwind(guarded);
        let panicked = executed.is_err();
        let outcome = match executed {
            Ok(Attempt::Done(outcome)) => outcome,
            Ok(Attempt::Held(fault)) => {
                self.claim(run, &fault);
                return self.hold_back(run, seq, queued, &fault);
            }
            Err(_) => engine_failed(),
        };
        self.core.let_go(run);
        self.core.count_end(&queued.request_id, &outcome);
        match self.core.journal(run) {
            Ok(journal) => lock(&journal).finish(&queued.request_id, outcome),
            Err(_) => self
                .core
                .futures
                .complete(&queued.request_id, outcome, None),
        }
        self.core.attempts().end(&queued.request_id);
        self.guarded(|worker| {
            if panicked {
                worker.discard_base_of(run);
            } else {
                worker.after_operation(run, seq);
            }
        });
    }

    /// Puts an operation back into its queue, to be tried again later.
    fn hold_back(&mut self, run: &TrainingRunId, seq: u64, queued: Queued, fault: &Error) {
        let id = queued.request_id.clone();
        self.core.attempts().take_back(&id);
        self.core.pending().set_started(&id, false);
        let first = self.core.limits.fault_pause;
        let pause = self.queue.put_back(run, seq, queued, Instant::now(), first);
        let fault = fault.with_causes();
        tracing::warn!(
            run.id = %run,
            request.id = %id,
            error = fault,
            pause_ms = pause.as_millis() as u64,
            "an operation is held back; it is tried again after a pause"
        );
        if self.core.hold_back(run, Held { seq, fault }) {
            self.core.futures.nudge(&id);
        }
    }

    /// Executes an operation, unless it took the process down too often.
    fn attempt(&mut self, run: &TrainingRunId, seq: u64, queued: &Queued) -> Attempt {
        self.core.pending().set_started(&queued.request_id, true);
        if self.core.attempts().begin(&queued.request_id) {
            return self.execute(run, seq, queued);
        }
        Attempt::Done(Outcome::refused(format!(
            "operation {seq} of training run {run} was running {} times when the server died, perhaps for want of memory, and is not tried again: send less data at once",
            MAX_RETRIES + 1
        )))
    }

    /// Throws a base model away whose state cannot be trusted; its samples start anew.
    fn discard_base_of(&mut self, run: &TrainingRunId) {
        let Ok(row) = self.core.catalog.run(run) else {
            return;
        };
        self.runs.retain(|_, active| active.base != row.base_model);
        if let Some(base) = self.bases.remove(&row.base_model) {
            let samples = base.sampling.requests();
            // Its memory is for the one that takes its place.
            drop(base);
            for id in samples {
                self.admit(&id);
            }
        }
    }

    /// Ends what waits in vain, frees what nobody uses, removes what is old.
    fn sweep(&mut self) {
        self.end_waits();
        self.free_idle();
        self.note_held();
        self.core.take_up_left_out();
        self.core.futures.leave_to_log(RESULTS_IN_MEMORY);
        self.core.completions.drop_idle(COMPLETIONS_IN_MEMORY);
        self.core.close_settled_journals();
        self.core.forget_unused_futures(FUTURES_IN_MEMORY);
        self.core.discard_expired();
        self.core.discard_stale_samplers();
        self.core.discard_stale_uploads();
        self.core.discard_stale_images();
        if let Err(error) = self.core.accounts.flush() {
            tracing::warn!(error = error.with_causes(), "cannot write the counters");
        }
        if let Err(error) = self.core.catalog.flush_times() {
            tracing::warn!(error = error.with_causes(), "cannot write last-used times");
        }
    }

    fn save_all(&mut self) {
        let runs: Vec<TrainingRunId> = self.runs.keys().cloned().collect();
        for run in runs {
            if let Err(error) = self.snapshot(&run) {
                tracing::error!(run.id = %run, error = error.with_causes(), "cannot save a snapshot; the log has everything");
            }
        }
    }
}

/// The result of what a panic cut short.
fn engine_failed() -> Outcome {
    Outcome::failed(
        ErrorCategory::Server,
        "the engine failed; see the server's log",
    )
}
