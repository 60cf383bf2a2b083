//! Which operations are being tried again after the process died while they ran.
//!
//! An operation is in the log before it runs, so one that takes the process down (by its need for
//! memory, say) would do so at every start. Only operations that a start found unfinished are
//! counted: the first attempt costs no write. Samples run many at a time, and which of them took the
//! process down is not known; so starts are counted that none of those they found came out of.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tinker_types::RequestId;

use crate::disk::{Disk, write_private};
use crate::error::Error;

/// How often an operation is tried again after the first attempt. Servers are also killed for other
/// reasons, and an operation that was only there when it happened must not fail.
pub(crate) const MAX_RETRIES: u32 = 3;

/// Counts of the operations that a start found unfinished.
#[derive(Debug)]
pub(crate) struct Attempts {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    /// Retries begun so far, of this and earlier processes.
    retries: BTreeMap<RequestId, u32>,
    found_unfinished: HashSet<RequestId>,
    /// Samples that this start found unfinished.
    found_samples: HashSet<RequestId>,
    /// Starts in a row that took samples up, before one of these came to an end.
    sample_starts: u32,
}

/// The file: the counts of operations by id, and one more name.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Counts {
    #[serde(default)]
    samples: u32,
    #[serde(flatten)]
    operations: BTreeMap<RequestId, u32>,
}

impl Attempts {
    /// Reads the counts of earlier processes; without a readable file there are none.
    pub(crate) fn open(disk: Arc<dyn Disk>, path: PathBuf) -> Self {
        let counts: Counts = std::fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self {
            disk,
            path,
            retries: counts.operations,
            found_unfinished: HashSet::new(),
            found_samples: HashSet::new(),
            sample_starts: counts.samples,
        }
    }

    /// Says that an earlier process left an operation unfinished.
    pub(crate) fn note_unfinished(&mut self, id: RequestId) {
        self.found_unfinished.insert(id);
    }

    /// Counts an attempt. False: there were too many, do not try.
    pub(crate) fn begin(&mut self, id: &RequestId) -> bool {
        if !self.found_unfinished.contains(id) {
            return true;
        }
        let n = self.retries.entry(id.clone()).or_default();
        if *n >= MAX_RETRIES {
            return false;
        }
        *n += 1;
        self.save();
        true
    }

    /// Takes back an attempt that came to nothing without taking the process down.
    pub(crate) fn take_back(&mut self, id: &RequestId) {
        if self.found_unfinished.contains(id)
            && let Some(n) = self.retries.get_mut(id)
        {
            *n = n.saturating_sub(1);
            self.save();
        }
    }

    /// Forgets an operation that came to an end.
    pub(crate) fn end(&mut self, id: &RequestId) {
        if self.found_unfinished.remove(id) && self.retries.remove(id).is_some() {
            self.save();
        }
    }

    /// Counts a start that takes these samples up. False: there were too many that none of the samples
    /// survived, do not try.
    pub(crate) fn begin_samples(&mut self, ids: &[RequestId]) -> bool {
        if ids.is_empty() {
            return true;
        }
        self.found_samples.extend(ids.iter().cloned());
        if self.sample_starts >= MAX_RETRIES {
            return false;
        }
        self.sample_starts += 1;
        self.save();
        true
    }

    /// Notes that a sample came to an end, or waits for something that is no fault of its own.
    pub(crate) fn note_sample_over(&mut self, id: &RequestId) {
        if self.found_samples.remove(id) {
            self.take_back_samples();
        }
    }

    /// Takes the count of starts back.
    pub(crate) fn take_back_samples(&mut self) {
        if self.sample_starts > 0 {
            self.sample_starts = 0;
            self.save();
        }
    }

    /// A disk that refuses costs the count, not the operation.
    fn save(&self) {
        let counts = Counts {
            samples: self.sample_starts,
            operations: self.retries.clone(),
        };
        let saved = serde_json::to_vec(&counts)
            .map_err(|e| Error::Invalid(e.to_string()))
            .and_then(|bytes| write_private(self.disk.as_ref(), &self.path, &bytes));
        if let Err(error) = saved {
            tracing::warn!(error = error.with_causes(), "cannot count an attempt");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::OsDisk;

    #[test]
    fn an_operation_that_never_ends_is_given_up_after_a_few_processes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("attempts.json");
        let id: RequestId = "r:op:3".parse().unwrap();
        let other: RequestId = "s:op:1".parse().unwrap();
        let process = || {
            let mut attempts = Attempts::open(Arc::new(OsDisk), path.clone());
            attempts.note_unfinished(id.clone());
            attempts.note_unfinished(other.clone());
            attempts
        };

        for _ in 0..MAX_RETRIES {
            let mut attempts = process();
            assert!(attempts.begin(&other));
            attempts.end(&other);
            assert!(attempts.begin(&id));
        }

        let mut last = process();
        assert!(!last.begin(&id));
        assert!(last.begin(&other));
        last.end(&id);
        assert!(process().begin(&id));
    }

    #[test]
    fn samples_that_nothing_comes_of_are_given_up_after_a_few_processes() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Attempts::open(Arc::new(OsDisk), dir.path().join("attempts.json"));
        let ids: Vec<RequestId> = ["s:op:1", "s:op:2"].map(|id| id.parse().unwrap()).into();
        let new: RequestId = "s:op:3".parse().unwrap();

        for _ in 1..MAX_RETRIES {
            assert!(open().begin_samples(&ids));
        }
        let mut progress = open();
        assert!(progress.begin_samples(&ids));
        progress.note_sample_over(&ids[0]);
        for _ in 0..MAX_RETRIES {
            let mut process = open();
            assert!(process.begin_samples(&ids[1..]));
            // Of a new one nothing follows for those that were found.
            process.note_sample_over(&new);
        }

        let mut last = open();
        assert!(!last.begin_samples(&ids[1..]));
        last.note_sample_over(&ids[1]);
        assert!(open().begin_samples(std::slice::from_ref(&new)));
    }

    #[test]
    fn an_attempt_that_was_taken_back_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("attempts.json");
        let id: RequestId = "r:op:3".parse().unwrap();
        let mut attempts = Attempts::open(Arc::new(OsDisk), path);
        attempts.note_unfinished(id.clone());

        for _ in 0..=MAX_RETRIES {
            assert!(attempts.begin(&id));
            attempts.take_back(&id);
        }

        assert!(attempts.begin(&id));
    }

    #[test]
    fn a_first_attempt_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("attempts.json");
        let mut attempts = Attempts::open(Arc::new(OsDisk), path.clone());

        assert!(attempts.begin(&"r:op:3".parse().unwrap()));

        assert!(!path.exists());
    }
}
