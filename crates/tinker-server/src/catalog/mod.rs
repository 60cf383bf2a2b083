//! What exists: sessions, training runs, samplers and checkpoints.
//!
//! Everything belongs to a session, and a session to the key that made it. Look-ups on behalf of a request
//! find what its caller may see (`caller.rs`): for others, what is not theirs does not exist. Kept in memory, written through to the database before it becomes visible, read back at start.

mod store;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tinker_types::{
    Checkpoint, CheckpointId, CheckpointKind, CreateSessionRequest, FinishSessionRequest,
    LoraConfig, OptimizerConfig, ProjectId, RequestId, SamplingSessionId, SessionId, TinkerPath,
    TrainingRunId, UserMetadata,
};

use crate::caller;
use crate::clock::{Clock, Millis, timestamp};
use crate::db::Db;
use crate::error::{Error, Result};
use crate::identity;
use crate::keys::KeyName;

/// The project of sessions that were filed under none.
pub(crate) const LOCAL_PROJECT: &str = "local";
/// A session that was not heard of for so long counts as closed; clients give a sign of life every few
/// seconds.
pub(crate) const OPEN_FOR: Millis = 5 * 60 * 1000;

/// A client's connection.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    /// Same key, same session: a client that lost the answer asks again.
    pub(crate) idempotency_key: Option<String>,
    pub(crate) request: CreateSessionRequest,
    pub(crate) created_at: Millis,
    pub(crate) last_seen_at: Millis,
    pub(crate) finish: Option<FinishSessionRequest>,
    /// The key that made it; `None` is the data directory's own.
    pub(crate) owner: Option<KeyName>,
}

impl Session {
    /// The user whose it is.
    pub(crate) fn user(&self) -> String {
        identity::user(self.owner.as_ref())
    }

    /// Whether somebody is there: it was not ended, and heard of a short while ago.
    fn is_open(&self, now: Millis) -> bool {
        self.finish.is_none() && now - self.last_seen_at < OPEN_FOR
    }
}

/// A training run.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) id: TrainingRunId,
    pub(crate) session_id: SessionId,
    pub(crate) base_model: String,
    pub(crate) lora: LoraConfig,
    pub(crate) user_metadata: Option<UserMetadata>,
    pub(crate) created_at: Millis,
    pub(crate) last_request_at: Millis,
    /// Why its state cannot be used, if it cannot.
    pub(crate) corrupted: Option<String>,
    /// What its steps are taken with.
    pub(crate) optimizer: OptimizerConfig,
}

/// A sampler.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sampler {
    pub(crate) id: SamplingSessionId,
    pub(crate) session_id: SessionId,
    pub(crate) base_model: String,
    pub(crate) model_path: Option<TinkerPath>,
    /// The operation that saved its weights, if they live with the session and have no path.
    pub(crate) request_id: Option<String>,
    pub(crate) created_at: Millis,
    /// Clients that share it; each has a number, from 0.
    pub(crate) n_clients: u64,
    /// Whether it has the newest of the weights that its run saved for such samplers, not its own.
    pub(crate) inflight: bool,
}

/// A checkpoint with what is needed to load it.
#[derive(Debug, Clone)]
pub(crate) struct SavedCheckpoint {
    pub(crate) path: TinkerPath,
    pub(crate) base_model: String,
    pub(crate) lora: LoraConfig,
    pub(crate) size_bytes: u64,
    pub(crate) user_metadata: Option<BTreeMap<String, String>>,
    pub(crate) public: bool,
    pub(crate) created_at: Millis,
    pub(crate) expires_at: Option<Millis>,
}

impl SavedCheckpoint {
    /// The form the REST endpoints list.
    pub(crate) fn listed(&self) -> Checkpoint {
        Checkpoint {
            checkpoint_id: self.path.checkpoint.clone(),
            checkpoint_type: self.path.checkpoint.kind,
            time: timestamp(self.created_at),
            tinker_path: self.path.clone(),
            size_bytes: Some(self.size_bytes),
            public: self.public,
            user_metadata: self.user_metadata.clone(),
            expires_at: self.expires_at.map(timestamp),
            base_model: Some(self.base_model.clone()),
        }
    }
}

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

    // Sessions

    /// The session of an idempotency key, or a new one.
    pub(crate) fn create_session(
        &self,
        request: CreateSessionRequest,
        idempotency_key: Option<String>,
    ) -> Result<SessionId> {
        let _changing = self.change();
        let owner = caller::current_key();
        let idempotency_key = idempotency_key.map(|key| own_key(&key, owner.as_ref()));
        let known = idempotency_key
            .as_deref()
            .and_then(|key| self.find_by_key(key));
        if let Some(id) = known {
            return Ok(id);
        }
        let id: SessionId = uuid::Uuid::now_v7()
            .to_string()
            .parse()
            .map_err(|e: tinker_types::TypeError| Error::Invalid(e.to_string()))?;
        let session = Session {
            id: id.clone(),
            idempotency_key,
            request,
            created_at: self.clock.now(),
            last_seen_at: self.clock.now(),
            finish: None,
            owner,
        };
        let row = session.clone();
        self.db.call(move |c| store::put_session(c, &row))?;
        self.write().sessions.insert(id.clone(), session);
        Ok(id)
    }

    /// The session that a call with this idempotency key made.
    pub(crate) fn session_of_key(&self, key: &str) -> Option<SessionId> {
        self.find_by_key(&own_key(key, caller::current_key().as_ref()))
    }

    fn find_by_key(&self, key: &str) -> Option<SessionId> {
        let tables = self.read();
        let mut sessions = tables.sessions.values();
        let found = sessions.find(|s| s.idempotency_key.as_deref() == Some(key))?;
        Some(found.id.clone())
    }

    /// A session by id.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub(crate) fn session(&self, id: &SessionId) -> Result<Session> {
        let tables = self.read();
        let found = tables.sessions.get(id).filter(|_| tables.shows(id));
        found.cloned().ok_or_else(|| unknown_session(id))
    }

    /// Whose a session is; `None` is the data directory's own key, also for unknown sessions.
    pub(crate) fn owner_of(&self, session: &str) -> Option<KeyName> {
        self.read().owner(&session.parse().ok()?).cloned()
    }

    /// Whether a future is one that the current caller must not see. Those of unknown sessions are
    /// nobody's.
    pub(crate) fn hides_future(&self, id: &RequestId) -> bool {
        let (id, tables) = (id.as_str(), self.read());
        // All ids of what belongs to a session begin with its.
        let beginnings = id.match_indices(':').map(|(end, _)| &id[..end]);
        let mut sessions = beginnings.filter_map(|text| text.parse::<SessionId>().ok());
        sessions.any(|id| tables.sessions.contains_key(&id) && !tables.shows(&id))
    }

    /// Whether somebody is there in a session: see [`Session::is_open`].
    pub(crate) fn is_open(&self, id: &SessionId) -> bool {
        let (tables, now) = (self.read(), self.clock.now());
        let found = tables.sessions.get(id);
        found.is_some_and(|session| session.is_open(now))
    }

    /// The samplers of sessions in which somebody is there.
    pub(crate) fn open_samplers(&self) -> Vec<Sampler> {
        let (tables, now) = (self.read(), self.clock.now());
        let is_open = |s: &&Sampler| {
            let session = tables.sessions.get(&s.session_id);
            session.is_some_and(|session| session.is_open(now))
        };
        tables.samplers.values().filter(is_open).cloned().collect()
    }

    /// How many training runs a session has that is closed; none if it is open.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub(crate) fn n_closed(&self, id: &SessionId) -> Result<Option<usize>> {
        let tables = self.read();
        let found = tables.sessions.get(id).filter(|_| tables.shows(id));
        if found
            .ok_or_else(|| unknown_session(id))?
            .is_open(self.clock.now())
        {
            return Ok(None);
        }
        let of_session = |run: &&Run| run.session_id == *id;
        Ok(Some(tables.runs.values().filter(of_session).count()))
    }

    /// Notes that there is work in a session, which opens it again if it was closed. When is in memory only; that
    /// one which was ended goes on is not, or a restart would end it under its client.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) fn work_in(&self, id: &SessionId) -> Result<()> {
        let is_ended = match self.write().sessions.get_mut(id) {
            Some(session) => {
                session.last_seen_at = self.clock.now();
                session.finish.is_some()
            }
            None => false,
        };
        if !is_ended {
            return Ok(());
        }
        let _changing = self.change();
        let mut session = self.session(id)?;
        session.finish = None;
        let row = session.clone();
        self.db.call(move |c| store::put_session(c, &row))?;
        self.write().sessions.insert(session.id.clone(), session);
        Ok(())
    }

    /// How many sessions of a key are open, and how many training runs these have.
    pub(crate) fn n_open(&self, key: &KeyName) -> (usize, usize) {
        let (tables, now) = (self.read(), self.clock.now());
        let is_open =
            |session: &&Session| session.owner.as_ref() == Some(key) && session.is_open(now);
        let n_sessions = tables.sessions.values().filter(is_open).count();
        let of_open = |run: &&Run| {
            tables
                .sessions
                .get(&run.session_id)
                .is_some_and(|s| is_open(&s))
        };
        (n_sessions, tables.runs.values().filter(of_open).count())
    }

    /// All sessions, newest first.
    pub(crate) fn sessions(&self) -> Vec<Session> {
        let tables = self.read();
        let shown = tables.sessions.values().filter(|s| tables.shows(&s.id));
        let mut all: Vec<Session> = shown.cloned().collect();
        all.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        all
    }

    /// Notes a heartbeat; kept in memory until the next write of the session. False: the session was ended
    /// and nobody worked in it since.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub(crate) fn beat(&self, id: &SessionId) -> Result<bool> {
        match self.write().sessions.get_mut(id) {
            Some(session) if caller::may_see(session.owner.as_ref()) => {
                let goes_on = session.finish.is_none();
                if goes_on {
                    session.last_seen_at = self.clock.now();
                }
                Ok(goes_on)
            }
            _ => Err(unknown_session(id)),
        }
    }

    /// Ends a session; the first reason given stays.
    pub(crate) fn finish_session(&self, id: &SessionId, how: FinishSessionRequest) -> Result<()> {
        let _changing = self.change();
        let mut session = self.session(id)?;
        if session.finish.is_some() {
            return Ok(());
        }
        session.finish = Some(how);
        session.last_seen_at = self.clock.now();
        let row = session.clone();
        self.db.call(move |c| store::put_session(c, &row))?;
        self.write().sessions.insert(session.id.clone(), session);
        Ok(())
    }

    /// Files a session under another project.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database refuses.
    pub(crate) fn assign_project(&self, id: &SessionId, project: ProjectId) -> Result<()> {
        let _changing = self.change();
        let mut session = self.session(id)?;
        session.request.project_id = Some(project);
        let row = session.clone();
        self.db.call(move |c| store::put_session(c, &row))?;
        self.write().sessions.insert(session.id.clone(), session);
        Ok(())
    }

    /// The project of a session.
    pub(crate) fn project_of(&self, session: &Session) -> Option<ProjectId> {
        let local = || LOCAL_PROJECT.parse().ok();
        session.request.project_id.clone().or_else(local)
    }

    /// The session of a run.
    pub(crate) fn session_of_run(&self, run: &TrainingRunId) -> Option<Session> {
        self.session(&self.run(run).ok()?.session_id).ok()
    }

    /// The project of a run's session.
    pub(crate) fn project_of_run(&self, run: &TrainingRunId) -> Option<ProjectId> {
        self.project_of(&self.session_of_run(run)?)
    }

    // Training runs

    /// Adds or replaces a training run.
    pub(crate) fn put_run(&self, run: Run) -> Result<()> {
        let row = run.clone();
        self.db.call(move |c| store::put_run(c, &row))?;
        self.write().runs.insert(run.id.clone(), run);
        Ok(())
    }

    /// A training run by id.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub(crate) fn run(&self, id: &TrainingRunId) -> Result<Run> {
        let tables = self.read();
        let found = tables.runs.get(id).filter(|_| tables.shows_run(id));
        found.cloned().ok_or_else(|| unknown_run(id))
    }

    /// Whether the current caller may see a training run.
    ///
    /// # Errors
    /// [`Error::NotFound`], also for a run that does not exist unless the caller sees everything.
    pub(crate) fn check_run(&self, id: &TrainingRunId) -> Result<()> {
        if self.read().shows_run(id) {
            Ok(())
        } else {
            Err(unknown_run(id))
        }
    }

    /// What a checkpoint was trained with; AdamW if its run is gone.
    pub(crate) fn optimizer_of(&self, checkpoint: &TinkerPath) -> OptimizerConfig {
        let tables = self.read();
        let run = tables.runs.get(&checkpoint.run);
        run.map(|run| run.optimizer.clone()).unwrap_or_default()
    }

    /// All training runs, last used first.
    pub(crate) fn runs(&self) -> Vec<Run> {
        let tables = self.read();
        let shown = tables.runs.values().filter(|r| tables.shows(&r.session_id));
        let mut all: Vec<Run> = shown.cloned().collect();
        all.sort_by(|a, b| (b.last_request_at, &b.id).cmp(&(a.last_request_at, &a.id)));
        all
    }

    /// Notes that a run was used; in memory only.
    pub(crate) fn touch_run(&self, id: &TrainingRunId) {
        if let Some(run) = self.write().runs.get_mut(id) {
            run.last_request_at = self.clock.now();
        }
    }

    /// Records that a run's state cannot be used.
    pub(crate) fn mark_corrupted(&self, id: &TrainingRunId, why: &str) -> Result<()> {
        let _changing = self.change();
        let mut run = self.run(id)?;
        run.corrupted = Some(why.to_owned());
        self.put_run(run)
    }

    /// Takes back [`Self::mark_corrupted`].
    pub(crate) fn unmark_corrupted(&self, id: &TrainingRunId) -> Result<()> {
        let _changing = self.change();
        let mut run = self.run(id)?;
        run.corrupted = None;
        self.put_run(run)
    }

    // Samplers

    /// Adds a sampler, or finds the one that was made by the same request before.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the number was used for another sampler.
    pub(crate) fn put_sampler(&self, sampler: Sampler) -> Result<()> {
        let _changing = self.change();
        if let Ok(known) = self.sampler(&sampler.id) {
            let same = (&known.base_model, &known.model_path, &known.request_id)
                == (
                    &sampler.base_model,
                    &sampler.model_path,
                    &sampler.request_id,
                );
            return if same {
                Ok(())
            } else {
                Err(Error::Conflict(format!(
                    "sampler {} already exists and samples from {}, not from {}",
                    sampler.id,
                    known.weights_name(),
                    sampler.weights_name()
                )))
            };
        }
        let row = sampler.clone();
        self.db.call(move |c| store::put_sampler(c, &row))?;
        self.write().samplers.insert(sampler.id.clone(), sampler);
        Ok(())
    }

    /// A sampler by id.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub(crate) fn sampler(&self, id: &SamplingSessionId) -> Result<Sampler> {
        let tables = self.read();
        let found = tables.samplers.get(id);
        found
            .filter(|sampler| tables.shows(&sampler.session_id))
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("sampler {id} is unknown to this server")))
    }

    /// A number for one more client of a sampler, which no other has.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database refuses.
    pub(crate) fn join_sampler(&self, id: &SamplingSessionId) -> Result<u64> {
        let _changing = self.change();
        let mut sampler = self.sampler(id)?;
        let number = sampler.n_clients;
        sampler.n_clients += 1;
        let row = sampler.clone();
        self.db.call(move |c| store::put_sampler(c, &row))?;
        self.write().samplers.insert(id.clone(), sampler);
        Ok(number)
    }

    /// Samplers without a checkpoint whose session was not heard of since `before`.
    pub(crate) fn stale_samplers(&self, before: Millis) -> Vec<SamplingSessionId> {
        let tables = self.read();
        let is_stale = |s: &&Sampler| {
            let session = tables.sessions.get(&s.session_id);
            let seen = session.map_or(0, |session| session.last_seen_at);
            s.request_id.is_some() && seen < before && s.created_at < before
        };
        tables
            .samplers
            .values()
            .filter(is_stale)
            .map(|s| s.id.clone())
            .collect()
    }

    /// The samplers with weights of their own that a run saved without a name, newest first.
    pub(crate) fn unnamed_samplers(&self, run: &TrainingRunId) -> Vec<SamplingSessionId> {
        let tables = self.read();
        let mut numbered: Vec<(u64, &SamplingSessionId)> = tables
            .samplers
            .values()
            .filter(|s| !s.inflight)
            .filter_map(|s| {
                let (saved_by, seq) = s.request_id.as_deref()?.rsplit_once(":op:")?;
                Some((seq.parse().ok()?, &s.id)).filter(|_| saved_by == run.as_str())
            })
            .collect();
        numbered.sort_by(|a, b| b.cmp(a));
        numbered.into_iter().map(|(_, id)| id.clone()).collect()
    }

    /// Forgets a sampler.
    pub(crate) fn remove_sampler(&self, id: &SamplingSessionId) -> Result<()> {
        let key = id.clone();
        self.db.call(move |c| store::remove_sampler(c, &key))?;
        self.write().samplers.remove(id);
        Ok(())
    }

    /// The runs and samplers of a session, oldest first.
    pub(crate) fn of_session(
        &self,
        id: &SessionId,
    ) -> (Vec<TrainingRunId>, Vec<SamplingSessionId>) {
        let tables = self.read();
        let mut runs: Vec<&Run> = tables
            .runs
            .values()
            .filter(|r| r.session_id == *id)
            .collect();
        runs.sort_by_key(|r| r.created_at);
        let mut samplers: Vec<&Sampler> = tables
            .samplers
            .values()
            .filter(|s| s.session_id == *id)
            .collect();
        samplers.sort_by_key(|s| s.created_at);
        (
            runs.into_iter().map(|r| r.id.clone()).collect(),
            samplers.into_iter().map(|s| s.id.clone()).collect(),
        )
    }

    // Checkpoints

    /// Adds or replaces a checkpoint.
    pub(crate) fn put_checkpoint(&self, checkpoint: SavedCheckpoint) -> Result<()> {
        let row = checkpoint.clone();
        self.db.call(move |c| store::put_checkpoint(c, &row))?;
        self.write()
            .checkpoints
            .insert(checkpoint.path.clone(), checkpoint);
        Ok(())
    }

    /// Forgets a checkpoint.
    pub(crate) fn remove_checkpoint(&self, path: &TinkerPath) -> Result<()> {
        let key = path.clone();
        self.db.call(move |c| store::remove_checkpoint(c, &key))?;
        self.write().checkpoints.remove(path);
        Ok(())
    }

    /// A checkpoint that has not expired and that the current caller may load: an own or a published one.
    pub(crate) fn find_checkpoint(&self, path: &TinkerPath) -> Option<SavedCheckpoint> {
        let tables = self.read();
        let found = tables.checkpoints.get(path)?;
        let is_shown = found.public || tables.shows_run(&path.run);
        let is_there = found.expires_at.is_none_or(|at| at > self.clock.now());
        (is_shown && is_there).then(|| found.clone())
    }

    /// A checkpoint that the current caller may change: a published one only if it is an own one.
    pub(crate) fn find_own_checkpoint(&self, path: &TinkerPath) -> Option<SavedCheckpoint> {
        let is_own = self.check_run(&path.run).is_ok();
        self.find_checkpoint(path).filter(|_| is_own)
    }

    /// A checkpoint of the kind that is needed. External ones hold weights, which serve to sample and
    /// to begin training with.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another kind, naming the twin; [`Error::NotFound`] with a list of
    /// what the run has.
    pub(crate) fn checkpoint(
        &self,
        path: &TinkerPath,
        needed: CheckpointKind,
    ) -> Result<SavedCheckpoint> {
        if ![needed, CheckpointKind::External].contains(&path.checkpoint.kind) {
            let twin = path.twin(needed);
            let known = if self.find_checkpoint(&twin).is_some() {
                format!("use its twin {twin}")
            } else if needed == CheckpointKind::Sampler {
                format!("its twin {twin} does not exist yet: save_weights_for_sampler makes it")
            } else {
                format!("its twin {twin} does not exist: save_state makes it")
            };
            let (has, wants) = (path.checkpoint.kind.segment(), needed.segment());
            return Err(Error::Invalid(format!(
                "{path} is a /{has}/ path where a /{wants}/ path is needed: {known}"
            )));
        }
        self.find_checkpoint(path)
            .ok_or_else(|| self.no_checkpoint(path))
    }

    /// The error for a checkpoint that is not there.
    pub(crate) fn no_checkpoint(&self, path: &TinkerPath) -> Error {
        let of_run = self.checkpoints_of(&path.run);
        let what = if of_run.is_empty() {
            match self.run(&path.run) {
                Ok(_) => format!("training run {} has no checkpoints", path.run),
                Err(unknown) => unknown.to_string(),
            }
        } else {
            let ids: Vec<String> = of_run
                .iter()
                .map(|c| c.path.checkpoint.to_string())
                .collect();
            format!("training run {} has {}", path.run, ids.join(", "))
        };
        Error::NotFound(format!("checkpoint {path} does not exist: {what}"))
    }

    /// The checkpoints of a run, newest first.
    pub(crate) fn checkpoints_of(&self, run: &TrainingRunId) -> Vec<SavedCheckpoint> {
        self.checkpoints()
            .into_iter()
            .filter(|c| c.path.run == *run)
            .collect()
    }

    /// All checkpoints that have not expired, newest first.
    pub(crate) fn checkpoints(&self) -> Vec<SavedCheckpoint> {
        let (at, tables) = (self.clock.now(), self.read());
        let mut all: Vec<SavedCheckpoint> = tables
            .checkpoints
            .values()
            .filter(|c| c.expires_at.is_none_or(|e| e > at) && tables.shows_run(&c.path.run))
            .cloned()
            .collect();
        all.sort_by(|a, b| (b.created_at, &b.path).cmp(&(a.created_at, &a.path)));
        all
    }

    /// Checkpoints whose time is up.
    pub(crate) fn expired_checkpoints(&self) -> Vec<TinkerPath> {
        let at = self.clock.now();
        let tables = self.read();
        let expired = tables
            .checkpoints
            .values()
            .filter(|c| c.expires_at.is_some_and(|e| e <= at));
        expired.map(|c| c.path.clone()).collect()
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

fn unknown_session(id: &SessionId) -> Error {
    Error::NotFound(format!("session {id} is unknown to this server"))
}

fn unknown_run(id: &TrainingRunId) -> Error {
    Error::NotFound(format!("training run {id} is unknown to this server"))
}

/// An idempotency key as it is kept: callers choose theirs without knowing of each other.
fn own_key(key: &str, owner: Option<&KeyName>) -> String {
    match owner {
        Some(owner) => format!("{owner}/{key}"),
        None => key.to_owned(),
    }
}

impl Sampler {
    fn weights_name(&self) -> String {
        match (&self.model_path, &self.request_id) {
            (Some(path), _) => path.to_string(),
            (None, Some(request)) => format!("the weights saved by {request}"),
            (None, None) => self.base_model.clone(),
        }
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
    use std::time::Duration;

    use super::*;
    use crate::caller::{Caller, work_for};
    use crate::clock::now;
    use crate::keys::KeyLimits;

    fn ann() -> Caller {
        let limits = KeyLimits::default();
        Caller::of_key("ann".parse().unwrap(), BTreeSet::new(), limits)
    }

    fn open(dir: &std::path::Path) -> Catalog {
        Catalog::open(Db::open(&dir.join("tinker.db")).unwrap(), Clock::default()).unwrap()
    }

    #[test]
    fn a_silent_session_is_open_again_once_there_is_work_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = open(dir.path());
        let request = serde_json::json!({"tags": [], "user_metadata": {}, "sdk_version": "t"});
        let request = serde_json::from_value(request).unwrap();
        let session = work_for(ann(), || catalog.create_session(request, None)).unwrap();
        let row = Run {
            id: TrainingRunId::of_session(&session, 0),
            session_id: session.clone(),
            base_model: "m".into(),
            lora: LoraConfig::default(),
            user_metadata: None,
            created_at: now(),
            last_request_at: now(),
            corrupted: None,
            optimizer: OptimizerConfig::default(),
        };
        catalog.put_run(row).unwrap();
        catalog
            .clock
            .put_forward(Duration::from_millis(OPEN_FOR as u64));
        let key = ann().key.unwrap();
        assert_eq!(catalog.n_open(&key), (0, 0));
        assert_eq!(catalog.n_closed(&session).unwrap(), Some(1));

        catalog.work_in(&session).unwrap();

        assert_eq!(catalog.n_open(&key), (1, 1));
        assert_eq!(catalog.n_closed(&session).unwrap(), None);
    }

    #[test]
    fn a_checkpoint_whose_run_has_no_row_is_hidden_from_keys() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = open(dir.path());
        let path: TinkerPath = "tinker://lost:train:0/weights/x".parse().unwrap();
        let lost = SavedCheckpoint {
            path: path.clone(),
            base_model: "m".into(),
            lora: LoraConfig::default(),
            size_bytes: 1,
            user_metadata: None,
            public: false,
            created_at: now(),
            expires_at: None,
        };
        catalog.put_checkpoint(lost).unwrap();
        let n_seen = || {
            let found = catalog.find_checkpoint(&path).into_iter().count();
            (found, catalog.checkpoints().len())
        };

        assert_eq!(work_for(ann(), n_seen), (0, 0));
        assert_eq!(work_for(Caller::own(), n_seen), (1, 1));
        assert_eq!(n_seen(), (1, 1));
    }
}
