//! External weights: where to read their files, and bringing weights in.

use tinker_types::{
    CheckpointArchive, ExternalWeightsUrls, FINISH_UPLOAD, FinishUploadRequest,
    FinishUploadResponse, SAVE_WEIGHTS_EXTERNAL, START_UPLOAD, SaveWeightsExternalRequest,
    SignedUrl, StartUploadRequest, StartUploadResponse, TinkerPath, UntypedFuture,
};

use super::checkpoints::checkpoint_url;
use crate::call::Call;
use crate::client::Client;
use crate::error::Result;
use crate::pools::TrafficClass;

impl Client {
    /// Submits a save of weights as files; its future brings a `SaveWeightsExternalResponse`.
    ///
    /// Endpoint: `POST /api/v1/save_weights_external`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn save_weights_external(
        &self,
        request: &SaveWeightsExternalRequest,
    ) -> Result<UntypedFuture> {
        let call = Call::post(self, TrafficClass::Train, SAVE_WEIGHTS_EXTERNAL, request)?;
        self.send(call).await?.json()
    }

    /// Says where the files of an external checkpoint can be read, and until when.
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}/checkpoints/{checkpoint}/external_weights_urls`.
    ///
    /// # Errors
    /// If the call fails; of kind `NotFound` if there is no such checkpoint.
    pub async fn get_external_weights_urls(
        &self,
        path: &TinkerPath,
    ) -> Result<ExternalWeightsUrls> {
        let url = checkpoint_url(self, path, "external_weights_urls");
        self.send(Call::get(self, TrafficClass::Rest, url))
            .await?
            .json()
    }

    /// Says where the archive of a checkpoint can be read: servers before SDK 0.38 make one. While
    /// it is being built they answer 503, which is waited for as any other.
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}/checkpoints/{checkpoint}/archive`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_checkpoint_archive(&self, path: &TinkerPath) -> Result<CheckpointArchive> {
        let url = checkpoint_url(self, path, "archive");
        let call = Call::get(self, TrafficClass::Rest, url).surface_redirect();
        let answer = self.send(call).await?;
        match answer.location.clone() {
            Some(place) if answer.is_redirect() => Ok(CheckpointArchive {
                url: SignedUrl::new(place.into()),
                expires: None,
            }),
            _ => answer.json(),
        }
    }

    /// Begins to bring weights in: says where to `PUT` each file. Experimental, on servers for SDK
    /// 0.39.
    ///
    /// Endpoint: `POST /api/v1/external_weights_upload_start`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn external_weights_upload_start(
        &self,
        request: &StartUploadRequest,
    ) -> Result<StartUploadResponse> {
        let call = Call::post(self, TrafficClass::Rest, START_UPLOAD, request)?;
        self.send(call).await?.json()
    }

    /// Makes an external checkpoint of files that have been sent. Experimental, on servers for SDK
    /// 0.39.
    ///
    /// Endpoint: `POST /api/v1/external_weights_upload_finish`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn external_weights_upload_finish(&self, upload_id: &str) -> Result<TinkerPath> {
        let request = FinishUploadRequest {
            upload_id: upload_id.to_owned(),
        };
        let call = Call::post(self, TrafficClass::Rest, FINISH_UPLOAD, &request)?;
        let answer: FinishUploadResponse = self.send(call).await?.json()?;
        Ok(answer.tinker_path)
    }
}
