//! Bringing a training run back into memory: its newest snapshot, and the operations after it again.

use tinker_types::{LoadWeightsRequest, TrainingRunId};

use super::runs::Turn;
use super::{Queued, Worker};
use crate::bundle::{self, Manifest};
use crate::catalog::Run;
use crate::clock::{Millis, millis};
use crate::core::{lock, newest_snapshot};
use crate::error::{Error, Result};
use crate::operation::{Form, Operation};

impl Worker {
    /// Brings a run into memory, whole or not at all.
    pub(super) fn activate(&mut self, run: &TrainingRunId) -> Result<()> {
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
                let loaded = self.import_adapter(&row.base_model, &manifest, &state)?;
                self.insert(run, row, loaded, state.spec, manifest.seq_id);
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
        let outcome = self.perform(run, found.seq, &queued, &operation, Turn::Again)?;
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
}
