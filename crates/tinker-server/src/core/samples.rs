//! Samples and samplers: their log, how they end, and where weights are.

use std::path::PathBuf;
use std::sync::MutexGuard;

use tinker_types::RequestId;
use tinker_types::SamplingSessionId;

use super::{Core, lock};
use crate::catalog::Sampler;
use crate::completions::{Ended, SamplerClient};
use crate::error::Result;
use crate::journal::Journal;
use crate::operation::{Form, Outcome};

impl Core {
    /// The sampler of an id.
    ///
    /// # Errors
    /// [`crate::error::Error::NotFound`]; also if its checkpoint was deleted.
    pub(crate) fn live_sampler(&self, id: &SamplingSessionId) -> Result<Sampler> {
        let sampler = self.catalog.sampler(id)?;
        if let Some(path) = &sampler.model_path
            && self.catalog.find_checkpoint(path).is_none()
        {
            return Err(self.catalog.no_checkpoint(path));
        }
        Ok(sampler)
    }

    /// The directory of a sampler's weights; `None` for the base model alone.
    pub(crate) fn sampler_dir(&self, sampler: &Sampler) -> Option<PathBuf> {
        match (&sampler.model_path, &sampler.request_id) {
            (Some(path), _) => Some(self.paths.checkpoint(path)),
            (None, Some(_)) => Some(self.own_weights(sampler)),
            (None, None) => None,
        }
    }

    /// Where the weights of a sampler are that lives with its session.
    pub(crate) fn own_weights(&self, sampler: &Sampler) -> PathBuf {
        let saved_by = sampler.request_id.as_ref().filter(|_| sampler.inflight);
        let run = saved_by
            .and_then(|id| id.parse().ok())
            .and_then(|id| self.run_of(&id));
        match run {
            Some(run) => self.paths.inflight(&run),
            None => self.paths.sampler(&sampler.id),
        }
    }

    /// The log of all samples.
    pub(crate) fn samples(&self) -> MutexGuard<'_, Journal> {
        lock(&self.samples)
    }

    /// Records the result of a sample and wakes those who wait for it.
    pub(crate) fn finish_sample(&self, id: &RequestId, outcome: Outcome) {
        let ended = Ended {
            id: id.clone(),
            failed: outcome.is_failure(),
            n_bytes: Some(outcome.body.len() as u64),
        };
        self.count_end(id, &outcome);
        self.samples().finish(id, outcome);
        // A poll that was waiting may have been answered already.
        let was_fetched = || self.futures.was_delivered(id);
        self.completions.note(ended, was_fetched);
        self.watchers.end(id);
        self.attempts().note_sample_over(id);
    }

    /// The samples of a client that ended and whose results nobody fetched since the start.
    pub(crate) fn ended_samples(&self, client: &SamplerClient) -> Vec<Ended> {
        let found = self.samples().found().into_iter();
        found
            .filter(|f| SamplerClient::of(&f.request_id).as_ref() == Some(client))
            .filter(|f| !self.futures.was_delivered(&f.request_id))
            .filter_map(|f| {
                Some(Ended {
                    failed: f.finished? == Form::Failed,
                    id: f.request_id,
                    n_bytes: None,
                })
            })
            .collect()
    }
}
