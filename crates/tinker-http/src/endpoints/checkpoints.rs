//! Checkpoints.

use reqwest::Method;
use tinker_types::{CHECKPOINTS, CheckpointsResponse, TRAINING_RUNS, TinkerPath, TrainingRunId};

use super::training_runs::Page;
use crate::call::Call;
use crate::client::Client;
use crate::error::Result;
use crate::pools::TrafficClass;

impl Client {
    /// Lists the checkpoints of a training run, all of them.
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}/checkpoints`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn list_checkpoints(&self, run: &TrainingRunId) -> Result<CheckpointsResponse> {
        let url = self
            .base_url()
            .join(TRAINING_RUNS, [run.as_str(), "checkpoints"]);
        self.send(Call::get(self, TrafficClass::Rest, url))
            .await?
            .json()
    }

    /// Lists the checkpoints of all runs, newest first.
    ///
    /// Endpoint: `GET /api/v1/checkpoints`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn list_user_checkpoints(&self, page: Page) -> Result<CheckpointsResponse> {
        let mut url = self.base_url().join(CHECKPOINTS, []);
        page.write(&mut url);
        self.send(Call::get(self, TrafficClass::Rest, url))
            .await?
            .json()
    }

    /// Deletes a checkpoint.
    ///
    /// Endpoint: `DELETE /api/v1/training_runs/{id}/checkpoints/{checkpoint}`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn delete_checkpoint(&self, path: &TinkerPath) -> Result<()> {
        let checkpoint = &path.checkpoint;
        let segments = [
            path.run.as_str(),
            "checkpoints",
            checkpoint.kind.segment(),
            checkpoint.name(),
        ];
        let url = self.base_url().join(TRAINING_RUNS, segments);
        let call = Call::new(self, Method::DELETE, TrafficClass::Rest, url);
        match self.send(call).await {
            // The first attempt did it and its answer was lost.
            Err(error) if error.status() == Some(404) && error.may_have_arrived() => {
                Ok(())
            }
            other => other.map(drop),
        }
    }
}
