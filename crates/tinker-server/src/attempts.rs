//! Which operations are being tried again after the process died while they ran.
//!
//! An operation is in the log before it runs, so one that takes the process down (by its need for
//! memory, say) would do so at every start. Only operations that a start found unfinished are
//! counted: the first attempt costs no write.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

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
}

impl Attempts {
    /// Reads the counts of earlier processes; without a readable file there are none.
    pub(crate) fn open(disk: Arc<dyn Disk>, path: PathBuf) -> Self {
        let retries = std::fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self {
            disk,
            path,
            retries,
            found_unfinished: HashSet::new(),
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

    /// A disk that refuses costs the count, not the operation.
    fn save(&self) {
        let saved = serde_json::to_vec(&self.retries)
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
