//! Training runs on the engine: what is in memory of them, and the way of an operation through them.

use std::time::{Duration, Instant};

use tinker_engine::{AdapterId, Family, LoraSpec};
use tinker_types::{TrainingRunId, UnloadModelResponse};

use super::base::Base;
use super::optimizers::family;
use super::{Attempt, Queued, Worker};
use crate::catalog::Run;
use crate::core::lock;
use crate::error::{Error, Result};
use crate::memory::Promise;
use crate::operation::{Operation, Outcome};
use crate::segment_log::MAX_BODY;

/// A run whose adapter is in memory.
#[derive(Debug)]
pub(super) struct ActiveRun {
    pub(super) base: String,
    pub(super) adapter: AdapterId,
    /// For the adapter as it will be.
    pub(super) _memory: Promise,
    pub(super) spec: LoraSpec,
    pub(super) family: Family,
    /// The last operation that is part of the adapter.
    pub(super) applied: u64,
    /// Operations and engine time since the last snapshot: what a restart has to repeat.
    pub(super) ops_since: u64,
    pub(super) time_since: Duration,
    pub(super) last_used: Instant,
    /// When it may be unloaded again, after its snapshot failed.
    pub(super) kept_until: Option<Instant>,
}

/// Whether an operation is executed for its result, or again for its effect on the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    First,
    Again,
}

impl Worker {
    /// Executes one operation. Unless it is held back, its number is used up.
    pub(super) fn execute(&mut self, run: &TrainingRunId, seq: u64, queued: &Queued) -> Attempt {
        let started = Instant::now();
        let body = self
            .core
            .journal(run)
            .and_then(|journal| lock(&journal).body(&queued.request_id));
        let attempt = match body.map(|body| Operation::decode(queued.kind, &body)) {
            Ok(Ok(operation)) => self.try_out(run, seq, queued, &operation),
            Ok(Err(malformed)) => Attempt::Done(Outcome::refused(malformed.to_string())),
            Err(error) => error.into(),
        };
        if let Some(active) = self.runs.get_mut(run) {
            active.time_since += started.elapsed();
            active.last_used = self.core.clock.instant();
        }
        match attempt {
            Attempt::Done(outcome) => {
                if outcome.body.len() > MAX_BODY {
                    // It fails, so what it did to the adapter is forgotten with the adapter.
                    self.free(run);
                }
                Attempt::Done(outcome.bounded(MAX_BODY))
            }
            held @ Attempt::Held(_) => held,
        }
    }

    fn try_out(
        &mut self,
        run: &TrainingRunId,
        seq: u64,
        queued: &Queued,
        operation: &Operation,
    ) -> Attempt {
        if let Operation::CreateFromWeights(request) | Operation::LoadWeights(request) = operation {
            return self.load(run, seq, queued, operation, request);
        }
        match self.perform(run, seq, queued, operation, Turn::First) {
            Ok(outcome) => {
                self.count(run, operation, &outcome);
                Attempt::Done(outcome)
            }
            Err(error @ Error::AwaitsMemory { .. }) => Attempt::Held(error),
            // The fault is the operation's own, a save on a full disk, say.
            Err(error) if self.runs.contains_key(run) => Attempt::Done(error.into()),
            // The run did not come into memory, so nothing was done.
            Err(error) => self.left_out(run, queued, error),
        }
    }

    /// What comes of an operation that failed. A run that there is no memory for now comes back when there is:
    /// unlike one that is being made, it has been promised its numbers.
    pub(super) fn left_out(&self, run: &TrainingRunId, queued: &Queued, error: Error) -> Attempt {
        let is_out = !self.runs.contains_key(run) && !queued.kind.creates_run();
        match error {
            Error::NoMemory(_) if is_out => Attempt::Held(error),
            error => error.into(),
        }
    }

    pub(super) fn perform(
        &mut self,
        run: &TrainingRunId,
        seq: u64,
        queued: &Queued,
        operation: &Operation,
        turn: Turn,
    ) -> Result<Outcome> {
        match operation {
            Operation::CreateModel(request) => self.create(run, request, turn),
            Operation::CreateFromWeights(request) => self.create_from_weights(run, request, turn),
            Operation::ForwardBackward(request) => self.forward_backward(run, request, turn),
            Operation::OptimStep(request) => self.optim_step(run, request),
            Operation::ZeroGrad => self.zero_grad(run),
            Operation::GradientStats => self.gradient_stats(run),
            Operation::LoadWeights(request) => self.load_weights(run, request),
            Operation::SaveWeights(request) => self.save_weights(run, seq, queued, request),
            Operation::SaveWeightsExternal(request) => {
                self.save_external(run, seq, queued, request)
            }
            Operation::SaveWeightsForSampler(request) => {
                self.save_for_sampler(run, seq, queued, request)
            }
        }
    }

    /// Counts an operation as part of the adapter, and takes a snapshot when one is due.
    pub(super) fn after_operation(&mut self, run: &TrainingRunId, seq: u64) {
        let limits = self.core.limits;
        let Some(active) = self.runs.get_mut(run) else {
            return;
        };
        active.applied = seq;
        active.ops_since += 1;
        if active.ops_since < limits.snapshot_every
            && active.time_since < limits.snapshot_engine_time
        {
            return;
        }
        if let Err(error) = self.snapshot(run) {
            // The log still has everything; the next operation tries again.
            tracing::warn!(run.id = %run, error = error.with_causes(), "cannot save a snapshot");
        }
    }

    /// The base model and the run, both in memory.
    pub(super) fn active(&mut self, run: &TrainingRunId) -> Result<(&mut Base, &mut ActiveRun)> {
        if !self.runs.contains_key(run) {
            self.activate(run)?;
        }
        let missing = || Error::NotFound(format!("training run {run} is not loaded"));
        let active = self.runs.get_mut(run).ok_or_else(missing)?;
        let base = self.bases.get_mut(&active.base).ok_or_else(missing)?;
        Ok((base, active))
    }

    pub(super) fn usable(&self, run: &TrainingRunId) -> Result<Run> {
        let row = self.core.catalog.run(run)?;
        match &row.corrupted {
            None => Ok(row),
            Some(why) => Err(Error::Invalid(format!(
                "training run {run} cannot be used: {why}; start a new one from its last checkpoint"
            ))),
        }
    }

    pub(super) fn insert(
        &mut self,
        run: &TrainingRunId,
        row: &Run,
        (adapter, memory): (AdapterId, Promise),
        spec: LoraSpec,
        applied: u64,
    ) {
        let active = ActiveRun {
            base: row.base_model.clone(),
            adapter,
            _memory: memory,
            spec,
            // Checked when the run was entered.
            family: family(&row.optimizer).unwrap_or(Family::AdamW),
            applied,
            ops_since: 0,
            time_since: Duration::ZERO,
            last_used: self.core.clock.instant(),
            kept_until: None,
        };
        self.runs.insert(run.clone(), active);
    }

    /// As [`Self::put_away`], for who asked.
    pub(super) fn unload(&mut self, run: &TrainingRunId) -> Outcome {
        if let Err(error) = self.put_away(run) {
            return error.into();
        }
        Outcome::json(&UnloadModelResponse {
            model_id: run.clone(),
            tag: Default::default(),
        })
    }

    /// Saves a run's state and frees its memory.
    pub(super) fn put_away(&mut self, run: &TrainingRunId) -> Result<()> {
        self.snapshot(run)?;
        self.free(run);
        Ok(())
    }

    pub(super) fn free(&mut self, run: &TrainingRunId) {
        if let Some(active) = self.runs.remove(run)
            && let Some(base) = self.bases.get_mut(&active.base)
        {
            base.backend.drop_adapter(active.adapter);
        }
    }
}

/// A seed that depends on nothing but `parts`.
pub(super) fn derived_seed(parts: &[&str]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let mut word = [0; 8];
    hasher.finalize_xof().fill(&mut word);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_seeds_depend_on_every_part() {
        assert_eq!(derived_seed(&["a", "b"]), derived_seed(&["a", "b"]));
        assert_ne!(derived_seed(&["a", "b"]), derived_seed(&["ab", ""]));
    }
}
