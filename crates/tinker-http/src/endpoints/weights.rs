//! Saving and loading the weights of a training run.

use tinker_types::{
    COPY_WEIGHTS, CopyWeightsRequest, CopyWeightsResponse, LOAD_WEIGHTS, LoadWeightsRequest,
    SAVE_WEIGHTS, SAVE_WEIGHTS_FOR_SAMPLER, SaveWeightsForSamplerRequest, SaveWeightsRequest,
    TinkerPath, UntypedFuture, WEIGHTS_INFO, WeightsInfo, WeightsInfoRequest,
};

use crate::call::Call;
use crate::client::Client;
use crate::error::{Error, ErrorKind, Result};
use crate::pools::TrafficClass;

/// Header of a permission to read somebody else's weights.
const WEIGHTS_ACCESS_TOKEN: &str = "x-tinker-weights-access-token";

impl Client {
    /// Submits a save of weights and optimizer state; its future brings a `SaveWeightsResponse`.
    ///
    /// Endpoint: `POST /api/v1/save_weights`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn save_weights(&self, request: &SaveWeightsRequest) -> Result<UntypedFuture> {
        let call = Call::post(self, TrafficClass::Train, SAVE_WEIGHTS, request)?;
        self.send(call).await?.json()
    }

    /// Submits a load; its future brings a `LoadWeightsResponse`.
    ///
    /// Endpoint: `POST /api/v1/load_weights`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn load_weights(&self, request: &LoadWeightsRequest) -> Result<UntypedFuture> {
        let call = Call::post(self, TrafficClass::Train, LOAD_WEIGHTS, request)?;
        let answer = self.send(call).await.map_err(|error| {
            // Servers that load into existing runs only, such as SkyRL's, miss the run's id.
            let misses_run = error.status() == Some(422) && error.message().contains("model_id");
            match request.model_id {
                None if misses_run => error.into_unsupported("create a run from a checkpoint"),
                _ => error,
            }
        })?;
        answer.json()
    }

    /// Submits a save of weights to sample from; its future brings a
    /// `SaveWeightsForSamplerResponse`.
    ///
    /// Endpoint: `POST /api/v1/save_weights_for_sampler`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn save_weights_for_sampler(
        &self,
        request: &SaveWeightsForSamplerRequest,
    ) -> Result<UntypedFuture> {
        let call = Call::post(self, TrafficClass::Train, SAVE_WEIGHTS_FOR_SAMPLER, request)?;
        self.send(call).await?.json()
    }

    /// Copies a checkpoint to a project, or into a session. `weights_access_token` is a permission
    /// to read somebody else's. All attempts carry one idempotency key, so one copy is made.
    ///
    /// Endpoint: `POST /api/v1/copy_weights`.
    ///
    /// # Errors
    /// If the call fails, or the token cannot stand in a header.
    pub async fn copy_weights(
        &self,
        request: &CopyWeightsRequest,
        weights_access_token: Option<&str>,
    ) -> Result<TinkerPath> {
        let mut call = Call::post(self, TrafficClass::Rest, COPY_WEIGHTS, request)?;
        if let Some(token) = weights_access_token {
            if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(Error::new(
                    ErrorKind::InvalidRequest,
                    "the weights access token cannot stand in a header",
                ));
            }
            call = call.header(WEIGHTS_ACCESS_TOKEN, token);
        }
        let answer: CopyWeightsResponse = self.send(call).await?.json()?;
        Ok(answer.tinker_path)
    }

    /// Describes the weights of a checkpoint.
    ///
    /// Endpoint: `POST /api/v1/weights_info`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn weights_info(&self, path: &TinkerPath) -> Result<WeightsInfo> {
        let request = WeightsInfoRequest {
            tinker_path: path.clone(),
        };
        let call = Call::post(self, TrafficClass::Rest, WEIGHTS_INFO, &request)?;
        self.send(call).await?.json()
    }
}
