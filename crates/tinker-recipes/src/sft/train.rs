//! The training loop: pipelined by one step, interruptible, and resumable to the same result.
//!
//! Step `n + 1` is submitted before step `n` is awaited, so the server never waits for us. What
//! the server executes is the order of submission alone: evaluation of the weights so far, forward
//! and backward, optimizer step, checkpoint. A resumed run submits the same: from the start of what
//! the ledger has, where it only finds out what it was answered, or from a checkpoint on.

use std::fmt;

use tinker_runs::{CheckpointRow, RunWriter};
use tinker_types::{FinishReason, ForwardBackwardOutput, OptimStepResponse, TinkerPath};

use super::batches::BatchPlan;
use super::checkpoints::{FINAL, name_of, row_of};
use super::config::SftConfig;
use super::datum::Example;
use super::evaluate::mean_nll;
use super::goodbye::Goodbye;
use super::observe::{Event, Observer, StepReport};
use super::prepare::Prepared;
use super::segment::Segment;
use super::step_metrics::{TEST_NLL, final_row, step_row};
use super::stop::StopSignal;
use crate::clock::Stopwatch;
use crate::error::{Error, Result};
use crate::trainer::{Pending, Service, Trainer, TrainerSpec};

/// Everything a run needs.
pub struct SftJob<'a> {
    /// Every setting.
    pub config: &'a SftConfig,
    /// The data.
    pub prepared: &'a Prepared,
    /// Where to train.
    pub service: &'a dyn Service,
    /// The run folder.
    pub writer: &'a mut RunWriter,
    /// Who watches.
    pub observer: &'a mut dyn Observer,
    /// How to interrupt it.
    pub stop: StopSignal,
    /// What is to be said when it has ended, however it did.
    pub goodbye: Goodbye,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// As planned.
    Finished {
        /// Optimizer steps in all.
        n_steps: u64,
        /// Weights and optimizer, to train on from.
        state: TinkerPath,
        /// Weights to sample from.
        sampler: TinkerPath,
        /// Held-out mean negative log-likelihood before the first step, if rows were held out.
        first_nll: Option<f64>,
        /// The same after the last step.
        last_nll: Option<f64>,
    },
    /// By request, after a checkpoint; resume the run to go on.
    Interrupted {
        /// The step that a resumed run begins with.
        resume_from: u64,
        /// Optimizer steps in all.
        n_steps: u64,
        /// Weights and optimizer at that step.
        state: TinkerPath,
    },
}

/// Runs `job` from the start, recording it in an empty run folder.
///
/// # Errors
/// A request fails for good, the loss is not finite, or the run folder cannot be written. What was
/// recorded until then can be resumed, unless the service refuses to begin: then nothing is.
pub async fn train(mut job: SftJob<'_>) -> Result<Outcome> {
    job.writer.write_config(job.config)?;
    job.plan();
    let opened = match job.create().await {
        Ok(opened) => opened,
        Err(error) => {
            // A run that can never begin does not take a name.
            if error.is_refusal() {
                job.writer.remove_config()?;
                job.writer.remove_ledger()?;
            }
            return Err(error);
        }
    };
    let segment = Segment::new(None, 0);
    job.writer.write_unfinished(&segment)?;
    Loop::new(job, opened, segment).carry().await
}

impl fmt::Debug for SftJob<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SftJob")
            .field("config", self.config)
            .finish_non_exhaustive()
    }
}

impl SftJob<'_> {
    pub(super) fn batch_plan(&self) -> BatchPlan {
        self.config.batch_plan(self.prepared.counts.n_train_rows)
    }

    /// Says what will be done, and what of it may surprise.
    pub(super) fn plan(&mut self) {
        let (plan, counts) = (self.batch_plan(), self.prepared.counts);
        self.observer.on(Event::Planned {
            config: self.config,
            counts,
            n_steps: plan.n_steps(),
            n_steps_per_epoch: plan.batches_per_epoch(),
        });
        let (n_rows, batch_size) = (counts.n_train_rows, self.config.batch_size);
        let mut notice = |text: String| self.observer.on(Event::Notice(text));
        if n_rows < batch_size {
            notice(format!(
                "fewer training rows ({n_rows}) than the batch size ({batch_size}): each step trains all"
            ));
        }
        if counts.n_test_rows == 0 {
            notice("no rows are held out, so the result is not evaluated".to_owned());
        }
        if counts.n_truncated > 0 {
            let (n, max) = (counts.n_truncated, self.config.max_length);
            notice(format!(
                "{n} rows are longer than {max} tokens and were cut"
            ));
        }
        if counts.n_dropped > 0 {
            let n = counts.n_dropped;
            notice(format!(
                "{n} rows were left out: cutting took all their trained tokens"
            ));
        }
    }

    /// The training run to start.
    pub(super) fn spec(&self) -> TrainerSpec {
        TrainerSpec {
            base_model: self.config.model_name.clone(),
            lora: self.config.lora(),
            weights: self.config.load_checkpoint_path.clone(),
        }
    }

    /// Starts a training run.
    pub(super) async fn create(&self) -> Result<Opened> {
        let service = self.open_service()?;
        match service.create(&self.spec()).await {
            Ok(trainer) => Ok(Opened { service, trainer }),
            Err(error) => {
                self.goodbye.leave(service, FinishReason::Errored);
                Err(failed("creating the training run")(error))
            }
        }
    }

    /// The service with a ledger that has nothing in it, in the place of another.
    pub(super) fn open_service(&self) -> Result<Box<dyn Service>> {
        // In this order: a record without its ledger would be gone on with.
        self.writer.remove_unfinished()?;
        self.writer.remove_ledger()?;
        self.service
            .with_ledger(&self.writer.folder().ledger_path())
            .map_err(failed("beginning the ledger of the run"))
    }
}

/// A training run on the server and the session it lives in.
pub(super) struct Opened {
    pub(super) service: Box<dyn Service>,
    pub(super) trainer: Box<dyn Trainer>,
}

/// A step that was submitted and not yet awaited.
struct InFlight {
    step: u64,
    rows: Vec<usize>,
    test: Option<Pending<'static, ForwardBackwardOutput>>,
    forward_backward: Pending<'static, ForwardBackwardOutput>,
    optim: Pending<'static, OptimStepResponse>,
    save: Option<Pending<'static, TinkerPath>>,
}

/// A checkpoint and the step that follows it.
type SavedAt = (u64, TinkerPath);

/// A run under way.
pub(super) struct Loop<'a> {
    job: SftJob<'a>,
    service: Box<dyn Service>,
    trainer: Box<dyn Trainer>,
    segment: Segment,
    plan: BatchPlan,
    watch: Stopwatch,
    seconds: f64,
}

impl<'a> Loop<'a> {
    pub(super) fn new(job: SftJob<'a>, opened: Opened, segment: Segment) -> Self {
        let plan = job.batch_plan();
        let Opened { service, trainer } = opened;
        Self {
            job,
            service,
            trainer,
            segment,
            plan,
            watch: Stopwatch::start(),
            seconds: 0.0,
        }
    }

    /// Trains the segment to its end, and leaves its session to be ended unless a resumed run can go
    /// on with what the server has.
    pub(super) async fn carry(mut self) -> Result<Outcome> {
        let outcome = self.run().await;
        let reason = match &outcome {
            Ok(Outcome::Finished { .. }) => FinishReason::Success,
            Ok(Outcome::Interrupted { .. }) => FinishReason::Interrupted,
            Err(error) if error.leaves_run_in_place() => return outcome,
            Err(_) => FinishReason::Errored,
        };
        let writer = &self.job.writer;
        let removed = writer
            .remove_unfinished()
            .and_then(|()| writer.remove_ledger());
        self.job.goodbye.leave(self.service, reason);
        let outcome = outcome?;
        removed?;
        Ok(outcome)
    }

    async fn run(&mut self) -> Result<Outcome> {
        let first = self.segment.first_step;
        let mut saved_at = self.segment.from.clone().map(|path| (first, path));
        if self.segment.stops.contains(&first) {
            saved_at = Some(self.save_for_stop(first).await?);
        }
        let mut in_flight: Option<InFlight> = None;
        let mut next = first;
        while next < self.plan.n_steps() && !self.may_stop() {
            let submitted = self.submit(next);
            if let Some(earlier) = in_flight.replace(submitted) {
                saved_at = self.finish(earlier).await?.or(saved_at);
            }
            next += 1;
        }
        let is_done = next == self.plan.n_steps();
        if !is_done {
            self.job.observer.on(Event::Stopping { next_step: next });
        }
        if let Some(last) = in_flight {
            saved_at = self.finish(last).await?.or(saved_at);
        }
        if is_done {
            self.end().await
        } else {
            self.interrupt(next, saved_at).await
        }
    }

    /// Whether to stop: not while steps of an earlier process are submitted again, since the ledger
    /// takes nothing else in their place.
    fn may_stop(&self) -> bool {
        self.job.stop.is_requested() && !self.trainer.is_repeating()
    }

    /// Submits everything that belongs to `step`, in the order the server executes it.
    fn submit(&mut self, step: u64) -> InFlight {
        let config = self.job.config;
        let rows = self.plan.rows(step);
        let is_test_due = step == 0 || is_due(step, config.eval_every);
        let test = if is_test_due {
            self.submit_test()
        } else {
            None
        };
        let data = examples_of(self.job.prepared, &rows)
            .map(|e| e.datum.clone())
            .collect();
        let forward_backward = self.trainer.forward_backward(data);
        let optim = self
            .trainer
            .optim_step(config.adam(step, self.plan.n_steps()));
        let next = step + 1;
        let is_save_due = is_due(next, config.save_every) || self.segment.stops.contains(&next);
        let save = (is_save_due && next < self.plan.n_steps()).then(|| self.submit_save(next));
        InFlight {
            step,
            rows,
            test,
            forward_backward,
            optim,
            save,
        }
    }

    fn submit_test(&mut self) -> Option<Pending<'static, ForwardBackwardOutput>> {
        let test = &self.job.prepared.test;
        let data = || test.iter().map(|example| example.datum.clone()).collect();
        (!test.is_empty()).then(|| self.trainer.forward(data()))
    }

    fn submit_save(&mut self, next: u64) -> Pending<'static, TinkerPath> {
        let ttl_seconds = self.job.config.ttl_seconds;
        self.trainer.save_state(&name_of(next), ttl_seconds)
    }

    /// Awaits and records a step, unless that was done; returns the checkpoint after it, if one was
    /// due.
    async fn finish(&mut self, flight: InFlight) -> Result<Option<SavedAt>> {
        let step = flight.step;
        let save = if step < self.segment.first_unrecorded {
            self.pass_by(flight).await?
        } else {
            self.record_step(flight).await?
        };
        let Some(save) = save else { return Ok(None) };
        let doing = format!("saving the checkpoint after step {step}");
        self.finish_save(save, step + 1, doing).await.map(Some)
    }

    /// Waits until a step that was recorded before is done; returns its save.
    async fn pass_by(&mut self, flight: InFlight) -> Result<Option<Pending<'static, TinkerPath>>> {
        let optim = flight.optim.await;
        optim.map_err(|source| self.failed_at(flight.step, source))?;
        self.watch.lap();
        Ok(flight.save)
    }

    /// Awaits and records a step; returns its save.
    async fn record_step(
        &mut self,
        flight: InFlight,
    ) -> Result<Option<Pending<'static, TinkerPath>>> {
        let step = flight.step;
        let test_nll = match flight.test {
            Some(pending) => Some(self.score_test(pending, step).await?),
            None => None,
        };
        let answer = flight.forward_backward.await;
        let answer = answer.map_err(|source| self.failed_at(step, source))?;
        let examples = examples_of(self.job.prepared, &flight.rows);
        let loss = mean_nll(examples, &answer)?;
        let optim = flight.optim.await;
        let optim = optim.map_err(|source| self.failed_at(step, source))?;
        let report = self.report(step, &flight.rows, loss);
        self.job
            .writer
            .append_metrics(&step_row(&report, optim.metrics.as_ref(), test_nll))?;
        self.job.observer.on(Event::Step(&report));
        if !loss.is_finite() {
            return Err(Error::LossNotFinite {
                step,
                loss,
                learning_rate: report.learning_rate,
            });
        }
        Ok(flight.save)
    }

    /// Awaits a save and records it, unless that was done.
    async fn finish_save(
        &mut self,
        save: Pending<'static, TinkerPath>,
        next: u64,
        doing: String,
    ) -> Result<SavedAt> {
        let path = save.await.map_err(failed(doing))?;
        let rows = self.job.writer.folder().read_checkpoints()?;
        if !rows
            .iter()
            .any(|row| row.state_path.as_ref() == Some(&path))
        {
            self.record(&row_of(name_of(next), path.clone(), &self.plan, next))?;
        }
        Ok((next, path))
    }

    async fn score_test(
        &mut self,
        pending: Pending<'static, ForwardBackwardOutput>,
        step: u64,
    ) -> Result<f64> {
        let answer = pending.await.map_err(|source| {
            let doing = format!("evaluating before step {step}");
            Error::of_request(doing, self.job.config.learning_rate, source)
        })?;
        let nll = mean_nll(&self.job.prepared.test, &answer)?;
        self.job.observer.on(Event::Evaluated { step, nll });
        Ok(nll)
    }

    fn failed_at(&self, step: u64, source: tinker_api::Error) -> Error {
        let doing = format!("training step {step}");
        Error::of_request(doing, self.job.config.learning_rate, source)
    }

    fn report(&mut self, step: u64, rows: &[usize], loss: f64) -> StepReport {
        let n_steps = self.plan.n_steps();
        let seconds = self.watch.lap();
        self.seconds += seconds;
        let n_done = step + 1 - self.segment.first_unrecorded;
        let n_left = n_steps - step - 1;
        let examples = || examples_of(self.job.prepared, rows);
        StepReport {
            step,
            n_steps,
            epoch: self.plan.cursor(step).epoch,
            learning_rate: self.job.config.adam(step, n_steps).learning_rate,
            train_mean_nll: loss,
            n_sequences: examples().count(),
            n_tokens: examples().map(Example::n_tokens).sum(),
            n_trained_tokens: examples().map(Example::n_trained).sum(),
            seconds,
            eta_seconds: self.seconds / n_done as f64 * n_left as f64,
        }
    }

    fn record(&mut self, row: &CheckpointRow) -> Result<()> {
        self.job.writer.append_checkpoint(row)?;
        self.job.observer.on(Event::Saved(row));
        Ok(())
    }

    /// Evaluates and saves the final weights.
    async fn end(&mut self) -> Result<Outcome> {
        let n_steps = self.plan.n_steps();
        let test = self.submit_test();
        let state = self.trainer.save_state(FINAL, None);
        let sampler = self.trainer.save_sampler(FINAL);
        let mut last_nll = None;
        if let Some(pending) = test {
            let nll = self.score_test(pending, n_steps).await?;
            self.job.writer.append_metrics(&final_row(n_steps, nll))?;
            last_nll = Some(nll);
        }
        let state = state.await.map_err(failed("saving the final checkpoint"))?;
        let sampler = sampler
            .await
            .map_err(failed("saving the final sampler weights"))?;
        let mut row = row_of(FINAL.to_owned(), state.clone(), &self.plan, n_steps);
        row.sampler_path = Some(sampler.clone());
        row.is_final = true;
        self.record(&row)?;
        let first_nll = self.first_nll()?;
        Ok(Outcome::Finished {
            n_steps,
            state,
            sampler,
            first_nll,
            last_nll,
        })
    }

    /// The evaluation before step 0, which an interrupted run did earlier.
    fn first_nll(&self) -> Result<Option<f64>> {
        let rows = self.job.writer.folder().read_metrics()?;
        Ok(rows
            .first()
            .filter(|row| row.step() == 0)
            .and_then(|row| row.get(TEST_NLL)))
    }

    /// Makes sure that the state before step `next` is in a checkpoint.
    async fn interrupt(&mut self, next: u64, saved_at: Option<SavedAt>) -> Result<Outcome> {
        let (resume_from, state) = match saved_at.filter(|(step, _)| *step == next) {
            Some(saved) => saved,
            None => {
                // A process that is killed now is followed by one that must save here, too.
                self.segment.stops.push(next);
                self.job.writer.write_unfinished(&self.segment)?;
                self.save_for_stop(next).await?
            }
        };
        Ok(Outcome::Interrupted {
            resume_from,
            n_steps: self.plan.n_steps(),
            state,
        })
    }

    async fn save_for_stop(&mut self, next: u64) -> Result<SavedAt> {
        let save = self.submit_save(next);
        let doing = "saving the checkpoint to resume from".to_owned();
        self.finish_save(save, next, doing).await
    }
}

fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step > 0 && step.is_multiple_of(every)
}

fn examples_of<'p>(prepared: &'p Prepared, rows: &'p [usize]) -> impl Iterator<Item = &'p Example> {
    rows.iter()
        .filter_map(|&row| prepared.train.get(row))
        .flatten()
}

/// An adapter for `map_err` that says what was being done.
pub(super) fn failed(doing: impl Into<String>) -> impl FnOnce(tinker_api::Error) -> Error {
    let doing = doing.into();
    move |source| Error::Service { doing, source }
}
