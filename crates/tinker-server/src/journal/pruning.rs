//! What a log forgets, and what it carries over into a new segment before the old one goes.

use tinker_types::RequestId;

use super::Journal;
use super::entries::{Entry, Finished, Header};
use crate::clock::{Millis, now};
use crate::error::Result;

/// A result nobody asked for is kept this long.
const KEEP_UNDELIVERED: Millis = 24 * 60 * 60 * 1000;
/// Bytes of unfinished requests that are copied to a new segment.
const CARRIED_AT_ONCE: usize = 16 << 20;

impl Journal {
    /// Starts a new segment; everything before it can go once it is no longer needed.
    ///
    /// Results that the disk refused before are logged first: a snapshot must not contain an
    /// operation whose result a restart would not know.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn rotate(&mut self) -> Result<u64> {
        self.log_results()?;
        self.log.rotate()
    }

    /// Whether the segment that is written to has more than `max_bytes`, or more than `max_entries`
    /// operations are known, and more of them are new than were carried over: what nobody fetches is
    /// not to be copied again for every record.
    pub(crate) fn is_long(&self, max_bytes: u64, max_entries: usize) -> bool {
        self.log.segment_bytes() > max_bytes.max(self.n_carried_bytes.saturating_mul(2))
            || self.entries.len() > max_entries.max(self.n_carried.saturating_mul(2))
    }

    /// Starts a new segment, and forgets all samples that nobody will ask for.
    ///
    /// # Errors
    /// If the disk refuses; nothing is lost then.
    pub(crate) fn shorten(&mut self) -> Result<()> {
        self.rotate()?;
        let pruned = self.carry_pending().and_then(|()| self.prune(0));
        self.n_carried_bytes = self.log.segment_bytes();
        self.n_carried = self.entries.len();
        pruned
    }

    /// Forgets operations up to `done` that nobody will ask for, and removes their segments.
    ///
    /// Results that were not handed out yet are carried over to the current segment.
    ///
    /// # Errors
    /// If the disk refuses; nothing is lost then.
    pub(crate) fn prune(&mut self, done: u64) -> Result<()> {
        let needed = |e: &Entry| e.finished.is_none() || (self.floor.is_some() && e.seq > done);
        let keep_from = self
            .entries
            .values()
            .filter(|e| needed(e))
            .map(|e| e.accepted.segment)
            .fold(self.log.segment(), u64::min);
        let doomed: Vec<RequestId> = self
            .entries
            .iter()
            .filter(|(_, e)| !needed(e) && e.first_segment() < keep_from)
            .map(|(id, _)| id.clone())
            .collect();
        for id in doomed {
            if self.is_awaited(&id) {
                self.carry(&id)?;
            } else {
                self.entries.remove(&id);
                self.futures.forget(&id);
            }
        }
        self.log.sync()?;
        self.log.remove_before(keep_from)
    }

    fn is_awaited(&self, id: &RequestId) -> bool {
        let young = self
            .entries
            .get(id)
            .and_then(|e| e.finished)
            .is_some_and(|f| f.location.is_some() && now() - f.at < KEEP_UNDELIVERED);
        young && !self.futures.was_delivered(id)
    }

    /// Copies the requests without a result to the current segment, unless they are large: under load
    /// there always are some, and they would hold back the segments that they are in.
    fn carry_pending(&mut self) -> Result<()> {
        let mut room = CARRIED_AT_ONCE;
        let current = self.log.segment();
        let held_back = |e: &Entry| e.finished.is_none() && e.accepted.segment < current;
        let entries = self.entries.iter_mut();
        let mut pending: Vec<_> = entries.filter(|(_, entry)| held_back(entry)).collect();
        // The oldest first, so that at least the oldest segments can go.
        pending.sort_by_key(|(_, entry)| entry.accepted);
        for (id, entry) in pending {
            let body = self.log.read_body(entry.accepted)?;
            let Some(left) = room.checked_sub(body.len()) else {
                return Ok(());
            };
            room = left;
            let header = Header::Accepted {
                request_id: id.clone(),
                kind: entry.kind,
                seq: entry.seq,
                hash: entry.hash.clone(),
                at: entry.at,
                carried: false,
            };
            entry.accepted = self.log.append(&header, &body)?;
        }
        Ok(())
    }

    /// Copies an entry's records to the current segment, the request without its body.
    fn carry(&mut self, id: &RequestId) -> Result<()> {
        let Some(entry) = self.entries.get_mut(id) else {
            return Ok(());
        };
        let Some((finished, from)) = entry.finished.and_then(|f| Some((f, f.location?))) else {
            return Ok(());
        };
        let body = self.log.read_body(from)?;
        let accepted = Header::Accepted {
            request_id: id.clone(),
            kind: entry.kind,
            seq: entry.seq,
            hash: entry.hash.clone(),
            at: entry.at,
            carried: true,
        };
        entry.accepted = self.log.append(&accepted, &[])?;
        entry.carried = true;
        let header = Header::Finished {
            request_id: id.clone(),
            form: finished.form,
            at: finished.at,
        };
        let to = self.log.append(&header, &body)?;
        entry.finished = Some(Finished {
            location: Some(to),
            ..finished
        });
        self.futures.moved(id, to);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::super::Accepted;
    use super::*;
    use crate::disk::OsDisk;
    use crate::future_store::{FutureStore, Scope};
    use crate::operation::{OpKind, Outcome};
    use crate::segment_log::Syncer;

    fn open(dir: &Path, futures: &Arc<FutureStore>) -> Journal {
        let (disk, syncer) = (Arc::new(OsDisk), Syncer::start());
        Journal::open(disk, syncer, dir, Scope::Samples, Arc::clone(futures)).unwrap()
    }

    #[test]
    fn a_result_is_found_where_pruning_put_it_and_forgotten_once_it_was_read() {
        let dir = tempfile::tempdir().unwrap();
        let futures: Arc<FutureStore> = Arc::default();
        let mut journal = open(dir.path(), &futures);
        let id: RequestId = "s:op:1".parse().unwrap();
        journal.accept(&id, OpKind::Sample, 1, b"{}", 1).unwrap();
        journal.finish(&id, Outcome::json(&1));
        let before = futures.location(&id);

        journal.shorten().unwrap();
        assert_ne!(futures.location(&id), before, "it was carried over");
        let again = journal.accept(&id, OpKind::Sample, 1, b"{ }", 1).unwrap();
        assert_eq!(again, Accepted::Known);
        assert_eq!(journal.result(&id).unwrap().as_deref(), Some(&b"1"[..]));

        journal.shorten().unwrap();
        assert_eq!(journal.result(&id).unwrap(), None);
    }

    #[test]
    fn results_that_nobody_fetches_are_not_copied_for_every_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path(), &Arc::default());

        let mut n_shortened = 0;
        for seq in 0..200 {
            let id: RequestId = format!("s:op:{seq}").parse().unwrap();
            journal.accept(&id, OpKind::Sample, seq, b"{}", 1).unwrap();
            journal.finish(&id, Outcome::json(&"result"));
            if journal.is_long(1000, usize::MAX) {
                journal.shorten().unwrap();
                n_shortened += 1;
            }
        }

        assert!((3..=10).contains(&n_shortened), "{n_shortened} times");
        assert_eq!(journal.found().len(), 200);
    }

    #[test]
    fn samples_that_were_fetched_are_forgotten_by_number_however_short_their_records_are() {
        let dir = tempfile::tempdir().unwrap();
        let futures: Arc<FutureStore> = Arc::default();
        let mut journal = open(dir.path(), &futures);

        let mut most = 0;
        for seq in 0..200 {
            let id: RequestId = format!("s:op:{seq}").parse().unwrap();
            journal.accept(&id, OpKind::Sample, seq, b"{}", 1).unwrap();
            journal.finish(&id, Outcome::json(&1));
            journal.result(&id).unwrap();
            most = most.max(futures.len());
            if journal.is_long(u64::MAX, 20) {
                journal.shorten().unwrap();
            }
        }

        assert_eq!(most, 21);
        assert!(journal.found().len() <= 21);
    }

    #[test]
    fn a_sample_that_is_under_way_holds_back_nothing_and_is_found_with_its_request() {
        let dir = tempfile::tempdir().unwrap();
        let futures: Arc<FutureStore> = Arc::default();
        let mut journal = open(dir.path(), &futures);
        let [slow, done]: [RequestId; 2] = ["slow", "done"].map(|id| id.parse().unwrap());
        for id in [&slow, &done] {
            journal
                .accept(id, OpKind::Sample, 1, id.as_str().as_bytes(), 9)
                .unwrap();
        }
        journal.finish(&done, Outcome::json(&1));
        journal.result(&done).unwrap();

        journal.shorten().unwrap();

        assert_eq!(journal.found().len(), 1);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(journal.body(&slow).unwrap(), b"slow");
        drop(journal);
        let mut again = open(dir.path(), &Arc::default());
        assert_eq!(again.body(&slow).unwrap(), b"slow");
        let repeated = again.accept(&slow, OpKind::Sample, 1, b"slow", 9).unwrap();
        assert_eq!(repeated, Accepted::Known);
        again.finish(&slow, Outcome::json(&2));
        assert_eq!(again.result(&slow).unwrap().as_deref(), Some(&b"2"[..]));
    }
}
