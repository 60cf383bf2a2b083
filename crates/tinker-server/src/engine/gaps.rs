//! What the engine stops waiting for: operations that never arrive, and clients that went away.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tinker_types::TrainingRunId;

use super::Worker;
use crate::catalog::OPEN_FOR;
use crate::core::lock;
use crate::error::{Error, Result};
use crate::operation::{Outcome, run_request_id};

/// How long a run stays in memory whose snapshot could not be written: a full disk is seldom free at once.
const UNLOAD_PAUSE: Duration = Duration::from_secs(5 * 60);

impl Worker {
    /// Ends the wait of operations for earlier ones that did not arrive in time.
    ///
    /// A client that is gone may come back and send them, however late. One that is there would have sent
    /// them long ago, and waits for results that never come.
    pub(super) fn end_waits(&mut self) {
        let core = &self.core;
        let is_there = |run: &TrainingRunId| {
            let row = core.catalog.run(run);
            row.is_ok_and(|row| core.catalog.is_open(&row.session_id))
        };
        let patience = core.limits.gap_patience;
        let now = core.clock.instant();
        for run in self.queue.out_of_patience(now, patience, is_there) {
            if let Err(error) = self.close_gaps(&run) {
                tracing::warn!(run.id = %run, error = error.with_causes(), "cannot give up operations that did not arrive");
            }
        }
    }

    /// Uses up the numbers of the operations that are missing, and fails those that wait for them: their
    /// callers meant them to come after something that was never done. The run itself is as it was.
    fn close_gaps(&mut self, run: &TrainingRunId) -> Result<()> {
        let waited = minutes(self.core.limits.gap_patience);
        let mut missing = None;
        while let Some((seq, is_missing)) = self.queue.next_number(run) {
            let id = run_request_id(run, seq).map_err(|e| Error::Invalid(e.to_string()))?;
            if is_missing {
                missing = Some(seq);
            }
            let outcome = Outcome::refused(match missing {
                Some(first) if first != seq => format!(
                    "operation {seq} of training run {run} was not done: operation {first}, which comes before it, did not arrive within {waited}; make the call again"
                ),
                _ => format!(
                    "operation {seq} of training run {run} came too late: it was waited for {waited}, then those after it failed, and nothing of them was done; make the call again"
                ),
            });
            let journal = self.core.journal(run)?;
            lock(&journal).give_up(&id, seq, outcome.clone())?;
            // One that is missing may have been accepted a moment ago.
            self.core.count_end(&id, &outcome);
            self.core.attempts().end(&id);
            self.queue.pass_over(run);
        }
        Ok(())
    }

    /// Frees the memory of runs and samplers that nobody used for long, or for a shorter while if their
    /// client is gone. Both come back with the next request: a run from the snapshot that is taken here.
    pub(super) fn free_idle(&mut self) {
        let core = &self.core;
        let limit = core.limits.unload_after;
        let now = core.clock.instant();
        let is_gone = |run: &TrainingRunId| {
            let row = core.catalog.run(run);
            row.is_ok_and(|row| !core.catalog.is_open(&row.session_id))
        };
        let idle = self.runs.iter().filter(|(run, active)| {
            let unused = now.saturating_duration_since(active.last_used);
            let is_kept = active.kept_until.is_some_and(|until| now < until);
            !is_kept && !self.queue.has_work(run) && (unused > limit || is_gone(run))
        });
        let idle: Vec<TrainingRunId> = idle.map(|(run, _)| run.clone()).collect();
        let open = core.catalog.open_samplers();
        let open: HashSet<PathBuf> = open.iter().filter_map(|s| core.sampler_dir(s)).collect();
        for run in idle {
            let Err(error) = self.put_away(&run) else {
                continue;
            };
            tracing::warn!(run.id = %run, error = error.with_causes(), "cannot unload an idle training run; it stays in memory for now");
            if let Some(active) = self.runs.get_mut(&run) {
                active.kept_until = Some(now + UNLOAD_PAUSE);
            }
        }
        let closed = limit.min(Duration::from_millis(OPEN_FOR.unsigned_abs()));
        let limit_of = |dir: &Path| if open.contains(dir) { limit } else { closed };
        for base in self.bases.values_mut() {
            base.drop_idle_weights(limit_of);
        }
    }
}

/// A duration as people say it.
fn minutes(duration: Duration) -> String {
    match duration.as_secs() {
        seconds if seconds % 60 == 0 => format!("{} minutes", seconds / 60),
        seconds => format!("{seconds} s"),
    }
}
