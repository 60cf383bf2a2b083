//! Waiting for results and giving them up.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use prost::Message as _;
use tinker_types::{
    CancelFutureRequest, ForwardBackwardOutput, PROTOBUF, QueueState, RequestId,
    RetrieveFutureRequest, SampleResponse, TryAgain, proto,
};

use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Parsed, blocking};
use crate::core::lock;
use crate::engine::Command;
use crate::future_store::{Lookup, Scope};
use crate::operation::{Form, Outcome};

/// Holds the request until the result is there, or answers 408 shortly before clients give up.
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    request: Parsed<RetrieveFutureRequest>,
) -> ApiResult<Response> {
    let id = request.value.request_id;
    let hold = app.poll_hold();
    let mut found = app.core.futures.wait(&id, hold, app.stop_signal()).await;
    if matches!(found, Lookup::Unknown) {
        open_journal_of(&app, &id).await?;
        found = app.core.futures.wait(&id, hold, app.stop_signal()).await;
    }
    match found {
        Lookup::Ready(outcome) => answer(&headers, outcome),
        Lookup::OnDisk(scope, form, location) => {
            let body = blocking(&app, move |app| read_result(app, &scope, location)).await?;
            answer(&headers, Outcome { form, body })
        }
        Lookup::Pending(scope) => try_again(&app, id, scope).await,
        Lookup::Unknown => Err(unknown(&app, &id)),
    }
}

/// Logs of runs that nobody used since the start are opened when somebody asks.
async fn open_journal_of(app: &Arc<App>, id: &RequestId) -> ApiResult<()> {
    let id = id.clone();
    blocking(app, move |app| match app.core.run_of(&id) {
        Some(run) => app.core.journal(&run).map(drop).map_err(ApiError::from),
        None => Ok(()),
    })
    .await
}

fn read_result(
    app: &App,
    scope: &Scope,
    location: crate::segment_log::Location,
) -> ApiResult<Bytes> {
    let body = match scope {
        Scope::Run(run) => {
            let journal = app.core.journal(run)?;
            lock(&journal).result(location)
        }
        Scope::Samples => app.core.samples().result(location),
        Scope::Memory => return Err(ApiError::gone("the result is no longer kept")),
    };
    Ok(body?.into())
}

fn answer(headers: &HeaderMap, outcome: Outcome) -> ApiResult<Response> {
    let wants_protobuf = headers
        .get(ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains(PROTOBUF));
    match outcome.form {
        Form::Json | Form::Failed => Ok(typed("application/json", outcome.body)),
        Form::OutputProto | Form::SampleProto if wants_protobuf => {
            Ok(typed(PROTOBUF, outcome.body))
        }
        Form::OutputProto => {
            let message =
                proto::ForwardBackwardOutput::decode(outcome.body).map_err(undecodable)?;
            let output = ForwardBackwardOutput::try_from(&message).map_err(undecodable)?;
            Ok(Json(output).into_response())
        }
        Form::SampleProto => {
            let message = proto::SampleResponse::decode(outcome.body).map_err(undecodable)?;
            let response = SampleResponse::try_from(&message).map_err(undecodable)?;
            Ok(Json(response).into_response())
        }
    }
}

fn typed(content_type: &'static str, body: Bytes) -> Response {
    ([(CONTENT_TYPE, content_type)], body).into_response()
}

fn undecodable(error: impl std::fmt::Display) -> ApiError {
    ApiError::internal("the stored result cannot be read", error.to_string())
}

async fn try_again(app: &Arc<App>, id: RequestId, scope: Scope) -> ApiResult<Response> {
    let of = id.clone();
    let held_back = blocking(app, move |app| Ok(held_back_by(app, &of, &scope))).await?;
    let body = TryAgain {
        tag: Default::default(),
        queue_state: Some(QueueState::Active),
        queue_state_reason: held_back,
        request_id: Some(id),
    };
    Ok((StatusCode::REQUEST_TIMEOUT, Json(body)).into_response())
}

/// Why an operation does not run, if an earlier one of its run never arrived.
fn held_back_by(app: &App, id: &RequestId, scope: &Scope) -> Option<String> {
    let Scope::Run(run) = scope else {
        return None;
    };
    let journal = app.core.journal(run).ok()?;
    let journal = lock(&journal);
    let missing = journal.missing_before(journal.next_seq(), id)?;
    Some(format!(
        "waiting for operation {missing} of this run, which has not arrived"
    ))
}

/// A result that was here once is gone for good (sampling clients send the request again); a
/// request nobody made is unknown.
fn unknown(app: &App, id: &RequestId) -> ApiError {
    let owner = id.as_str().rsplit_once(":op:").map(|(owner, _)| owner);
    let known_sampler = owner
        .and_then(|o| o.parse().ok())
        .is_some_and(|sampler| app.core.catalog.sampler(&sampler).is_ok());
    if known_sampler || app.core.run_of(id).is_some() {
        return ApiError::gone(format!("the result of {id} is no longer kept"));
    }
    ApiError::not_found(format!("request {id} is unknown to this server"))
}

/// Stops a sample that nobody waits for. Training operations are never cancelled: later ones build
/// on them.
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    request: Parsed<CancelFutureRequest>,
) -> ApiResult<StatusCode> {
    app.core.send(Command::Cancel(request.value.request_id));
    Ok(StatusCode::NO_CONTENT)
}
