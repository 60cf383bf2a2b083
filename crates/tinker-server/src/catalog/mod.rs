//! What exists: sessions, training runs, samplers and checkpoints.
//!
//! Everything belongs to a session, and a session to the key that made it. Look-ups on behalf of a request
//! find what its caller may see (`caller.rs`): for others, what is not theirs does not exist. Kept in memory,
//! written through to the database before it becomes visible, read back at start.

mod checkpoints;
mod samplers;
mod sessions;
mod store;
mod training_runs;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tinker_types::{
    CheckpointId, CheckpointKind, SamplingSessionId, SessionId, TinkerPath, TrainingRunId,
};

use crate::caller;
use crate::clock::Clock;
use crate::db::Db;
use crate::error::Result;
use crate::keys::KeyName;
pub(crate) use checkpoints::SavedCheckpoint;
pub(crate) use samplers::Sampler;
pub(crate) use sessions::{LOCAL_PROJECT, OPEN_FOR, Session};
pub(crate) use training_runs::Run;

#[derive(Debug, Default)]
struct Tables {
    sessions: BTreeMap<SessionId, Session>,
    runs: BTreeMap<TrainingRunId, Run>,
    samplers: BTreeMap<SamplingSessionId, Sampler>,
    checkpoints: BTreeMap<TinkerPath, SavedCheckpoint>,
}

impl Tables {
    fn owner(&self, session: &SessionId) -> Option<&KeyName> {
        self.sessions.get(session)?.owner.as_ref()
    }

    /// Whether the current caller may see what belongs to a session.
    fn shows(&self, session: &SessionId) -> bool {
        caller::may_see(self.owner(session))
    }

    /// As [`Self::shows`]. A run without a row is nobody's, as the server's own things are.
    fn shows_run(&self, run: &TrainingRunId) -> bool {
        match self.runs.get(run) {
            Some(row) => self.shows(&row.session_id),
            None => caller::may_see(None),
        }
    }
}

/// Everything that exists on this server.
#[derive(Debug)]
pub(crate) struct Catalog {
    db: Db,
    clock: Clock,
    /// Held over a change that depends on what is there, so that the tables can be read meanwhile.
    changes: Mutex<()>,
    tables: RwLock<Tables>,
}

impl Catalog {
    /// Reads the catalog of a database.
    ///
    /// # Errors
    /// If a row cannot be read.
    pub(crate) fn open(db: Db, clock: Clock) -> Result<Self> {
        let tables = db.call(store::load)?;
        Ok(Self {
            db,
            clock,
            changes: Mutex::default(),
            tables: RwLock::new(tables),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the times that are kept in memory between other writes.
    pub(crate) fn flush_times(&self) -> Result<()> {
        let tables = self.read();
        let sessions: Vec<_> = tables
            .sessions
            .values()
            .map(|s| (s.id.clone(), s.last_seen_at))
            .collect();
        let runs: Vec<_> = tables
            .runs
            .values()
            .map(|r| (r.id.clone(), r.last_request_at))
            .collect();
        drop(tables);
        self.db.call(move |c| store::put_times(c, &sessions, &runs))
    }
}

/// A checkpoint's id from its database columns.
fn checkpoint_path(
    run: &str,
    kind: &str,
    name: &str,
) -> Result<TinkerPath, tinker_types::TypeError> {
    let kind = CheckpointKind::from_segment(kind)
        .ok_or_else(|| tinker_types::TypeError::new(format!("checkpoint kind {kind:?}")))?;
    Ok(TinkerPath {
        run: run.parse()?,
        checkpoint: CheckpointId::new(kind, name)?,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::caller::Caller;
    use crate::keys::KeyLimits;

    pub(super) fn ann() -> Caller {
        let limits = KeyLimits::default();
        Caller::of_key("ann".parse().unwrap(), BTreeSet::new(), limits)
    }

    pub(super) fn open(dir: &std::path::Path) -> Catalog {
        Catalog::open(Db::open(&dir.join("tinker.db")).unwrap(), Clock::default()).unwrap()
    }
}
