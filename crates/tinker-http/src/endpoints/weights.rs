//! Saving and loading the weights of a training run.

use tinker_types::{
    LOAD_WEIGHTS, LoadWeightsRequest, SAVE_WEIGHTS, SAVE_WEIGHTS_FOR_SAMPLER,
    SaveWeightsForSamplerRequest, SaveWeightsRequest, TinkerPath, UntypedFuture, WEIGHTS_INFO,
    WeightsInfo, WeightsInfoRequest,
};

use crate::call::Call;
use crate::client::Client;
use crate::error::Result;
use crate::pools::TrafficClass;

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
