//! Forward, forward-backward and optimizer steps.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use prost::Message as _;
use serde::Deserialize;
use tinker_types::{
    Datum, ForwardBackwardRequest, LossConfig, LossFn, TrainingRunId, TypeError, UntypedFuture,
    proto,
};

use super::Numbered;
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Body, Parsed, blocking, parse_json};
use crate::operation::OpKind;

pub(crate) async fn forward_backward(
    State(app): State<Arc<App>>,
    body: Body,
) -> ApiResult<Json<UntypedFuture>> {
    accept(&app, body).await
}

/// The path that clients before protobuf used; the flag in the message decides.
pub(crate) async fn forward(
    State(app): State<Arc<App>>,
    body: Body,
) -> ApiResult<Json<UntypedFuture>> {
    accept(&app, body).await
}

async fn accept(app: &Arc<App>, body: Body) -> ApiResult<Json<UntypedFuture>> {
    blocking(app, move |app| {
        let bytes = if body.is_protobuf {
            body.bytes
        } else {
            from_json(&body.bytes)?.into()
        };
        let message = proto::ForwardBackwardRequest::decode(bytes.clone()).map_err(|error| {
            ApiError::bad_request(format!("the body is not a ForwardBackwardRequest: {error}"))
        })?;
        let run: TrainingRunId = message.model_id.parse().map_err(bad)?;
        let seq = u64::try_from(message.seq_id).unwrap_or(0);
        // What is wrong with the data is the operation's result: the number is used up, and the
        // run's later operations do not wait for it.
        app.submit_numbered(&run, seq, OpKind::ForwardBackward, &bytes)
    })
    .await
    .map(Json)
}

/// The JSON form of old clients.
#[derive(Deserialize)]
struct JsonRequest {
    model_id: TrainingRunId,
    #[serde(default)]
    seq_id: u64,
    #[serde(default)]
    forward_backward_input: Option<JsonInput>,
    #[serde(default)]
    forward_input: Option<JsonInput>,
}

#[derive(Deserialize)]
struct JsonInput {
    data: Vec<Datum>,
    loss_fn: LossFn,
    #[serde(default)]
    loss_fn_config: Option<LossConfig>,
}

/// Re-encodes a JSON request as protobuf, the one form in the log.
fn from_json(bytes: &[u8]) -> ApiResult<Vec<u8>> {
    let request: JsonRequest = parse_json(bytes)?;
    let (input, forward_only) = match (request.forward_backward_input, request.forward_input) {
        (Some(input), None) => (input, false),
        (None, Some(input)) => (input, true),
        _ => {
            return Err(ApiError::unprocessable(
                "the body takes exactly one of forward_backward_input and forward_input",
            ));
        }
    };
    let request = ForwardBackwardRequest {
        model_id: request.model_id,
        seq_id: request.seq_id,
        data: input.data,
        loss_fn: input.loss_fn,
        loss_fn_config: input.loss_fn_config.unwrap_or_default(),
        forward_only,
    };
    let message = proto::ForwardBackwardRequest::try_from(&request).map_err(bad)?;
    Ok(message.encode_to_vec())
}

pub(crate) async fn optim_step(
    State(app): State<Arc<App>>,
    request: Parsed<Numbered>,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(&app, move |app| {
        let Numbered { model_id, seq_id } = &request.value;
        app.submit_numbered(model_id, *seq_id, OpKind::OptimStep, &request.bytes)
    })
    .await
    .map(Json)
}

pub(crate) async fn zero_grad(
    State(app): State<Arc<App>>,
    request: Parsed<Numbered>,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(&app, move |app| {
        let Numbered { model_id, seq_id } = &request.value;
        app.submit_numbered(model_id, *seq_id, OpKind::ZeroGrad, &request.bytes)
    })
    .await
    .map(Json)
}

pub(crate) async fn gradient_stats(
    State(app): State<Arc<App>>,
    request: Parsed<Numbered>,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(&app, move |app| {
        let Numbered { model_id, seq_id } = &request.value;
        app.submit_numbered(model_id, *seq_id, OpKind::GradientStats, &request.bytes)
    })
    .await
    .map(Json)
}

fn bad(error: TypeError) -> ApiError {
    ApiError::bad_request(error.to_string())
}
