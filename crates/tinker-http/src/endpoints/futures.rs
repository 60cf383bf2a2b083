//! Results of submitted work.

use std::future::Future;
use std::time::Duration;

use prost::Message;
use serde::de::DeserializeOwned;
use tinker_types::{
    CANCEL_FUTURE, CancelFutureRequest, CreateCustomLossResponse, CreateModelResponse,
    ForwardBackwardOutput, FutureReply, LoadWeightsResponse, OptimStepResponse, PROTOBUF,
    RETRIEVE_FUTURE, RETRIEVE_FUTURES, RequestId, RetrieveFutureRequest, RetrieveFuturesRequest,
    RetrieveFuturesResponse, SampleResponse, SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse, SaveWeightsResponse, TypeError, UnloadModelResponse, proto,
};

use crate::call::{Answer, Call, JSON};
use crate::client::Client;
use crate::error::{Error, ErrorKind, Result};
use crate::future_driver::{self, Resolved};
use crate::machine::RetryPolicy;
use crate::pools::TrafficClass;
use crate::request_type::RequestType;

/// Results above this size are decoded beside the runtime, not on it.
const LARGE_RESULT: usize = 1 << 20;
/// Time for a question that the server does not hold.
const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for a cancellation.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(30);

/// A result of a future.
pub(crate) trait FutureResult: Sized + Send {
    /// The content type to ask for.
    const ACCEPT: &'static str;

    /// Reads a result.
    fn decode(answer: Answer) -> impl Future<Output = Result<Self>> + Send;
}

macro_rules! json_results {
    ($($type:ty),+ $(,)?) => {$(
        impl FutureResult for $type {
            const ACCEPT: &'static str = JSON;

            async fn decode(answer: Answer) -> Result<Self> {
                answer.json()
            }
        }
    )+};
}

json_results!(
    CreateCustomLossResponse,
    CreateModelResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsExternalResponse,
    SaveWeightsResponse,
    SaveWeightsForSamplerResponse,
    UnloadModelResponse,
);

/// Protobuf as the official server sends it, JSON as older servers do.
macro_rules! proto_results {
    ($($type:ty = $message:ty),+ $(,)?) => {$(
        impl FutureResult for $type {
            const ACCEPT: &'static str = PROTOBUF;

            async fn decode(answer: Answer) -> Result<Self> {
                decode_large(answer, |answer| decode_proto::<$message, Self>(&answer)).await
            }
        }
    )+};
}

proto_results!(
    ForwardBackwardOutput = proto::ForwardBackwardOutput,
    SampleResponse = proto::SampleResponse,
);

async fn decode_large<T: Send + 'static>(
    answer: Answer,
    decode: fn(Answer) -> Result<T>,
) -> Result<T> {
    if answer.body.len() <= LARGE_RESULT {
        return decode(answer);
    }
    tokio::task::spawn_blocking(move || decode(answer))
        .await
        .map_err(|error| malformed("decoding the result stopped", error))?
}

fn decode_proto<M, T>(answer: &Answer) -> Result<T>
where
    M: Message + Default,
    T: DeserializeOwned + for<'a> TryFrom<&'a M, Error = TypeError>,
{
    if !answer.is_protobuf() {
        return answer.json();
    }
    let message = M::decode(answer.body.clone())
        .map_err(|error| malformed("the result is not valid protobuf", error))?;
    T::try_from(&message).map_err(|error| malformed("the result contradicts itself", error))
}

fn malformed(message: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Decode, message).with_source(source)
}

macro_rules! retrieve {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $kind:ident),+ $(,)?) => {
        /// Waiting for results: each polls until the operation is done, has failed, or the server
        /// is away for longer than the poll policy allows. `submitted_in` is how long the
        /// submission took, for the server's statistics.
        impl Client {$(
            $(#[$doc])*
            ///
            /// Endpoint: `POST /api/v1/retrieve_future`.
            ///
            /// # Errors
            /// If polling fails; of kind `Expired` if the server forgot the future.
            pub async fn $name(
                &self,
                request_id: &RequestId,
                submitted_in: Option<Duration>,
            ) -> Result<Resolved<$type>> {
                future_driver::retrieve(self, request_id, RequestType::$kind, submitted_in).await
            }
        )+}
    };
}

retrieve! {
    /// Waits for a new training run.
    retrieve_create_model: CreateModelResponse = CreateModel,
    /// Waits for a load.
    retrieve_load_weights: LoadWeightsResponse = LoadWeights,
    /// Waits for a forward-backward pass.
    retrieve_forward_backward: ForwardBackwardOutput = ForwardBackward,
    /// Waits for a forward pass.
    retrieve_forward: ForwardBackwardOutput = Forward,
    /// Waits for an optimizer step.
    retrieve_optim_step: OptimStepResponse = OptimStep,
    /// Waits for a save.
    retrieve_save_weights: SaveWeightsResponse = SaveWeights,
    /// Waits for a save of weights to sample from.
    retrieve_save_weights_for_sampler: SaveWeightsForSamplerResponse = SaveWeightsForSampler,
    /// Waits for a sample.
    retrieve_sample: SampleResponse = Sample,
    /// Waits for a save of weights as files.
    retrieve_save_weights_external: SaveWeightsExternalResponse = SaveWeightsExternal,
    /// Waits for an uploaded loss.
    retrieve_create_custom_loss: CreateCustomLossResponse = CreateCustomLoss,
    /// Waits for the release of a model.
    retrieve_unload_model: UnloadModelResponse = UnloadModel,
}

impl Client {
    /// Asks once which samples of a sampler are done. The server holds the question for about half
    /// a minute unless the request says otherwise.
    ///
    /// Endpoint: `POST /api/v1/retrieve_futures`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn retrieve_futures(
        &self,
        request: &RetrieveFuturesRequest,
    ) -> Result<RetrieveFuturesResponse> {
        let mut call = Call::post(self, TrafficClass::Retrieve, RETRIEVE_FUTURES, request)?
            .retry(RetryPolicy::never());
        if request.timeout == Some(0.0) {
            call = call.timeout(ACKNOWLEDGE_TIMEOUT);
        }
        self.send(call).await?.json()
    }

    /// Asks once whether a sample has an outcome: a result, a failure, or that the server does not
    /// know it. No answer within `patience` is none.
    pub(crate) async fn has_outcome(&self, request_id: &RequestId, patience: Duration) -> bool {
        let request = RetrieveFutureRequest {
            request_id: request_id.clone(),
            allow_metadata_only: true,
        };
        let call = Call::post(self, TrafficClass::Retrieve, RETRIEVE_FUTURE, &request);
        let Ok(call) = call else { return true };
        let call = call
            .retry(RetryPolicy::never())
            .accept(PROTOBUF)
            .header("x-tinker-request-type", RequestType::Sample.as_str())
            .timeout(patience);
        match self.send(call).await {
            Ok(answer) if answer.is_protobuf() => true,
            Ok(answer) => {
                let reply = FutureReply::from_json(&answer.body);
                !matches!(reply, Ok(FutureReply::TryAgain(_)))
            }
            Err(error) => !error.is_retryable() && error.status() != Some(408),
        }
    }

    /// Tells the server that nobody waits for a future any more: one attempt.
    ///
    /// Endpoint: `POST /api/v1/cancel_future`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn cancel_future(&self, request_id: &RequestId) -> Result<()> {
        let request = CancelFutureRequest {
            request_id: request_id.clone(),
        };
        let call = Call::post(self, TrafficClass::Retrieve, CANCEL_FUTURE, &request)?
            .retry(RetryPolicy::never())
            .timeout(CANCEL_TIMEOUT);
        self.send(call).await.map(drop)
    }
}
