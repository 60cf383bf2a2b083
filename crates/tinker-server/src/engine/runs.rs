//! Training runs on the engine: bringing them into memory, executing their operations, snapshots.

use std::time::{Duration, Instant};

use prost::Message as _;
use tinker_engine::{AdamW, AdapterId, LoraSpec};
use tinker_types::{
    AdamParams, CheckpointKind, CreateModelRequest, CreateModelResponse, ForwardBackwardRequest,
    LoadWeightsRequest, LoadWeightsResponse, LoraConfig, OptimStepRequest, OptimStepResponse,
    TrainingRunId, UnloadModelResponse, proto,
};

use super::base::Base;
use super::{Attempt, Queued, Worker};
use crate::bundle::{self, FORMAT_VERSION, Manifest};
use crate::catalog::Run;
use crate::clock::{Millis, millis, now, timestamp};
use crate::core::{lock, newest_snapshot, snapshot_dir, snapshots};
use crate::disk::remove_dir;
use crate::error::{Error, Result};
use crate::loss_inputs;
use crate::operation::{Form, Operation, Outcome};
use crate::segment_log::MAX_BODY;

/// A run whose adapter is in memory.
#[derive(Debug)]
pub(super) struct ActiveRun {
    pub(super) base: String,
    pub(super) adapter: AdapterId,
    pub(super) spec: LoraSpec,
    /// The last operation that is part of the adapter.
    applied: u64,
    /// Operations and engine time since the last snapshot: what a restart has to repeat.
    ops_since: u64,
    time_since: Duration,
    pub(super) last_used: Instant,
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
            active.last_used = Instant::now();
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
        match self.perform(run, seq, queued, operation) {
            Ok(outcome) => Attempt::Done(outcome),
            // The fault is the operation's own, a save on a full disk, say.
            Err(error) if self.runs.contains_key(run) => Attempt::Done(error.into()),
            // The run did not come into memory, so nothing was done.
            Err(error) => error.into(),
        }
    }

    fn perform(
        &mut self,
        run: &TrainingRunId,
        seq: u64,
        queued: &Queued,
        operation: &Operation,
    ) -> Result<Outcome> {
        match operation {
            Operation::CreateModel(request) => self.create(run, request),
            Operation::CreateFromWeights(request) => self.create_from_weights(run, request),
            Operation::ForwardBackward(request) => self.forward_backward(run, request),
            Operation::OptimStep(request) => self.optim_step(run, request),
            Operation::LoadWeights(request) => self.load_weights(run, request),
            Operation::SaveWeights(request) => self.save_weights(run, seq, queued, request),
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

    // Bringing runs into memory

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

    /// Brings a run into memory, whole or not at all.
    fn activate(&mut self, run: &TrainingRunId) -> Result<()> {
        self.rebuild(run).inspect_err(|_| self.free(run))
    }

    /// Rebuilds a run: the newest snapshot, then the finished operations after it.
    fn rebuild(&mut self, run: &TrainingRunId) -> Result<()> {
        let row = self.usable(run)?;
        let dir = self.core.paths.snapshots(run);
        let newest = newest_snapshot(self.core.disk.as_ref(), &dir)?;
        let rebuilt = self.rebuild_from(run, &row, newest.found);
        // Without the snapshot that cannot be read for now, the run may only seem to be lost.
        rebuilt.map_err(|error| newest.passed_over.unwrap_or(error))
    }

    fn rebuild_from(
        &mut self,
        run: &TrainingRunId,
        row: &Run,
        snapshot: Option<(Manifest, tinker_engine::AdapterState)>,
    ) -> Result<()> {
        let journal = self.core.journal(run)?;
        let first = match snapshot {
            Some((manifest, state)) => {
                let adapter = self.base(&row.base_model)?.import(&manifest, &state)?;
                self.insert(run, row, adapter, state.spec, manifest.seq_id);
                manifest.seq_id + 1
            }
            None => 0,
        };
        let history = lock(&journal).found();
        let after = history.into_iter().filter(|f| f.seq >= first);
        for (next, found) in (first..).zip(after) {
            let Some(form) = found.finished else { break };
            if found.seq != next {
                return Err(self.lost(run, next));
            }
            if form != Form::Failed {
                if !self.runs.contains_key(run) && !found.kind.creates_run() {
                    return Err(self.lost(run, 0));
                }
                let body = lock(&journal).body(&found.request_id)?;
                self.repeat(run, &found, &body)?;
            }
            if let Some(active) = self.runs.get_mut(run) {
                active.applied = found.seq;
                active.ops_since += 1;
            }
        }
        if self.runs.contains_key(run) {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "training run {run} could not be created: its first request failed"
        )))
    }

    /// What is left on disk does not suffice for a run.
    fn lost(&self, run: &TrainingRunId, seq: u64) -> Error {
        Error::Corrupt {
            path: self.core.paths.snapshots(run),
            message: format!(
                "training run {run} has no readable snapshot after operation {seq}, which is no longer in its log: start a new run from its last checkpoint"
            ),
        }
    }

    /// Executes an operation again whose result is known, for its effect on the adapter.
    fn repeat(
        &mut self,
        run: &TrainingRunId,
        found: &crate::journal::Found,
        body: &[u8],
    ) -> Result<()> {
        let operation = Operation::decode(found.kind, body)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        if !operation.changes_adapter() {
            return Ok(());
        }
        if let Operation::LoadWeights(request) | Operation::CreateFromWeights(request) = &operation
        {
            self.check_unchanged(request, found.at)?;
        }
        let queued = Queued {
            request_id: found.request_id.clone(),
            kind: found.kind,
        };
        let outcome = self.perform(run, found.seq, &queued, &operation)?;
        if outcome.is_failure() {
            return Err(Error::Invalid(format!(
                "training run {run} cannot be rebuilt: operation {} does not succeed again",
                found.seq
            )));
        }
        Ok(())
    }

    /// Refuses to load a checkpoint again that was written after it was loaded: it holds other
    /// weights than the run was trained on.
    fn check_unchanged(&self, request: &LoadWeightsRequest, loaded_at: Millis) -> Result<()> {
        let dir = self.core.paths.checkpoint(&request.path);
        let written = bundle::read_manifest(self.core.disk.as_ref(), &dir)?
            .and_then(|m| millis(&m.created_at));
        if written.is_none_or(|at| at <= loaded_at) {
            return Ok(());
        }
        Err(Error::Corrupt {
            path: dir,
            message: format!(
                "{} was overwritten after a training run had loaded it, and the run's own copy cannot be read",
                request.path
            ),
        })
    }

    fn usable(&self, run: &TrainingRunId) -> Result<Run> {
        let row = self.core.catalog.run(run)?;
        match &row.corrupted {
            None => Ok(row),
            Some(why) => Err(Error::Invalid(format!(
                "training run {run} cannot be used: {why}; start a new one from its last checkpoint"
            ))),
        }
    }

    fn insert(
        &mut self,
        run: &TrainingRunId,
        row: &Run,
        adapter: AdapterId,
        spec: LoraSpec,
        applied: u64,
    ) {
        let active = ActiveRun {
            base: row.base_model.clone(),
            adapter,
            spec,
            applied,
            ops_since: 0,
            time_since: Duration::ZERO,
            last_used: Instant::now(),
        };
        self.runs.insert(run.clone(), active);
    }

    /// Saves a run's state and frees its memory.
    pub(super) fn unload(&mut self, run: &TrainingRunId) -> Outcome {
        if let Err(error) = self.snapshot(run) {
            return error.into();
        }
        self.free(run);
        Outcome::json(&UnloadModelResponse {
            model_id: run.clone(),
            tag: Default::default(),
        })
    }

    fn free(&mut self, run: &TrainingRunId) {
        if let Some(active) = self.runs.remove(run)
            && let Some(base) = self.bases.get_mut(&active.base)
        {
            base.backend.drop_adapter(active.adapter);
        }
    }

    // Operations

    fn create(&mut self, run: &TrainingRunId, request: &CreateModelRequest) -> Result<Outcome> {
        let row = self.usable(run)?;
        let spec = lora_spec(run, &row.lora);
        let created = self.base(&row.base_model)?.backend.create_adapter(&spec);
        let adapter = created.inspect_err(|error| {
            self.note_unusable(run, &error.to_string());
        })?;
        self.insert(run, &row, adapter, spec, 0);
        tracing::info!(run.id = %run, base_model = request.base_model, rank = spec.rank, "created a training run");
        Ok(created_run(run))
    }

    /// A run that never came to be stays known, so that its creation can be asked for again.
    fn note_unusable(&self, run: &TrainingRunId, why: &str) {
        if let Err(error) = self.core.catalog.mark_corrupted(run, why) {
            tracing::error!(run.id = %run, error = error.with_causes(), "cannot record a failure");
        }
    }

    fn create_from_weights(
        &mut self,
        run: &TrainingRunId,
        request: &LoadWeightsRequest,
    ) -> Result<Outcome> {
        let row = self.usable(run)?;
        let loaded = self.import(&row, request);
        let (adapter, spec) = loaded.inspect_err(|error| {
            if !(error.is_passing() || matches!(error, Error::Newer { .. })) {
                self.note_unusable(run, &error.to_string());
            }
        })?;
        self.insert(run, &row, adapter, spec, 0);
        Ok(loaded_weights(run, request))
    }

    fn load_weights(
        &mut self,
        run: &TrainingRunId,
        request: &LoadWeightsRequest,
    ) -> Result<Outcome> {
        self.active(run)?;
        let row = self.usable(run)?;
        let (adapter, spec) = self.import(&row, request)?;
        let (base, active) = self.active(run)?;
        base.backend.drop_adapter(active.adapter);
        active.adapter = adapter;
        active.spec = spec;
        Ok(loaded_weights(run, request))
    }

    fn import(&mut self, row: &Run, request: &LoadWeightsRequest) -> Result<(AdapterId, LoraSpec)> {
        let checkpoint = self
            .core
            .catalog
            .checkpoint(&request.path, CheckpointKind::Training)?;
        if checkpoint.base_model != row.base_model {
            return Err(Error::Invalid(format!(
                "{} was trained on {}, not on {}",
                request.path, checkpoint.base_model, row.base_model
            )));
        }
        let dir = self.core.paths.checkpoint(&request.path);
        let (manifest, state) = bundle::read(self.core.disk.as_ref(), &dir, request.optimizer)?;
        let adapter = self.base(&row.base_model)?.import(&manifest, &state)?;
        Ok((adapter, state.spec))
    }

    /// Executes an operation that reads a checkpoint, and saves what it read before anybody is told:
    /// from here on the run no longer needs the checkpoint, which may be overwritten or deleted.
    fn load(
        &mut self,
        run: &TrainingRunId,
        seq: u64,
        queued: &Queued,
        operation: &Operation,
        request: &LoadWeightsRequest,
    ) -> Attempt {
        let loaded = match self.holds_snapshot_of(run, seq) {
            Ok(true) => return Attempt::Done(loaded_weights(run, request)),
            Ok(false) => self.perform(run, seq, queued, operation),
            Err(error) => Err(error),
        };
        match loaded {
            Ok(outcome) => {
                let kept = self.keep_loaded(run, seq);
                Attempt::Done(kept.map_or_else(Outcome::from, |()| outcome))
            }
            // The run changes only once everything is read.
            Err(error) => error.into(),
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
            Err(error) if error.is_passing() => Err(error),
            Err(_) => Ok(false),
        }
    }

    fn forward_backward(
        &mut self,
        run: &TrainingRunId,
        request: &ForwardBackwardRequest,
    ) -> Result<Outcome> {
        let (base, active) = self.active(run)?;
        let sequences = loss_inputs::sequences(request, base.backend.info())?;
        let outputs = if request.forward_only {
            base.backend.forward(Some(active.adapter), &sequences)?
        } else {
            base.backend.forward_backward(active.adapter, &sequences)?
        };
        // A failure must not leave its gradient behind.
        let output = loss_inputs::output(request, outputs).inspect_err(|_| self.free(run))?;
        Ok(Outcome {
            form: Form::OutputProto,
            body: proto::ForwardBackwardOutput::from(&output)
                .encode_to_vec()
                .into(),
        })
    }

    fn optim_step(&mut self, run: &TrainingRunId, request: &OptimStepRequest) -> Result<Outcome> {
        let params = adam_params(request)?;
        let (base, active) = self.active(run)?;
        let report = base.backend.optim_step(active.adapter, &params)?;
        let metrics = [
            ("grad_norm".to_owned(), report.grad_norm),
            ("learning_rate".to_owned(), f64::from(params.learning_rate)),
            ("step".to_owned(), report.step as f64),
        ];
        Ok(Outcome::json(&OptimStepResponse {
            metrics: Some(metrics.into()),
        }))
    }

    // Snapshots

    /// Saves a run's state if it changed since the last snapshot, and drops what it makes needless.
    pub(super) fn snapshot(&mut self, run: &TrainingRunId) -> Result<()> {
        let core = std::sync::Arc::clone(&self.core);
        let Some(active) = self.runs.get_mut(run) else {
            return Ok(());
        };
        if active.ops_since == 0 {
            return Ok(());
        }
        let row = core.catalog.run(run)?;
        let Some(base) = self.bases.get(&active.base) else {
            return Ok(());
        };
        let state = base.backend.export_adapter(active.adapter)?;
        let journal = core.journal(run)?;
        let segment = lock(&journal).rotate()?;
        let manifest = Manifest {
            seq_id: active.applied,
            log_segment: Some(segment),
            ..manifest("snapshot", run, &row, &state, base, &core.version)
        };
        let dir = core.paths.snapshots(run);
        let target = snapshot_dir(&dir, active.applied);
        bundle::write(
            core.disk.as_ref(),
            &core.paths.temp(),
            &target,
            manifest,
            &state,
            true,
            true,
        )?;
        active.ops_since = 0;
        active.time_since = Duration::ZERO;
        if let Err(error) = drop_older(&dir, &journal) {
            // The snapshot is good; the next one tries again.
            tracing::warn!(run.id = %run, error = error.with_causes(), "cannot drop old snapshots");
        }
        Ok(())
    }
}

/// Keeps the two newest snapshots, and the log from the older of them on: should the newest turn out
/// to be unreadable, the run can still be rebuilt.
fn drop_older(
    dir: &std::path::Path,
    journal: &std::sync::Mutex<crate::journal::Journal>,
) -> Result<()> {
    let all = snapshots(dir)?;
    let [older @ .., previous, _newest] = &all[..] else {
        return Ok(());
    };
    for seq in older {
        remove_dir(&snapshot_dir(dir, *seq))?;
    }
    let mut journal = lock(journal);
    journal.raise_floor(*previous);
    journal.prune(*previous)
}

/// A manifest for the state of a run as it is now.
pub(super) fn manifest(
    kind: &str,
    run: &TrainingRunId,
    row: &Run,
    state: &tinker_engine::AdapterState,
    base: &Base,
    version: &str,
) -> Manifest {
    Manifest {
        format_version: FORMAT_VERSION,
        kind: kind.to_owned(),
        path: None,
        run: run.clone(),
        base_model: row.base_model.clone(),
        base_revision: base.revision.clone(),
        lora: LoraConfig {
            rank: state.spec.rank as u32,
            seed: Some(state.spec.seed),
            train_unembed: state.spec.train_unembed,
            train_mlp: state.spec.train_mlp,
            train_attn: state.spec.train_attn,
        },
        seed: state.spec.seed,
        step: state.step,
        seq_id: 0,
        request_id: None,
        log_segment: None,
        precision: base.backend.info().precision.clone(),
        server_version: version.to_owned(),
        created_at: timestamp(now()),
        files: Default::default(),
    }
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

fn adam_params(request: &OptimStepRequest) -> Result<AdamW> {
    let params = match (&request.adam_params, &request.optimizer_params) {
        (Some(params), None) => *params,
        (None, Some(value)) => tagged_params(value)?,
        _ => {
            return Err(Error::Invalid(
                "optim_step takes exactly one of adam_params and optimizer_params".into(),
            ));
        }
    };
    let fields = [
        (
            "learning_rate",
            params.learning_rate,
            params.learning_rate >= 0.0,
            "at least 0",
        ),
        (
            "beta1",
            params.beta1,
            (0.0..1.0).contains(&params.beta1),
            "in [0, 1)",
        ),
        (
            "beta2",
            params.beta2,
            (0.0..1.0).contains(&params.beta2),
            "in [0, 1)",
        ),
        ("eps", params.eps, params.eps > 0.0, "above 0"),
        (
            "weight_decay",
            params.weight_decay,
            params.weight_decay >= 0.0,
            "at least 0",
        ),
        (
            "grad_clip_norm",
            params.grad_clip_norm,
            params.grad_clip_norm >= 0.0,
            "at least 0",
        ),
    ];
    for (name, value, fits, range) in fields {
        if !fits || !(value as f32).is_finite() {
            return Err(Error::Invalid(format!(
                "{name} {value} must be finite and {range}"
            )));
        }
    }
    Ok(AdamW {
        learning_rate: params.learning_rate as f32,
        beta1: params.beta1 as f32,
        beta2: params.beta2 as f32,
        eps: params.eps as f32,
        weight_decay: params.weight_decay as f32,
        grad_clip_norm: params.grad_clip_norm as f32,
    })
}

fn tagged_params(value: &serde_json::Value) -> Result<AdamParams> {
    match value["type"].as_str() {
        Some("adamw" | "adam") => serde_json::from_value(value.clone())
            .map_err(|error| Error::Invalid(format!("optimizer_params: {error}"))),
        other => Err(Error::Invalid(format!(
            "optimizer {} is not supported by this server: it has adamw",
            other.unwrap_or("without a type")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(json: &str) -> OptimStepRequest {
        serde_json::from_str(&format!(r#"{{"model_id":"r","seq_id":1,{json}}}"#)).unwrap()
    }

    #[test]
    fn takes_adamw_in_either_form() {
        let direct = adam_params(&request(r#""adam_params":{"learning_rate":0.5}"#)).unwrap();
        let tagged = adam_params(&request(
            r#""optimizer_params":{"type":"adamw","learning_rate":0.5}"#,
        ))
        .unwrap();

        assert_eq!(direct, tagged);
        assert_eq!((direct.learning_rate, direct.beta2), (0.5, 0.95));
    }

    #[test]
    fn refuses_other_optimizers_and_values_out_of_range() {
        let refusal = |json| adam_params(&request(json)).unwrap_err().to_string();

        assert_eq!(
            refusal(r#""optimizer_params":{"type":"dimuon","learning_rate":0.5}"#),
            "optimizer dimuon is not supported by this server: it has adamw"
        );
        assert_eq!(
            refusal(r#""adam_params":{"beta1":1.0}"#),
            "beta1 1 must be finite and in [0, 1)"
        );
        assert_eq!(
            refusal(r#""adam_params":{"learning_rate":-1}"#),
            "learning_rate -1 must be finite and at least 0"
        );
        assert!(refusal(r#""ttl":1"#).contains("exactly one of"));
    }

    #[test]
    fn derived_seeds_depend_on_every_part() {
        assert_eq!(derived_seed(&["a", "b"]), derived_seed(&["a", "b"]));
        assert_ne!(derived_seed(&["a", "b"]), derived_seed(&["ab", ""]));
    }
}
