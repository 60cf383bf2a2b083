//! Training runs: what they are made of, and whether they can be used.

use tinker_types::{
    LoraConfig, OptimizerConfig, SessionId, TinkerPath, TrainingRunId, UserMetadata,
};

use super::{Catalog, store};
use crate::clock::Millis;
use crate::error::{Error, Result};

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

impl Catalog {
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
}

fn unknown_run(id: &TrainingRunId) -> Error {
    Error::NotFound(format!("training run {id} is unknown to this server"))
}
