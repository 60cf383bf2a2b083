//! What an earlier process left in a ledger: consumed as the restarted program makes its calls again.

use std::collections::{BTreeMap, VecDeque};

use tinker_types::{ErrorCategory, RequestId, SessionId, TrainingRunId};

use super::file::Place;
use super::record::{Digest, Record};

/// A training run that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Model {
    pub(super) digest: Digest,
    pub(super) summary: String,
    pub(super) run: Option<TrainingRunId>,
}

/// An operation that was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) name: String,
    pub(super) digest: Digest,
    pub(super) request_id: Option<RequestId>,
    pub(super) end: Option<End>,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    Refused(String),
    /// Its result is in the file.
    Here(Place),
    /// The server has its result.
    There,
    Failed(ErrorCategory, String),
}

/// The operations of a run under each number: all but the last of a number were refused.
type Operations = BTreeMap<u64, VecDeque<Operation>>;

/// The content of a ledger.
#[derive(Debug, Default)]
pub(super) struct Index {
    sessions: VecDeque<SessionId>,
    models: BTreeMap<(SessionId, u64), Model>,
    runs: BTreeMap<TrainingRunId, Operations>,
}

impl Index {
    /// Adds a record of the file. The error says why it cannot stand there.
    pub(super) fn add(&mut self, record: Record, place: Place) -> Result<(), String> {
        match record {
            Record::Ledger { .. } | Record::Synced { .. } => {}
            Record::Session { session_id } => self.sessions.push_back(session_id),
            Record::Creating {
                session_id,
                number,
                digest,
                summary,
            } => {
                let run = None;
                let model = Model {
                    digest,
                    summary,
                    run,
                };
                self.models.insert((session_id, number), model);
            }
            Record::Created {
                session_id,
                number,
                run,
            } => {
                let model = self.models.get_mut(&(session_id, number));
                let model = model.ok_or("a training run was created that was not asked for")?;
                model.run = Some(run);
            }
            Record::Sending {
                run,
                seq_id,
                operation,
                digest,
            } => self.sending(run, seq_id, operation, digest),
            Record::Accepted {
                run,
                seq_id,
                request_id,
            } => self.last(&run, seq_id)?.request_id = Some(request_id),
            Record::Refused {
                run,
                seq_id,
                message,
            } => self.last(&run, seq_id)?.end = Some(End::Refused(message)),
            Record::Done {
                run,
                seq_id,
                result,
            } => {
                let end = result.map_or(End::There, |_| End::Here(place));
                self.last(&run, seq_id)?.end = Some(end);
            }
            Record::Failed {
                run,
                seq_id,
                category,
                message,
            } => self.last(&run, seq_id)?.end = Some(End::Failed(category, message)),
        }
        Ok(())
    }

    fn sending(&mut self, run: TrainingRunId, seq_id: u64, name: String, digest: Digest) {
        let same_number = self.runs.entry(run).or_default().entry(seq_id).or_default();
        // One that is sent again after a restart.
        if let Some(last) = same_number.back_mut()
            && last.digest == digest
        {
            last.end = None;
            return;
        }
        same_number.push_back(Operation {
            name,
            digest,
            request_id: None,
            end: None,
        });
    }

    fn last(&mut self, run: &TrainingRunId, seq_id: u64) -> Result<&mut Operation, String> {
        self.runs
            .get_mut(run)
            .and_then(|operations| operations.get_mut(&seq_id)?.back_mut())
            .ok_or_else(|| format!("operation {seq_id} of {run} was answered and not sent"))
    }

    /// Takes the next session of the program, if it opened that many.
    pub(super) fn take_session(&mut self) -> Option<SessionId> {
        self.sessions.pop_front()
    }

    /// The training run of this number in a session.
    pub(super) fn model(&self, session_id: &SessionId, number: u64) -> Option<&Model> {
        self.models.get(&(session_id.clone(), number))
    }

    /// Whether a session has a training run of a higher number.
    pub(super) fn has_later_run(&self, session_id: &SessionId, number: u64) -> bool {
        let mut models = self.models.iter();
        models.any(|((session, other), model)| {
            session == session_id && *other > number && model.run.is_some()
        })
    }

    /// Whether a session has training runs.
    pub(super) fn has_runs(&self, session_id: &SessionId) -> bool {
        let mut models = self.models.iter();
        models.any(|((session, _), model)| session == session_id && model.run.is_some())
    }

    /// Whether this run was created.
    pub(super) fn has_run(&self, run: &TrainingRunId) -> bool {
        let mut models = self.models.values();
        models.any(|model| model.run.as_ref() == Some(run))
    }

    /// Takes the operation that this program sent under this number before, if there is one. One
    /// that was refused, and had no successor, does not count: the number is free.
    pub(super) fn take(&mut self, run: &TrainingRunId, seq_id: u64) -> Option<Operation> {
        let operations = self.runs.get_mut(run)?;
        let same_number = operations.get_mut(&seq_id)?;
        let operation = same_number.pop_front();
        let is_last = same_number.is_empty();
        if is_last {
            operations.remove(&seq_id);
        }
        operation.filter(|operation| !(is_last && matches!(operation.end, Some(End::Refused(_)))))
    }

    /// Whether a run has operations that were not taken yet. One that was refused, and had no
    /// successor, does not count: the number is free.
    pub(super) fn has_operations(&self, run: &TrainingRunId) -> bool {
        let is_free = |same_number: &VecDeque<Operation>| {
            let only = same_number.front().filter(|_| same_number.len() == 1);
            only.is_some_and(|only| matches!(only.end, Some(End::Refused(_))))
        };
        let operations = self.runs.get(run);
        operations.is_some_and(|all| all.values().any(|same_number| !is_free(same_number)))
    }

    /// The newest operation of a run whose result is known.
    pub(super) fn newest_answered(&self, run: &TrainingRunId) -> Option<(u64, &Operation)> {
        let operations = self.runs.get(run)?;
        operations.iter().rev().find_map(|(seq_id, same_number)| {
            let last = same_number.back()?;
            let is_answered = matches!(last.end, Some(End::Here(_) | End::There));
            (is_answered && last.request_id.is_some()).then_some((*seq_id, last))
        })
    }
}
