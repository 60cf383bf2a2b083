//! Checkpoints.

use reqwest::Method;
use tinker_types::{
    CHECKPOINTS, CheckpointsResponse, SetTtlRequest, TRAINING_RUNS, TinkerPath, TrainingRunId,
};
use url::Url;

use super::training_runs::Page;
use crate::call::{Body, Call};
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
        let url = checkpoint_url(self, path, "");
        let call = Call::new(self, Method::DELETE, TrafficClass::Rest, url);
        match self.send(call).await {
            // The first attempt did it and its answer was lost.
            Err(error) if error.status() == Some(404) && error.may_have_arrived() => Ok(()),
            other => other.map(drop),
        }
    }

    /// Lets anybody read a checkpoint. That it is so already is no error.
    ///
    /// Endpoint: `POST /api/v1/training_runs/{id}/checkpoints/{checkpoint}/publish`.
    ///
    /// # Errors
    /// If the call fails; of kind `NotFound` if there is none, or it is not one's own.
    pub async fn publish_checkpoint(&self, path: &TinkerPath) -> Result<()> {
        self.change_publication(Method::POST, path).await
    }

    /// Lets nobody else read a checkpoint any more. That it is so already is no error.
    ///
    /// Endpoint: `DELETE /api/v1/training_runs/{id}/checkpoints/{checkpoint}/publish`.
    ///
    /// # Errors
    /// If the call fails; of kind `NotFound` if there is none, or it is not one's own.
    pub async fn unpublish_checkpoint(&self, path: &TinkerPath) -> Result<()> {
        self.change_publication(Method::DELETE, path).await
    }

    async fn change_publication(&self, method: Method, path: &TinkerPath) -> Result<()> {
        let url = checkpoint_url(self, path, "publish");
        let call = Call::new(self, method, TrafficClass::Rest, url).surface_conflict();
        match self.send(call).await {
            Err(error) if error.status() == Some(409) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Has a checkpoint deleted after this many seconds from now, 3600 to ten years; `None` keeps
    /// it.
    ///
    /// Endpoint: `PUT /api/v1/training_runs/{id}/checkpoints/{checkpoint}/ttl`.
    ///
    /// # Errors
    /// If the call fails; of kind `InvalidRequest` if the time is out of range.
    pub async fn set_checkpoint_ttl(
        &self,
        path: &TinkerPath,
        ttl_seconds: Option<u64>,
    ) -> Result<()> {
        let url = checkpoint_url(self, path, "ttl");
        let body = Body::json(&SetTtlRequest { ttl_seconds })?;
        let call = Call::new(self, Method::PUT, TrafficClass::Rest, url).body(body);
        self.send(call).await.map(drop)
    }
}

/// The address of a checkpoint, or of something about it.
pub(super) fn checkpoint_url(client: &Client, path: &TinkerPath, about: &str) -> Url {
    let checkpoint = &path.checkpoint;
    let segments = [
        path.run.as_str(),
        "checkpoints",
        checkpoint.kind.segment(),
        checkpoint.name(),
        about,
    ];
    let n = segments.len() - usize::from(about.is_empty());
    client
        .base_url()
        .join(TRAINING_RUNS, segments.into_iter().take(n))
}
