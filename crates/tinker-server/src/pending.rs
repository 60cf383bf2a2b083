//! What was accepted and has no result yet: since when, and whether it is under way.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use tinker_types::RequestId;

use crate::operation::OpKind;

/// An accepted operation without a result.
#[derive(Debug)]
struct Entry {
    kind: OpKind,
    since: Instant,
    is_started: bool,
}

/// How many operations of a kind wait, and how many are under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) n_waiting: usize,
    pub(crate) n_running: usize,
}

/// All operations without a result. The time is the caller's.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    entries: HashMap<RequestId, Entry>,
}

impl Pending {
    /// Notes that an operation was accepted; one that is known keeps its time.
    pub(crate) fn accept(&mut self, id: &RequestId, kind: OpKind, now: Instant) {
        self.entries.entry(id.clone()).or_insert(Entry {
            kind,
            since: now,
            is_started: false,
        });
    }

    /// Notes that an operation is under way, or that it waits again.
    pub(crate) fn set_started(&mut self, id: &RequestId, is_started: bool) {
        if let Some(entry) = self.entries.get_mut(id) {
            entry.is_started = is_started;
        }
    }

    /// Forgets an operation that ended; its kind and how long it took from its acceptance.
    pub(crate) fn end(&mut self, id: &RequestId, now: Instant) -> Option<(OpKind, Duration)> {
        let entry = self.entries.remove(id)?;
        Some((entry.kind, now.saturating_duration_since(entry.since)))
    }

    /// Counts by the names that `name` gives to kinds.
    pub(crate) fn counts(&self, name: fn(OpKind) -> &'static str) -> BTreeMap<&'static str, Count> {
        let mut counts = BTreeMap::<_, Count>::new();
        for entry in self.entries.values() {
            let count = counts.entry(name(entry.kind)).or_default();
            if entry.is_started {
                count.n_running += 1;
            } else {
                count.n_waiting += 1;
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ended_is_counted_no_more() {
        let (mut pending, start) = (Pending::default(), Instant::now());
        let [a, b]: [RequestId; 2] = ["s:op:1", "s:op:2"].map(|id| id.parse().unwrap());
        pending.accept(&a, OpKind::Sample, start);
        pending.accept(&a, OpKind::Sample, start + Duration::from_secs(1));
        pending.accept(&b, OpKind::Sample, start);
        pending.set_started(&b, true);

        let one_each = Count {
            n_waiting: 1,
            n_running: 1,
        };
        assert_eq!(pending.counts(|_| "x"), [("x", one_each)].into());
        let ended = pending.end(&a, start + Duration::from_secs(3));
        assert_eq!(ended, Some((OpKind::Sample, Duration::from_secs(3))));
        assert_eq!(pending.end(&a, start), None);
        pending.end(&b, start);
        assert!(pending.counts(|_| "x").is_empty());
    }
}
