//! Sessions: whose they are, whether somebody is there, and what project they are filed under.

use tinker_types::{
    CreateSessionRequest, FinishSessionRequest, ProjectId, RequestId, SessionId, TrainingRunId,
};

use super::{Catalog, Run, Sampler, store};
use crate::caller;
use crate::clock::Millis;
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

impl Catalog {
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
}

fn unknown_session(id: &SessionId) -> Error {
    Error::NotFound(format!("session {id} is unknown to this server"))
}

/// An idempotency key as it is kept: callers choose theirs without knowing of each other.
fn own_key(key: &str, owner: Option<&KeyName>) -> String {
    match owner {
        Some(owner) => format!("{owner}/{key}"),
        None => key.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tinker_types::{LoraConfig, OptimizerConfig};

    use super::super::tests::{ann, open};
    use super::*;
    use crate::caller::work_for;
    use crate::clock::now;

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
}
