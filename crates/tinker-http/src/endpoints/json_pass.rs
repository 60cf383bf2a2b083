//! Passes in JSON, for servers from before protobuf, such as SkyRL's releases.

use prost::Message;
use serde::Serialize;
use tinker_types::{
    Datum, FORWARD, FORWARD_BACKWARD, ForwardBackwardRequest, LossConfig, LossFn, TrainingRunId,
    proto,
};

use crate::call::Body;
use crate::error::{Error, ErrorKind, Result};

/// What the loss is computed of.
#[derive(Serialize)]
struct Input<'a> {
    data: &'a [Datum],
    loss_fn: &'a LossFn,
    loss_fn_config: &'a LossConfig,
}

/// The body: one of the two inputs is given.
#[derive(Serialize)]
struct Pass<'a> {
    model_id: &'a TrainingRunId,
    seq_id: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    forward_backward_input: Option<Input<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    forward_input: Option<Input<'a>>,
}

/// Whether a server refused a pass because it is not JSON: by its type, or because there is no
/// object where pydantic expects the body.
pub(super) fn is_wanted(error: &Error) -> bool {
    let is_about_the_body = || {
        let text = error.message();
        text.contains("valid dictionary or object") || text.contains("JSON decode error")
    };
    match error.status() {
        Some(415) => true,
        Some(400 | 422) => is_about_the_body(),
        _ => false,
    }
}

/// The route and the JSON body of a pass that was encoded in protobuf.
pub(super) async fn of(body: Body) -> Result<(&'static str, Body)> {
    let translated = tokio::task::spawn_blocking(move || translate(&body));
    translated
        .await
        .map_err(|error| fault("encoding the request stopped", error))?
}

fn translate(body: &Body) -> Result<(&'static str, Body)> {
    let plain;
    let bytes = if body.zstd {
        plain = zstd::decode_all(&body.bytes[..])
            .map_err(|error| fault("the request cannot be decompressed", error))?;
        &plain[..]
    } else {
        &body.bytes[..]
    };
    let message = proto::ForwardBackwardRequest::decode(bytes)
        .map_err(|error| fault("the request is not valid protobuf", error))?;
    let request = ForwardBackwardRequest::try_from(&message)
        .map_err(|error| fault("the request cannot be written as JSON", error))?;
    let input = Some(Input {
        data: &request.data,
        loss_fn: &request.loss_fn,
        loss_fn_config: &request.loss_fn_config,
    });
    let (route, forward_backward_input, forward_input) = if request.forward_only {
        (FORWARD, None, input)
    } else {
        (FORWARD_BACKWARD, input, None)
    };
    let body = Body::json(&Pass {
        model_id: &request.model_id,
        seq_id: request.seq_id,
        forward_backward_input,
        forward_input,
    })?;
    Ok((route, body))
}

fn fault(text: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::InvalidRequest, text).with_source(source)
}
