//! Creating, describing and unloading the model of a training run.

use tinker_types::{
    CREATE_MODEL, CreateModelRequest, GET_INFO, GetInfoRequest, GetInfoResponse, TrainingRunId,
    UNLOAD_MODEL, UnloadModelRequest, UntypedFuture,
};

use crate::call::Call;
use crate::client::Client;
use crate::error::Result;
use crate::pools::TrafficClass;

impl Client {
    /// Submits the creation of a training run; its future brings a `CreateModelResponse`.
    ///
    /// Endpoint: `POST /api/v1/create_model`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn create_model(&self, request: &CreateModelRequest) -> Result<UntypedFuture> {
        let call = Call::post(self, TrafficClass::Train, CREATE_MODEL, request)?;
        self.send(call).await?.json()
    }

    /// Describes a training run.
    ///
    /// Endpoint: `POST /api/v1/get_info`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_info(&self, model_id: &TrainingRunId) -> Result<GetInfoResponse> {
        let request = GetInfoRequest {
            model_id: model_id.clone(),
            tag: tinker_types::GetInfoTag,
        };
        let call = Call::post(self, TrafficClass::Train, GET_INFO, &request)?;
        self.send(call).await?.json()
    }

    /// Submits the release of a training run's memory; its future brings an `UnloadModelResponse`.
    ///
    /// Endpoint: `POST /api/v1/unload_model`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn unload_model(&self, model_id: &TrainingRunId) -> Result<UntypedFuture> {
        let request = UnloadModelRequest {
            model_id: model_id.clone(),
            tag: tinker_types::UnloadModelTag,
        };
        let call = Call::post(self, TrafficClass::Train, UNLOAD_MODEL, &request)?;
        self.send(call).await?.json()
    }
}
