//! Who may read a checkpoint, how long it lives, and where copies of it go.

use std::time::Duration;

use tinker_types::{
    CheckpointKind, CopyWeightsRequest, ExternalWeightsUrls, ProjectId, StartUploadRequest,
    StartUploadResponse, TinkerPath,
};

use super::RestClient;
use crate::error::{Error, Result};
use crate::options::{CopyOptions, seconds_to_live};

impl RestClient {
    /// Lets anybody read a checkpoint. That it is so already is no error.
    ///
    /// Endpoint: `POST /api/v1/training_runs/{id}/checkpoints/{checkpoint}/publish`.
    ///
    /// # Errors
    /// If the call fails; of kind `NotFound` if there is none, or it is not one's own.
    pub async fn publish_checkpoint_from_tinker_path(&self, path: &TinkerPath) -> Result<()> {
        Ok(self.http.publish_checkpoint(path).await?)
    }

    /// Lets nobody else read a checkpoint any more. That it is so already is no error.
    ///
    /// Endpoint: `DELETE /api/v1/training_runs/{id}/checkpoints/{checkpoint}/publish`.
    ///
    /// # Errors
    /// As [`publish_checkpoint_from_tinker_path`](Self::publish_checkpoint_from_tinker_path).
    pub async fn unpublish_checkpoint_from_tinker_path(&self, path: &TinkerPath) -> Result<()> {
        Ok(self.http.unpublish_checkpoint(path).await?)
    }

    /// Has a checkpoint deleted after this time, one hour to ten years from now; `None` keeps it.
    ///
    /// Endpoint: `PUT /api/v1/training_runs/{id}/checkpoints/{checkpoint}/ttl`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if the time is out of range, and if the call fails.
    pub async fn set_checkpoint_ttl_from_tinker_path(
        &self,
        path: &TinkerPath,
        ttl: Option<Duration>,
    ) -> Result<()> {
        let ttl_seconds = seconds_to_live(ttl)?;
        Ok(self.http.set_checkpoint_ttl(path, ttl_seconds).await?)
    }

    /// Says where the files of an external checkpoint can be read, and until when.
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}/checkpoints/{checkpoint}/external_weights_urls`.
    ///
    /// # Errors
    /// [`Error::WrongCheckpointKind`] if the path is not of an external checkpoint, and if the call
    /// fails.
    pub async fn get_external_weights_urls(
        &self,
        path: &TinkerPath,
    ) -> Result<ExternalWeightsUrls> {
        Error::check_kind(path, CheckpointKind::External)?;
        Ok(self.http.get_external_weights_urls(path).await?)
    }

    /// Copies a checkpoint into a project; returns the copy's path. The copy is of the same kind and
    /// takes no additional space. One copy is made, however often the call has to be repeated.
    ///
    /// Endpoint: `POST /api/v1/copy_weights`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if the time to live is out of range, and if the call fails.
    pub async fn copy_weights(
        &self,
        path: &TinkerPath,
        destination: &ProjectId,
        options: CopyOptions,
    ) -> Result<TinkerPath> {
        let request = CopyWeightsRequest {
            source_path: path.clone(),
            destination_project_id: Some(destination.clone()),
            session_id: None,
            model_seq_id: None,
            ttl_seconds: seconds_to_live(options.ttl)?,
        };
        let token = options.weights_access_token.as_deref();
        Ok(self.http.copy_weights(&request, token).await?)
    }

    /// Begins to bring weights in from outside: says where to `PUT` each file, in the form that
    /// [`save_weights_external`](crate::TrainingClient::save_weights_external) writes. Experimental,
    /// on servers for SDK 0.39.
    ///
    /// Endpoint: `POST /api/v1/external_weights_upload_start`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn external_weights_upload_start(
        &self,
        request: &StartUploadRequest,
    ) -> Result<StartUploadResponse> {
        Ok(self.http.external_weights_upload_start(request).await?)
    }

    /// Makes an external checkpoint of files that have been sent. Experimental, on servers for SDK
    /// 0.39.
    ///
    /// Endpoint: `POST /api/v1/external_weights_upload_finish`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn external_weights_upload_finish(&self, upload_id: &str) -> Result<TinkerPath> {
        Ok(self.http.external_weights_upload_finish(upload_id).await?)
    }
}
