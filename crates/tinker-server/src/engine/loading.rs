//! Where the weights of a training run come from: a seed, or a checkpoint.

use tinker_engine::{AdapterId, AdapterState, Family, LoraSpec};
use tinker_types::{
    CheckpointKind, CreateModelRequest, CreateModelResponse, LoadWeightsRequest,
    LoadWeightsResponse, LoraConfig, TrainingRunId,
};

use super::optimizers::family;
use super::runs::{Turn, derived_seed};
use super::{Attempt, Queued, Worker};
use crate::bundle;
use crate::catalog::Run;
use crate::core::{snapshot_dir, snapshots};
use crate::disk::remove_dir;
use crate::error::{Error, Result};
use crate::memory::Promise;
use crate::operation::{Operation, Outcome};

impl Worker {
    pub(super) fn create(
        &mut self,
        run: &TrainingRunId,
        request: &CreateModelRequest,
        turn: Turn,
    ) -> Result<Outcome> {
        let row = self.usable(run)?;
        let spec = lora_spec(run, &row.lora);
        self.base(&row.base_model)?;
        let created = self.promise_for_adapter(&row.base_model, &spec);
        let created = created.and_then(|memory| {
            let adapter = self.base(&row.base_model)?.backend.create_adapter(&spec)?;
            Ok((adapter, memory))
        });
        let created = created.inspect_err(|error| {
            if !error.is_passing() {
                self.note_unusable(run, error, turn);
            }
        })?;
        self.insert(run, &row, created, spec, 0);
        tracing::info!(run.id = %run, base_model = request.base_model, rank = spec.rank, "created a training run");
        Ok(created_run(run))
    }

    /// A run that never came to be stays known, so that its creation can be asked for again. One that there is no
    /// memory for when it is made again came to be once, and does so again when there is.
    fn note_unusable(&self, run: &TrainingRunId, why: &Error, turn: Turn) {
        if turn == Turn::Again && matches!(why, Error::NoMemory(_)) {
            return;
        }
        if let Err(error) = self.core.catalog.mark_corrupted(run, &why.to_string()) {
            tracing::error!(run.id = %run, error = error.with_causes(), "cannot record a failure");
        }
    }

    pub(super) fn create_from_weights(
        &mut self,
        run: &TrainingRunId,
        request: &LoadWeightsRequest,
        turn: Turn,
    ) -> Result<Outcome> {
        let row = self.usable(run)?;
        let loaded = self.import(&row, request);
        let (loaded, spec) = loaded.inspect_err(|error| {
            if !(error.is_passing() || matches!(error, Error::Newer { .. })) {
                self.note_unusable(run, error, turn);
            }
        })?;
        self.insert(run, &row, loaded, spec, 0);
        Ok(loaded_weights(run, request))
    }

    pub(super) fn load_weights(
        &mut self,
        run: &TrainingRunId,
        request: &LoadWeightsRequest,
    ) -> Result<Outcome> {
        self.active(run)?;
        let row = self.usable(run)?;
        let ((adapter, memory), spec) = self.import(&row, request)?;
        let (base, active) = self.active(run)?;
        base.backend.drop_adapter(active.adapter);
        active.adapter = adapter;
        active._memory = memory;
        active.spec = spec;
        Ok(loaded_weights(run, request))
    }

    fn import(
        &mut self,
        row: &Run,
        request: &LoadWeightsRequest,
    ) -> Result<((AdapterId, Promise), LoraSpec)> {
        let core = &self.core;
        // The request named a path that nobody has looked at yet.
        let checkpoint = core.on_behalf_of(&row.session_id, || {
            let kind = CheckpointKind::Training;
            core.catalog.checkpoint(&request.path, kind)
        })?;
        if checkpoint.base_model != row.base_model {
            return Err(Error::Invalid(format!(
                "{} was trained on {}, not on {}",
                request.path, checkpoint.base_model, row.base_model
            )));
        }
        check_optimizer(request)?;
        let dir = self.core.paths.checkpoint(&request.path);
        let (manifest, state) = bundle::read(self.core.disk.as_ref(), &dir, request.optimizer)?;
        if let Some(found) = family_of(&state)
            && found != family(&row.optimizer)?
        {
            return Err(Error::Invalid(format!(
                "{} was trained with optimizer {}, not with {}: load its weights without optimizer",
                request.path,
                found.name(),
                row.optimizer.family
            )));
        }
        let loaded = self.import_adapter(&row.base_model, &manifest, &state)?;
        Ok((loaded, state.spec))
    }

    /// Executes an operation that reads a checkpoint, and saves what it read before anybody is told:
    /// from here on the run no longer needs the checkpoint, which may be overwritten or deleted.
    pub(super) fn load(
        &mut self,
        run: &TrainingRunId,
        seq: u64,
        queued: &Queued,
        operation: &Operation,
        request: &LoadWeightsRequest,
    ) -> Attempt {
        let loaded = match self.holds_snapshot_of(run, seq) {
            Ok(true) => return Attempt::Done(loaded_weights(run, request)),
            Ok(false) => self.perform(run, seq, queued, operation, Turn::First),
            // The run has loaded it, and comes back later.
            Err(error @ Error::NoMemory(_)) => return Attempt::Held(error),
            Err(error) => Err(error),
        };
        match loaded {
            Ok(outcome) => {
                let kept = self.keep_loaded(run, seq);
                Attempt::Done(kept.map_or_else(Outcome::from, |()| outcome))
            }
            // The run changes only once everything is read.
            Err(error) => self.left_out(run, queued, error),
        }
    }

    fn keep_loaded(&mut self, run: &TrainingRunId, seq: u64) -> Result<()> {
        if let Some(active) = self.runs.get_mut(run) {
            active.applied = seq;
            active.ops_since += 1;
        }
        if let Err(error) = self.snapshot(run) {
            // What did not succeed leaves nothing behind.
            self.free(run);
            remove_dir(&snapshot_dir(&self.core.paths.snapshots(run), seq))?;
            return Err(error);
        }
        Ok(())
    }

    /// Whether this very operation is part of a snapshot: a crash came before its result was logged.
    fn holds_snapshot_of(&mut self, run: &TrainingRunId, seq: u64) -> Result<bool> {
        let known = snapshots(&self.core.paths.snapshots(run))?;
        if !known.contains(&seq) {
            return Ok(false);
        }
        match self.active(run) {
            Ok((_, active)) => Ok(active.applied == seq),
            Err(error) if error.is_passing() || matches!(error, Error::NoMemory(_)) => Err(error),
            Err(_) => Ok(false),
        }
    }
}

/// Refuses to load an optimizer's state from a checkpoint that has none.
pub(crate) fn check_optimizer(request: &LoadWeightsRequest) -> Result<()> {
    if request.optimizer && request.path.checkpoint.kind == CheckpointKind::External {
        return Err(Error::Invalid(format!(
            "{} holds weights only: load them without optimizer",
            request.path
        )));
    }
    Ok(())
}

/// The optimizer whose moments a state holds.
fn family_of(state: &AdapterState) -> Option<Family> {
    let (_first, second) = state.moments.values().next()?;
    Some(if second.is_empty() {
        Family::Dimuon
    } else {
        Family::AdamW
    })
}

fn loaded_weights(run: &TrainingRunId, request: &LoadWeightsRequest) -> Outcome {
    Outcome::json(&LoadWeightsResponse {
        path: Some(request.path.clone()),
        model_id: Some(run.clone()),
        tag: Default::default(),
    })
}

fn created_run(run: &TrainingRunId) -> Outcome {
    Outcome::json(&CreateModelResponse {
        model_id: run.clone(),
        tag: Default::default(),
    })
}

/// The adapter of a run; without a seed in the request one is derived from the run's id, so that
/// the run can be rebuilt.
fn lora_spec(run: &TrainingRunId, lora: &LoraConfig) -> LoraSpec {
    LoraSpec {
        rank: lora.rank as usize,
        seed: lora.seed.unwrap_or_else(|| derived_seed(&[run.as_str()])),
        train_attn: lora.train_attn,
        train_mlp: lora.train_mlp,
        train_unembed: lora.train_unembed,
    }
}
