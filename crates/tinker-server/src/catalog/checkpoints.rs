//! Checkpoints: which there are, who may load them, and which have had their time.

use std::collections::BTreeMap;

use tinker_types::{Checkpoint, CheckpointKind, LoraConfig, TinkerPath, TrainingRunId};

use super::{Catalog, store};
use crate::clock::{Millis, timestamp};
use crate::error::{Error, Result};

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

impl Catalog {
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
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ann, open};
    use super::*;
    use crate::caller::{Caller, work_for};
    use crate::clock::now;

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
