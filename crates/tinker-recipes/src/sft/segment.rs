//! The part of a run that one training run on the server carries: where it began, what a process
//! that was killed did in it, and its end.
//!
//! While a segment is under way, the run folder holds its ledger and this record of it. A process
//! that finds both makes the same calls again; the ledger answers those that the server has.

use serde::{Deserialize, Serialize};
use tinker_runs::MetricsRow;
use tinker_types::TinkerPath;

/// A segment, as the run folder has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Segment {
    /// The checkpoint it began from; none if from the run's start.
    pub(super) from: Option<TinkerPath>,
    /// Its first step.
    pub(super) first_step: u64,
    /// Steps before which a checkpoint was saved that is not due there: for a stop.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) stops: Vec<u64>,
    /// Its first step that no process has recorded.
    #[serde(skip)]
    pub(super) first_unrecorded: u64,
}

impl Segment {
    /// One that begins at `first_step`.
    pub(super) fn new(from: Option<TinkerPath>, first_step: u64) -> Self {
        Self {
            from,
            first_step,
            stops: Vec::new(),
            first_unrecorded: first_step,
        }
    }

    /// One that an earlier process began, and of which `rows` are recorded, in step order.
    pub(super) fn rejoined(mut self, rows: &[MetricsRow], n_steps: u64) -> Self {
        let mut next = self.first_step;
        for row in rows {
            if row.step() == next && next < n_steps {
                next += 1;
            }
        }
        self.first_unrecorded = next;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_on_after_the_last_recorded_step_of_its_own() {
        let check = |first_step: u64, steps: &[u64], expected: u64| {
            let rows: Vec<_> = steps.iter().map(|step| MetricsRow::new(*step)).collect();
            let segment = Segment::new(None, first_step).rejoined(&rows, 6);
            assert_eq!(segment.first_unrecorded, expected, "{steps:?}");
        };

        check(0, &[], 0);
        check(0, &[0, 1], 2);
        check(2, &[0, 1], 2);
        check(2, &[0, 1, 2], 3);
        // The row of step 6 is the last evaluation.
        check(2, &[0, 1, 2, 3, 4, 5, 6], 6);
        // A row that a power cut took is awaited again.
        check(0, &[0, 2], 1);
    }
}
