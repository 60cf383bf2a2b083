//! Samplers: what they sample from, and which of them nobody needs any more.

use tinker_types::{SamplingSessionId, SessionId, TinkerPath, TrainingRunId};

use super::{Catalog, Run, store};
use crate::clock::Millis;
use crate::error::{Error, Result};

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

impl Sampler {
    fn weights_name(&self) -> String {
        match (&self.model_path, &self.request_id) {
            (Some(path), _) => path.to_string(),
            (None, Some(request)) => format!("the weights saved by {request}"),
            (None, None) => self.base_model.clone(),
        }
    }
}

impl Catalog {
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
}
