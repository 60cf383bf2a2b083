//! What was accepted and has no result yet: since when, and whether it is under way.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use tinker_types::RequestId;

use crate::keys::KeyName;
use crate::operation::OpKind;

/// What one key has in the queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) n_operations: usize,
    /// Of their requests.
    pub(crate) n_bytes: u64,
}

/// An accepted operation without a result.
#[derive(Debug)]
struct Entry {
    kind: OpKind,
    since: Instant,
    is_started: bool,
    /// `None` is the data directory's own key.
    owner: Option<KeyName>,
    n_bytes: u64,
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
    /// Of the keys that have something in the queue.
    loads: HashMap<KeyName, Load>,
}

/// The session of a future's owner, `<session>:train:<n>:op:<n>` or `<session>:sample:<n>:op:<n>`;
/// other ids stand for themselves.
pub(crate) fn session_of(id: &str) -> &str {
    let owner = id.rsplit_once(":op:").map_or(id, |(owner, _)| owner);
    let session = owner.rsplit_once(":sample:");
    session
        .or_else(|| owner.rsplit_once(":train:"))
        .map_or(owner, |(session, _)| session)
}

impl Pending {
    /// Notes that an operation of a key with so many bytes was accepted; one that is known keeps its
    /// time.
    pub(crate) fn accept(
        &mut self,
        id: &RequestId,
        kind: OpKind,
        (owner, n_bytes): (Option<KeyName>, u64),
        now: Instant,
    ) {
        if self.entries.contains_key(id) {
            return;
        }
        if let Some(key) = &owner {
            let load = self.loads.entry(key.clone()).or_default();
            load.n_operations += 1;
            load.n_bytes += n_bytes;
        }
        let entry = Entry {
            kind,
            since: now,
            is_started: false,
            owner,
            n_bytes,
        };
        self.entries.insert(id.clone(), entry);
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
        self.lighten(&entry);
        Some((entry.kind, now.saturating_duration_since(entry.since)))
    }

    fn lighten(&mut self, entry: &Entry) {
        let Some(key) = &entry.owner else { return };
        let Some(load) = self.loads.get_mut(key) else {
            return;
        };
        load.n_operations -= 1;
        load.n_bytes -= entry.n_bytes;
        if load.n_operations == 0 {
            self.loads.remove(key);
        }
    }

    /// What a key has in the queue.
    pub(crate) fn load(&self, key: &KeyName) -> Load {
        self.loads.get(key).copied().unwrap_or_default()
    }

    /// Whether an operation waits for its turn.
    pub(crate) fn is_waiting(&self, id: &RequestId) -> bool {
        self.entries.get(id).is_some_and(|entry| !entry.is_started)
    }

    /// How many operations wait for their turn.
    pub(crate) fn n_waiting(&self) -> usize {
        let waiting = self.entries.values().filter(|entry| !entry.is_started);
        waiting.count()
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

    fn id(text: &str) -> RequestId {
        text.parse().unwrap()
    }

    #[test]
    fn futures_belong_to_the_session_that_begins_their_id() {
        assert_eq!(session_of("s:1:sample:2:op:3"), "s:1");
        assert_eq!(session_of("s:train:0:op:9"), "s");
        assert_eq!(session_of("s:train:0"), "s");
        assert_eq!(session_of("else"), "else");
    }

    #[test]
    fn what_ended_is_counted_no_more() {
        let (mut pending, start) = (Pending::default(), Instant::now());
        let (a, b) = (id("s:sample:0:op:1"), id("s:sample:1:op:1"));
        pending.accept(&a, OpKind::Sample, (None, 0), start);
        pending.accept(
            &a,
            OpKind::Sample,
            (None, 0),
            start + Duration::from_secs(1),
        );
        pending.accept(&b, OpKind::Sample, (None, 0), start);
        pending.set_started(&b, true);

        let one_each = Count {
            n_waiting: 1,
            n_running: 1,
        };
        assert_eq!(pending.counts(|_| "x"), [("x", one_each)].into());
        assert!(pending.is_waiting(&a) && !pending.is_waiting(&b));
        assert_eq!(pending.n_waiting(), 1);
        let ended = pending.end(&a, start + Duration::from_secs(3));
        assert_eq!(ended, Some((OpKind::Sample, Duration::from_secs(3))));
        assert_eq!(pending.end(&a, start), None);
        pending.end(&b, start);
        assert!(pending.counts(|_| "x").is_empty());
    }

    #[test]
    fn what_a_key_has_in_the_queue_is_counted_once_and_until_it_ends() {
        let (mut pending, start) = (Pending::default(), Instant::now());
        let (ann, ben): (KeyName, KeyName) = ("ann".parse().unwrap(), "ben".parse().unwrap());
        for (op, owner, n_bytes) in [(1, &ann, 10), (2, &ann, 5), (1, &ann, 10), (3, &ben, 1)] {
            let id = id(&format!("s:sample:0:op:{op}"));
            let of = (Some(owner.clone()), n_bytes);
            pending.accept(&id, OpKind::Sample, of, start);
        }

        let load = Load {
            n_operations: 2,
            n_bytes: 15,
        };
        assert_eq!(pending.load(&ann), load);
        for op in [1, 2] {
            pending.end(&id(&format!("s:sample:0:op:{op}")), start);
        }
        assert_eq!(pending.load(&ann), Load::default());
        assert_eq!(pending.load(&ben).n_operations, 1);
    }
}
