//! What a checkpoint row of this recipe says, and how it is read back.

use tinker_runs::CheckpointRow;
use tinker_types::TinkerPath;

use super::batches::{BatchPlan, Cursor};

/// Name of the last checkpoint of a complete run.
pub(crate) const FINAL: &str = "final";

/// Name of the checkpoint after `step` steps.
pub(crate) fn name_of(step: u64) -> String {
    format!("{step:06}")
}

/// The row of a checkpoint after `next_step` steps. It records the next batch to train, also in
/// the last row, so that a run can be resumed without doing a step twice and extended later.
pub(crate) fn row_of(
    name: String,
    state_path: TinkerPath,
    plan: &BatchPlan,
    next_step: u64,
) -> CheckpointRow {
    let cursor = plan.cursor(next_step);
    CheckpointRow {
        epoch: Some(cursor.epoch),
        batch: Some(cursor.batch),
        state_path: Some(state_path),
        ..CheckpointRow::new(name)
    }
}

/// The step that training goes on with after `row`, if the row says so.
pub(crate) fn next_step(row: &CheckpointRow, plan: &BatchPlan) -> Option<u64> {
    Some(plan.step(Cursor {
        epoch: row.epoch?,
        batch: row.batch?,
    }))
}
