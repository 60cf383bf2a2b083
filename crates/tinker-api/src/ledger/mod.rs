//! The step ledger: what a program sends is noted on the disk first, and its answer afterwards, so
//! that the program, killed and started again, goes on with the same numbers and bytes.
//!
//! A restarted program makes the same calls again. Those with a known answer are not sent; the
//! others are sent under the number that they had, with a hash that proves them the same. The
//! server, which takes a number once, answers what it answered before.

mod error;
mod file;
mod index;
mod record;
mod ticket;
mod view;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tinker_http::RequestType;
use tinker_types::{RequestId, SessionId, TrainingRunId};

pub use error::LedgerError;
use file::LedgerFile;
use index::{End, Index, Operation};
pub(crate) use record::Digest;
use record::Record;
pub(crate) use ticket::{Begun, Earlier, Known, Pending, Ticket};
pub(crate) use view::check_view;
use writer::Writer;

type Result<T> = std::result::Result<T, LedgerError>;

/// A ledger in use by this process.
#[derive(Debug)]
pub(crate) struct Ledger {
    path: PathBuf,
    index: Mutex<Index>,
    writer: Writer,
}

/// An answered operation of an earlier process, to compare with what the server says.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) seq_id: u64,
    pub(crate) operation: String,
    pub(crate) request_id: RequestId,
    /// Absent if it was too large to keep.
    pub(crate) result: Option<serde_json::Value>,
}

impl Ledger {
    /// Takes the ledger at `path`, which need not exist yet. Its end is removed if it is torn.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let mut index = Index::default();
        let file = LedgerFile::open(path, |record, place| index.add(record, place))?;
        Ok(Self {
            path: path.to_owned(),
            index: Mutex::new(index),
            writer: Writer::start(file)?,
        })
    }

    /// The session to go on with: those of earlier processes come in the order they were opened.
    pub(crate) fn take_session(&self) -> Option<SessionId> {
        self.index().take_session()
    }

    /// Whether earlier processes created training runs in a session.
    pub(crate) fn has_runs(&self, session_id: &SessionId) -> bool {
        self.index().has_runs(session_id)
    }

    /// Notes a new session.
    pub(crate) async fn note_session(&self, session_id: &SessionId) -> Result<()> {
        let session_id = session_id.clone();
        self.writer.sync(Record::Session { session_id }).await
    }

    /// Announces the creation of a training run. The run, if an earlier process created it.
    pub(crate) async fn create(
        &self,
        session_id: &SessionId,
        number: u64,
        request: &[u8],
        summary: String,
    ) -> Result<Option<TrainingRunId>> {
        let digest = Digest::of(request);
        let model = self.index().model(session_id, number).cloned();
        if let Some(model) = model
            && model.run.is_some()
        {
            if model.digest == digest {
                return Ok(model.run);
            }
            return Err(LedgerError::OtherRun {
                path: self.path.clone(),
                number,
                recorded: model.summary,
                asked: summary,
            });
        }
        if self.index().has_later_run(session_id, number) {
            return Err(LedgerError::RefusedBefore {
                operation: RequestType::CreateModel,
                seq_id: number,
                message: "it was not created, and the program went on with another training run"
                    .to_owned(),
            });
        }
        let record = Record::Creating {
            session_id: session_id.clone(),
            number,
            digest,
            summary,
        };
        self.writer.sync(record).await?;
        Ok(None)
    }

    /// Notes that a training run was created.
    pub(crate) async fn note_created(
        &self,
        session_id: &SessionId,
        number: u64,
        run: &TrainingRunId,
    ) -> Result<()> {
        let record = Record::Created {
            session_id: session_id.clone(),
            number,
            run: run.clone(),
        };
        self.writer.sync(record).await
    }

    /// The newest operation of a run that an earlier process has the result of.
    pub(crate) fn newest_answered(&self, run: &TrainingRunId) -> Result<Option<Answered>> {
        let newest = {
            let index = self.index();
            let newest = index.newest_answered(run);
            newest.map(|(seq_id, operation)| (seq_id, operation.clone()))
        };
        let Some((seq_id, operation)) = newest else {
            return Ok(None);
        };
        let Some(request_id) = operation.request_id else {
            return Ok(None);
        };
        let result = match operation.end {
            Some(End::Here(place)) => self.result_at(place)?,
            _ => None,
        };
        Ok(Some(Answered {
            seq_id,
            operation: operation.name,
            request_id,
            result,
        }))
    }

    /// Whether an earlier process created this run.
    pub(crate) fn has_run(&self, run: &TrainingRunId) -> bool {
        self.index().has_run(run)
    }

    /// Whether an earlier process noted operations of this run that were not asked for again yet.
    pub(crate) fn is_repeating(&self, run: &TrainingRunId) -> bool {
        self.index().has_operations(run)
    }

    fn result_at(&self, place: file::Place) -> Result<Option<serde_json::Value>> {
        match file::read_at(&self.path, place)? {
            Record::Done { result, .. } => Ok(result),
            _ => Ok(None),
        }
    }

    /// What an earlier process sent under this number.
    fn take(
        &self,
        run: &TrainingRunId,
        seq_id: u64,
        operation: RequestType,
        digest: Digest,
    ) -> Result<Option<Operation>> {
        let Some(before) = self.index().take(run, seq_id) else {
            return Ok(None);
        };
        if before.digest == digest {
            return Ok(Some(before));
        }
        let (recorded, asked) = (before.name, operation.as_str().to_owned());
        let recorded = match recorded == asked {
            true => format!("{recorded} of other content"),
            false => recorded,
        };
        Err(LedgerError::Diverged {
            run: run.clone(),
            seq_id,
            recorded,
            asked,
        })
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
