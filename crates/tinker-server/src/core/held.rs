//! What a passing fault keeps from running, for those who ask.

use std::collections::HashMap;
use std::sync::MutexGuard;

use tinker_types::{RequestId, TrainingRunId};

use super::{Core, lock};

/// Why an operation does not run for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) seq: u64,
    /// The fault with its path.
    pub(crate) fault: String,
}

impl Core {
    /// Notes that an operation is held back. True: it was not before, or by another fault.
    pub(crate) fn hold_back(&self, run: &TrainingRunId, held: Held) -> bool {
        let before = lock(&self.held).insert(run.clone(), held.clone());
        before.as_ref() != Some(&held)
    }

    /// Notes that a run goes on.
    pub(crate) fn let_go(&self, run: &TrainingRunId) {
        lock(&self.held).remove(run);
    }

    /// The samples that a passing fault keeps from starting, with the fault.
    pub(crate) fn held_samples(&self) -> MutexGuard<'_, HashMap<RequestId, String>> {
        lock(&self.held_samples)
    }

    /// Says which fault holds a future back, one of its own operation or of one before it.
    pub(crate) fn held_by_fault(&self, id: &RequestId) -> Option<String> {
        if let Some(fault) = self.held_samples().get(id) {
            return Some(format!(
                "the sample is tried again until this passes: {fault}"
            ));
        }
        let Held { seq, fault } = self.held_operation(id)?;
        Some(format!(
            "operation {seq} of this run is tried again until this passes: {fault}"
        ))
    }

    fn held_operation(&self, id: &RequestId) -> Option<Held> {
        let held = lock(&self.held);
        if held.is_empty() {
            return None;
        }
        let (run, seq) = id.as_str().rsplit_once(":op:")?;
        let (run, seq): (TrainingRunId, u64) = (run.parse().ok()?, seq.parse().ok()?);
        held.get(&run).filter(|held| held.seq <= seq).cloned()
    }
}
