//! The accepted operations of one training run, or all samples: logged, de-duplicated, answered.
//!
//! An operation is in the log before it is acknowledged, and its result is put there too. After a
//! crash [`Journal::open`] knows what was promised and what is done already.

mod entries;
mod pruning;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use tinker_types::RequestId;

use crate::clock::{Millis, now};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::future_store::{FutureStore, Scope};
use crate::operation::{Form, OpKind, Outcome};
use crate::segment_log::{MAX_BODY, SegmentLog, Syncer};
use entries::{Entry, Finished, Header, apply};

/// An operation this far from the next one is refused: nobody has as many under way, and each number in
/// between would be noted one by one when it is given up.
const FARTHEST: u64 = 16_384;
/// What became of a request to accept an operation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// It is logged now.
    New,
    /// It was logged before, with the same content.
    Known,
    /// Another operation was logged under this number.
    Conflict(OpKind),
    /// Too many are unfinished.
    Full(usize),
    /// Its number is far from that of the next operation, which is this.
    TooFar(u64),
}

/// An operation as it is found after a restart.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) request_id: RequestId,
    pub(crate) kind: OpKind,
    pub(crate) seq: u64,
    pub(crate) accepted_at: Millis,
    /// How it ended, if it did.
    pub(crate) finished: Option<Form>,
    /// When it ended, or when it was accepted.
    pub(crate) at: Millis,
}

/// The log of one scope with its index.
#[derive(Debug)]
pub(crate) struct Journal {
    scope: Scope,
    futures: Arc<FutureStore>,
    log: SegmentLog,
    entries: HashMap<RequestId, Entry>,
    n_pending: usize,
    /// The highest number of a finished operation.
    last_finished: Option<u64>,
    /// Results that the disk refused so far, in the order of their numbers.
    unlogged: BTreeMap<(u64, RequestId), Outcome>,
    /// Operations up to here are done and may have been forgotten; `None` for samples.
    floor: Option<u64>,
    /// Bytes of the current segment that are copies of older ones.
    n_carried_bytes: u64,
    /// Operations that were left when the log was last shortened.
    n_carried: usize,
}

impl Journal {
    /// Opens the log of a directory and registers its futures.
    ///
    /// # Errors
    /// If the log cannot be read; [`Error::Corrupt`] says what is damaged and what can be done.
    pub(crate) fn open(
        disk: Arc<dyn Disk>,
        syncer: Syncer,
        dir: &Path,
        scope: Scope,
        futures: Arc<FutureStore>,
    ) -> Result<Self> {
        let mut entries: HashMap<RequestId, Entry> = HashMap::new();
        let opened = SegmentLog::open(disk, syncer, dir, |record| {
            apply(&mut entries, record.header, record.location);
            Ok(())
        });
        let log = opened.map_err(|error| with_advice(error, &scope, dir))?;
        for (id, entry) in &entries {
            match entry.finished {
                Some(Finished {
                    form,
                    location: Some(location),
                    ..
                }) => futures.insert_on_disk(id.clone(), scope.clone(), form, location),
                _ => futures.insert_pending(id.clone(), scope.clone()),
            }
        }
        Ok(Self {
            scope,
            futures,
            log,
            n_pending: entries.values().filter(|e| e.finished.is_none()).count(),
            last_finished: entries
                .values()
                .filter(|e| e.finished.is_some())
                .map(|e| e.seq)
                .max(),
            entries,
            unlogged: BTreeMap::new(),
            floor: None,
            n_carried_bytes: 0,
            n_carried: 0,
        })
    }

    /// All operations in the log, in the order of their numbers.
    pub(crate) fn found(&self) -> Vec<Found> {
        let mut all: Vec<Found> = self
            .entries
            .iter()
            .map(|(id, entry)| Found {
                request_id: id.clone(),
                kind: entry.kind,
                seq: entry.seq,
                accepted_at: entry.at,
                finished: entry.finished.map(|f| f.form),
                at: entry.finished.map_or(entry.at, |f| f.at),
            })
            .collect();
        all.sort_by(|a, b| (a.seq, &a.request_id).cmp(&(b.seq, &b.request_id)));
        all
    }

    /// Whether nothing was ever accepted.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.floor.is_none()
    }

    /// Whether everything accepted is finished, and its result in the log.
    pub(crate) fn is_settled(&self) -> bool {
        self.n_pending == 0 && self.unlogged.is_empty()
    }

    /// Whether no operation up to `seq` is unfinished.
    pub(crate) fn is_finished_to(&self, seq: u64) -> bool {
        let mut early = self.entries.values().filter(|e| e.seq <= seq);
        early.all(|e| e.finished.is_some())
    }

    /// Says that operations up to `seq` are part of a snapshot.
    pub(crate) fn raise_floor(&mut self, seq: u64) {
        self.floor = self.floor.max(Some(seq));
    }

    /// Whether an operation was accepted before.
    pub(crate) fn knows(&self, id: &RequestId, seq: u64) -> bool {
        self.entries.contains_key(id) || self.floor.is_some_and(|floor| seq <= floor)
    }

    /// Logs an operation unless it is known.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn accept(
        &mut self,
        id: &RequestId,
        kind: OpKind,
        seq: u64,
        body: &[u8],
        max_pending: usize,
    ) -> Result<Accepted> {
        if let Some(entry) = self.entries.get(id) {
            return Ok(self.compare(entry, kind, body));
        }
        if self.floor.is_some_and(|floor| seq <= floor) {
            return Ok(Accepted::Known);
        }
        if self.n_pending >= max_pending && !self.is_awaited_next(seq) {
            return Ok(Accepted::Full(self.n_pending));
        }
        let next = self.next_seq();
        if matches!(self.scope, Scope::Run(_)) && seq.saturating_sub(next) > FARTHEST {
            return Ok(Accepted::TooFar(next));
        }
        self.note(id, kind, seq, body)?;
        Ok(Accepted::New)
    }

    /// Uses up the number of an operation that never arrived. One that arrives later is answered with
    /// `outcome`.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn give_up(&mut self, id: &RequestId, seq: u64, outcome: Outcome) -> Result<()> {
        if !self.entries.contains_key(id) {
            self.note(id, OpKind::Missing, seq, &[])?;
        }
        self.finish(id, outcome);
        Ok(())
    }

    /// Logs an operation that is not known.
    fn note(&mut self, id: &RequestId, kind: OpKind, seq: u64, body: &[u8]) -> Result<()> {
        let (hash, at) = (blake3::hash(body).to_hex().to_string(), now());
        let header = Header::Accepted {
            request_id: id.clone(),
            kind,
            seq,
            hash: hash.clone(),
            at,
            carried: false,
        };
        let accepted = self.log.append(&header, body)?;
        self.futures.insert_pending(id.clone(), self.scope.clone());
        let entry = Entry {
            kind,
            seq,
            hash,
            accepted,
            at,
            carried: false,
            finished: None,
        };
        self.entries.insert(id.clone(), entry);
        self.n_pending += 1;
        Ok(())
    }

    /// Whether a request is a repetition, or what everything that is pending waits for: it is taken
    /// however much is in the queue.
    pub(crate) fn must_take(&self, id: &RequestId, seq: u64) -> bool {
        self.entries.contains_key(id)
            || self.floor.is_some_and(|floor| seq <= floor)
            || (self.n_pending > 0 && self.is_awaited_next(seq))
    }

    /// Whether everything that is pending waits for this number. It is taken into a full log:
    /// refusing it would hold the run back for ever. Samples wait for nobody.
    fn is_awaited_next(&self, seq: u64) -> bool {
        matches!(self.scope, Scope::Run(_)) && seq == self.next_seq()
    }

    fn compare(&self, entry: &Entry, kind: OpKind, body: &[u8]) -> Accepted {
        // Of what was carried over the body is gone, and equal requests may differ in the order of
        // their maps: what cannot be told apart is taken for a repetition.
        let same = entry.kind == OpKind::Missing
            || entry.kind == kind
                && (entry.carried
                    || entry.hash == *blake3::hash(body).to_hex()
                    || self
                        .logged_body(entry)
                        .is_some_and(|logged| kind.same_request(&logged, body)));
        if same {
            Accepted::Known
        } else {
            Accepted::Conflict(entry.kind)
        }
    }

    fn logged_body(&self, entry: &Entry) -> Option<Vec<u8>> {
        (!entry.carried).then(|| self.log.read_body(entry.accepted).ok())?
    }

    /// Reads a request back.
    ///
    /// # Errors
    /// If it is gone or damaged.
    pub(crate) fn body(&self, id: &RequestId) -> Result<Vec<u8>> {
        match self.entries.get(id) {
            Some(entry) if !entry.carried => self.log.read_body(entry.accepted),
            _ => Err(Error::NotFound(format!(
                "the request of {id} is no longer kept"
            ))),
        }
    }

    /// Reads a result back and counts it as handed out; `None` if it is no longer kept.
    ///
    /// # Errors
    /// If it is damaged.
    pub(crate) fn result(&self, id: &RequestId) -> Result<Option<Vec<u8>>> {
        // Looked up here: whoever holds the journal keeps it from being moved or forgotten.
        let Some(location) = self.futures.location(id) else {
            return Ok(None);
        };
        let body = self.log.read_body(location)?;
        self.futures.note_delivered(id);
        Ok(Some(body))
    }

    /// The first missing operation that holds back number `seq`, of those after `from`.
    pub(crate) fn missing_before(&self, from: u64, id: &RequestId) -> Option<u64> {
        let seq = self.entries.get(id)?.seq;
        let present: std::collections::HashSet<u64> =
            self.entries.values().map(|e| e.seq).collect();
        (from..seq).find(|s| !present.contains(s))
    }

    /// The number after the last finished operation.
    pub(crate) fn next_seq(&self) -> u64 {
        let done = self.last_finished.max(self.floor);
        done.map_or(0, |seq| seq.saturating_add(1))
    }

    /// Records a result and wakes those who wait for it.
    ///
    /// A disk that refuses the record is no reason to withhold the result: executing the operation
    /// again after a crash gives the same one. Results are logged in the order of their numbers, so
    /// that what a restart finds finished has nothing unfinished before it.
    pub(crate) fn finish(&mut self, id: &RequestId, outcome: Outcome) {
        // A record that the log can never take would block all that follow it.
        let outcome = outcome.bounded(MAX_BODY);
        let Some(entry) = self.entries.get_mut(id) else {
            return;
        };
        let finished = Finished {
            form: outcome.form,
            location: None,
            at: now(),
        };
        if entry.finished.replace(finished).is_none() {
            self.n_pending -= 1;
        }
        self.last_finished = self.last_finished.max(Some(entry.seq));
        self.unlogged
            .insert((entry.seq, id.clone()), outcome.clone());
        if let Err(error) = self.log_results() {
            tracing::error!(error = error.with_causes(), request.id = %id, "cannot log a result");
        }
        let location = self.entries.get(id).and_then(|e| e.finished?.location);
        self.futures.complete(id, outcome, location);
    }

    /// Logs the results that are not in the log yet.
    fn log_results(&mut self) -> Result<()> {
        while let Some(next) = self.unlogged.first_entry() {
            let (_seq, id) = next.key();
            let Some(entry) = self.entries.get_mut(id) else {
                next.remove();
                continue;
            };
            let Some(finished) = &mut entry.finished else {
                next.remove();
                continue;
            };
            let header = Header::Finished {
                request_id: id.clone(),
                form: finished.form,
                at: finished.at,
            };
            let location = self.log.append(&header, &next.get().body)?;
            finished.location = Some(location);
            self.futures.moved(id, location);
            next.remove();
        }
        Ok(())
    }

    /// Makes the log durable.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn sync(&self) -> Result<()> {
        self.log.sync()
    }
}

/// Adds to what is damaged what can be done about it.
fn with_advice(error: Error, scope: &Scope, dir: &Path) -> Error {
    let Error::Corrupt { path, message } = error else {
        return error;
    };
    let backup = "start the server from a backup (`tinker serve backup` makes them)";
    let instead = match scope {
        Scope::Run(run) => {
            format!("make a new training run from the newest checkpoint of {run}, or {backup}")
        }
        Scope::Samples | Scope::Memory => format!(
            "move {} away, so that its samples are drawn again when they are asked for, or {backup}",
            dir.display()
        ),
    };
    Error::Corrupt {
        message: format!("{message}; {instead}"),
        path,
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Notify;

    use super::*;
    use crate::disk::OsDisk;
    use crate::future_store::Lookup;

    async fn looked_up(futures: &FutureStore, id: &RequestId) -> Lookup {
        futures
            .wait(id, std::time::Duration::ZERO, &Notify::new())
            .await
    }

    #[tokio::test]
    async fn a_result_too_large_for_the_log_fails_and_holds_nothing_back() {
        let dir = tempfile::tempdir().unwrap();
        let futures: Arc<FutureStore> = Arc::default();
        let open = |futures: &Arc<FutureStore>| {
            Journal::open(
                Arc::new(OsDisk),
                Syncer::start(),
                dir.path(),
                Scope::Samples,
                Arc::clone(futures),
            )
            .unwrap()
        };
        let mut journal = open(&futures);
        let ids: Vec<RequestId> = ["a", "b"].iter().map(|id| id.parse().unwrap()).collect();
        for (seq, id) in ids.iter().enumerate() {
            journal
                .accept(id, OpKind::Sample, seq as u64, b"{}", 10)
                .unwrap();
        }

        journal.finish(
            &ids[0],
            Outcome {
                form: Form::SampleProto,
                body: vec![0; MAX_BODY + 1].into(),
            },
        );
        journal.finish(&ids[1], Outcome::json(&1));

        let Lookup::Ready(outcome) = looked_up(&futures, &ids[0]).await else {
            panic!("no result");
        };
        let text = String::from_utf8_lossy(&outcome.body).into_owned();
        let expected = format!("{} bytes, limit {MAX_BODY}", MAX_BODY + 1);
        assert!(outcome.is_failure() && text.contains(&expected), "{text}");
        drop(journal);
        let forms: Vec<_> = open(&Arc::default())
            .found()
            .into_iter()
            .map(|found| found.finished)
            .collect();
        assert_eq!(forms, [Some(Form::Failed), Some(Form::Json)]);
    }
}
