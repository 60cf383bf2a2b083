//! Going on with a run whose server lost its model, from the newest checkpoint that can be used.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tinker_http::ErrorKind;
use tinker_http::machine::Backoff;
use tinker_types::{Checkpoint, CheckpointKind, ErrorCategory, TinkerPath, TrainingRunId};

use crate::error::{Error, Result};
use crate::ledger::LedgerError;
use crate::options::StateOptions;
use crate::service_client::ServiceClient;
use crate::training_client::TrainingClient;

/// How often a run is restarted.
#[derive(Debug, Clone, PartialEq)]
pub struct RecoveryPolicy {
    /// Most restarts in a row that brought no newer checkpoint. Default 3: a model that is lost
    /// again and again at the same place is not lost by accident.
    pub max_restarts: u32,
    /// Pauses before restarts in a row. Default 1 s doubling to 1 minute.
    pub backoff: Backoff,
}

impl Default for RecoveryPolicy {
    fn default() -> Self {
        Self {
            max_restarts: 3,
            backoff: Backoff {
                base_delay: Duration::from_secs(1),
                max_delay: Duration::from_secs(60),
                jitter: 0.0,
            },
        }
    }
}

/// What happens to a run that is being recovered.
#[derive(Debug)]
#[non_exhaustive]
pub enum RecoveryEvent<'a> {
    /// The server does not have the model any more.
    Lost {
        /// The training run.
        run: &'a TrainingRunId,
        /// How it was noticed.
        error: &'a Error,
    },
    /// A checkpoint cannot be loaded; an older one is tried.
    Unusable {
        /// The checkpoint.
        checkpoint: &'a TinkerPath,
        /// Why.
        error: &'a Error,
    },
    /// The run goes on as another one.
    Restarted {
        /// The new training run.
        run: &'a TrainingRunId,
        /// What it goes on from.
        checkpoint: &'a TinkerPath,
        /// Restarts in a row without a newer checkpoint, this one included.
        n_in_a_row: u32,
    },
    /// There is no checkpoint to go on from, or there were too many restarts.
    GaveUp {
        /// Restarts in all.
        n_restarts: u32,
    },
}

/// Where a run begins, or goes on.
#[derive(Debug)]
pub struct Start {
    /// The service, with the session that the run is in: for its samplers.
    pub service: ServiceClient,
    /// The run.
    pub trainer: TrainingClient,
    /// The checkpoint it goes on from, weights and optimizer; none when it begins.
    pub checkpoint: Option<TinkerPath>,
}

type Observer = dyn Fn(&RecoveryEvent<'_>) + Send + Sync;

/// Runs a training program and, when the server loses its model, runs it again from the newest
/// checkpoint that still can be loaded with its optimizer.
///
/// A model is lost when its session expired, the server lost its data, or its weights are corrupt;
/// a server that is merely away is waited for by the clients themselves.
#[derive(Clone)]
pub struct Recovery {
    service: ServiceClient,
    policy: RecoveryPolicy,
    observer: Option<Arc<Observer>>,
}

impl fmt::Debug for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recovery")
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

impl Recovery {
    /// A recovery of runs of this service.
    #[must_use]
    pub const fn new(service: ServiceClient, policy: RecoveryPolicy) -> Self {
        Self {
            service,
            policy,
            observer: None,
        }
    }

    /// Is told of losses and restarts.
    #[must_use]
    pub fn observer(
        mut self,
        observer: impl Fn(&RecoveryEvent<'_>) + Send + Sync + 'static,
    ) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Runs `train` on the run that `begin` creates, and again on a new run from the newest usable
    /// checkpoint whenever the server loses the model. `train` is told which checkpoint that is, and
    /// goes on with the data that follows it.
    ///
    /// Every restart opens a new session, since the end of the old one is what most often takes a
    /// model away.
    ///
    /// Endpoints: `POST /api/v1/get_info`, `GET /api/v1/training_runs/{id}`,
    /// `GET /api/v1/training_runs/{id}/checkpoints`, `POST /api/v1/load_weights`.
    ///
    /// # Errors
    /// Those of `begin` and `train` that are not the loss of a model; the loss itself if there is
    /// no checkpoint to go on from, or after [`RecoveryPolicy::max_restarts`] in a row.
    pub async fn run<T, Beginning, Training>(
        &self,
        begin: impl FnOnce(ServiceClient) -> Beginning,
        mut train: impl FnMut(Start) -> Training,
    ) -> Result<T>
    where
        Beginning: Future<Output = Result<TrainingClient>>,
        Training: Future<Output = Result<T>>,
    {
        let mut tally = Tally::default();
        let mut run = None;
        let mut outcome = match Box::pin(begin(self.service.clone())).await {
            Ok(trainer) => {
                run = Some(trainer.training_run_id().clone());
                let service = self.service.clone();
                let checkpoint = None;
                Box::pin(train(Start {
                    service,
                    trainer,
                    checkpoint,
                }))
                .await
            }
            Err(error) => Err(error),
        };
        loop {
            let error = match outcome {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let Some(lost) = self.lost_run(run.take(), &error).await else {
                return Err(error);
            };
            self.tell(&RecoveryEvent::Lost {
                run: &lost,
                error: &error,
            });
            let Some(start) = Box::pin(self.restart(&lost, &mut tally)).await? else {
                let n_restarts = tally.n_restarts;
                self.tell(&RecoveryEvent::GaveUp { n_restarts });
                return Err(error);
            };
            run = Some(start.trainer.training_run_id().clone());
            outcome = Box::pin(train(start)).await;
        }
    }

    /// The run whose model is lost, if that is what the error comes from.
    async fn lost_run(&self, run: Option<TrainingRunId>, error: &Error) -> Option<TrainingRunId> {
        if let Error::Ledger(LedgerError::ServerDiffers { run, .. }) = error {
            return Some(run.clone());
        }
        let run = run?;
        let is_sign = match error {
            Error::Stopped(_) | Error::RequestFailed { .. } => true,
            // A refused request may be one of a model whose files are damaged; some servers speak of
            // a model that is gone as of an endpoint that they lack.
            error => matches!(
                error.kind(),
                Some(
                    ErrorKind::NotFound
                        | ErrorKind::Expired
                        | ErrorKind::InvalidRequest
                        | ErrorKind::Unsupported
                )
            ),
        };
        (is_sign && self.is_lost(&run).await).then_some(run)
    }

    /// Asks the server. One that does not answer has not lost anything, as far as is known.
    async fn is_lost(&self, run: &TrainingRunId) -> bool {
        let is_gone =
            |error: &Error| matches!(error.kind(), Some(ErrorKind::NotFound | ErrorKind::Expired));
        // Every server can describe a run: a 404 is about the run, in whatever words.
        if let Err(Error::Transport(error)) = self.service.describe(run).await
            && matches!(error.status(), Some(404 | 410))
        {
            return true;
        }
        match self.service.rest_client().get_training_run(run).await {
            Ok(run) => run.corrupted,
            Err(error) => is_gone(&error),
        }
    }

    async fn restart(&self, lost: &TrainingRunId, tally: &mut Tally) -> Result<Option<Start>> {
        tally.add(self.listed(lost).await?);
        while let Some(checkpoint) = tally.newest() {
            if tally.n_in_a_row >= self.policy.max_restarts {
                return Ok(None);
            }
            let pause = self.policy.backoff.delay(tally.n_in_a_row, 0.0);
            self.service.sleep(pause).await;
            let service = self.service.with_new_session();
            let options = StateOptions::default();
            let loaded = service
                .create_training_client_from_state_with_optimizer(&checkpoint, options)
                .await;
            match loaded {
                Ok(trainer) => {
                    tally.restarted();
                    self.tell(&RecoveryEvent::Restarted {
                        run: trainer.training_run_id(),
                        checkpoint: &checkpoint,
                        n_in_a_row: tally.n_in_a_row,
                    });
                    let checkpoint = Some(checkpoint);
                    return Ok(Some(Start {
                        service,
                        trainer,
                        checkpoint,
                    }));
                }
                Err(error) if is_about_the_checkpoint(&error) => {
                    let checkpoint = &checkpoint;
                    self.tell(&RecoveryEvent::Unusable {
                        checkpoint,
                        error: &error,
                    });
                    tally.drop_newest();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The run's checkpoints to train on from, newest first; none if the server forgot the run.
    async fn listed(&self, run: &TrainingRunId) -> Result<Vec<TinkerPath>> {
        let mut checkpoints = match self.service.rest_client().list_checkpoints(run).await {
            Ok(checkpoints) => checkpoints,
            Err(error) if matches!(error.kind(), Some(ErrorKind::NotFound)) => Vec::new(),
            Err(error) => return Err(error),
        };
        checkpoints.retain(|checkpoint| checkpoint.checkpoint_type == CheckpointKind::Training);
        // Times are of one form, so they sort as text.
        checkpoints.sort_by(|a: &Checkpoint, b| b.time.cmp(&a.time));
        Ok(checkpoints.into_iter().map(|c| c.tinker_path).collect())
    }

    fn tell(&self, event: &RecoveryEvent<'_>) {
        tracing::info!(?event, "recovery of a training run");
        if let Some(observer) = &self.observer {
            observer(event);
        }
    }
}

/// Whether the server says that this checkpoint is at fault: an older one may do.
fn is_about_the_checkpoint(error: &Error) -> bool {
    match error {
        Error::RequestFailed { category, .. } => *category == ErrorCategory::User,
        error => matches!(
            error.kind(),
            Some(ErrorKind::NotFound | ErrorKind::Expired | ErrorKind::InvalidRequest)
        ),
    }
}

/// The checkpoints to go on from, and how often that was done.
#[derive(Debug, Default)]
struct Tally {
    /// Newest first.
    checkpoints: VecDeque<TinkerPath>,
    n_restarts: u32,
    /// Without a newer checkpoint in between.
    n_in_a_row: u32,
}

impl Tally {
    /// Adds the checkpoints of a run that went on from the newest one known: they are newer.
    fn add(&mut self, newest_first: Vec<TinkerPath>) {
        for path in newest_first.into_iter().rev() {
            if !self.checkpoints.contains(&path) {
                self.checkpoints.push_front(path);
                self.n_in_a_row = 0;
            }
        }
    }

    fn newest(&self) -> Option<TinkerPath> {
        self.checkpoints.front().cloned()
    }

    fn drop_newest(&mut self) {
        self.checkpoints.pop_front();
    }

    fn restarted(&mut self) {
        self.n_restarts += 1;
        self.n_in_a_row += 1;
    }
}
