//! Snapshots of training runs: what a restart rebuilds them from.

use std::time::Duration;

use tinker_types::{LoraConfig, TrainingRunId};

use super::Worker;
use super::base::Base;
use super::saves::n_bytes_of;
use crate::bundle::{self, FORMAT_VERSION, Manifest};
use crate::catalog::Run;
use crate::clock::{now, timestamp};
use crate::core::{Core, lock, snapshot_dir, snapshots};
use crate::disk::remove_dir;
use crate::error::Result;

impl Worker {
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
        // A snapshot is always written, and counts.
        let _room = core.quota.take(n_bytes_of(&state, true));
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
        if let Err(error) = drop_older(&core, &dir, &journal) {
            // The snapshot is good; the next one tries again.
            tracing::warn!(run.id = %run, error = error.with_causes(), "cannot drop old snapshots");
        }
        Ok(())
    }
}

/// Keeps the two newest snapshots, and the log from the older of them on: should the newest turn out
/// to be unreadable, the run can still be rebuilt.
fn drop_older(
    core: &Core,
    dir: &std::path::Path,
    journal: &std::sync::Mutex<crate::journal::Journal>,
) -> Result<()> {
    let all = snapshots(dir)?;
    let [older @ .., previous, _newest] = &all[..] else {
        return Ok(());
    };
    for seq in older {
        remove_dir(&core.move_to_trash(&snapshot_dir(dir, *seq))?)?;
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
        copied_from: None,
        log_segment: None,
        precision: base.backend.info().precision.clone(),
        server_version: version.to_owned(),
        created_at: timestamp(now()),
        files: Default::default(),
    }
}
