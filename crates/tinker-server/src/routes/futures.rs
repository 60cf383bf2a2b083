//! Waiting for results and giving them up.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use prost::Message as _;
use tinker_types::{
    CancelFutureRequest, CompletionsTarget, ForwardBackwardOutput, PROTOBUF, QueueState, RequestId,
    RetrieveFutureRequest, RetrieveFuturesRequest, RetrieveFuturesResponse, SampleResponse,
    TryAgain, proto,
};

use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{LARGE_BODY, Parsed, blocking, off_loop};
use crate::completions::SamplerClient;
use crate::core::lock;
use crate::engine::Command;
use crate::future_store::{Lookup, Scope};
use crate::operation::{Form, Outcome};

/// How long a poll is held whose operation cannot run for now.
const HELD_POLL: Duration = Duration::from_secs(2);

/// Holds the request until the result is there, or answers 408 shortly before clients give up.
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    request: Parsed<RetrieveFutureRequest>,
) -> ApiResult<Response> {
    let id = request.value.request_id;
    if app.core.catalog.hides_future(&id) {
        return Err(unknown_future(&id));
    }
    let hold = hold_of(&app, &id);
    let mut found = wait(&app, &id, hold).await;
    if matches!(found, Lookup::Unknown) {
        if let Some(fault) = open_journal_of(&app, &id).await? {
            // Those who are told to try again do so at once.
            tokio::time::sleep(hold.min(HELD_POLL)).await;
            return Ok(try_again(id, Some(Reason::Fault(fault))));
        }
        found = wait(&app, &id, hold).await;
    }
    match found {
        Lookup::Ready(outcome) => answer(&headers, outcome).await,
        Lookup::OnDisk(scope, form) => {
            let body = blocking(&app, move |app| read_result(app, &id, &scope)).await?;
            answer(&headers, Outcome { form, body }).await
        }
        Lookup::Pending(scope) => {
            let of = id.clone();
            let reason = blocking(&app, move |app| Ok(held_back_by(app, &of, &scope))).await?;
            Ok(try_again(id, reason))
        }
        Lookup::Unknown => Err(unknown(&app, &id)),
    }
}

/// Waits for a result up to `hold`, or until others need the connection.
async fn wait(app: &App, id: &RequestId, hold: Duration) -> Lookup {
    let (futures, stop) = (&app.core.futures, app.stop_signal());
    tokio::select! {
        found = futures.wait(id, hold, stop) => found,
        () = app.core.connections.pressing() => futures.wait(id, Duration::ZERO, stop).await,
    }
}

/// How long to hold a poll. One whose operation is held back by a fault is answered sooner, so that
/// people see why.
fn hold_of(app: &App, id: &RequestId) -> Duration {
    let hold = app.poll_hold();
    match app.core.held_by_fault(id) {
        Some(_) => hold.min(HELD_POLL),
        None => hold,
    }
}

/// Logs of runs that nobody used since the start are opened when somebody asks. Returns the passing
/// fault that prevents it.
async fn open_journal_of(app: &Arc<App>, id: &RequestId) -> ApiResult<Option<String>> {
    let id = id.clone();
    blocking(app, move |app| {
        let Some(run) = app.core.run_of(&id) else {
            return Ok(None);
        };
        match app.core.journal(&run) {
            Ok(_) => Ok(None),
            Err(error) if error.is_passing() => Ok(Some(error.with_causes())),
            Err(error) => Err(ApiError::from(error)),
        }
    })
    .await
}

fn read_result(app: &App, id: &RequestId, scope: &Scope) -> ApiResult<Bytes> {
    let body = match scope {
        Scope::Run(run) => {
            let journal = app.core.journal(run)?;
            lock(&journal).result(id)?
        }
        Scope::Samples => app.core.samples().result(id)?,
        Scope::Memory => None,
    };
    body.map(Bytes::from)
        .ok_or_else(|| ApiError::gone(format!("the result of {id} is no longer kept")))
}

async fn answer(headers: &HeaderMap, outcome: Outcome) -> ApiResult<Response> {
    let wants_protobuf = headers
        .get(ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains(PROTOBUF));
    match outcome.form {
        Form::Json | Form::Failed => Ok(typed("application/json", outcome.body)),
        Form::OutputProto | Form::SampleProto if wants_protobuf => {
            Ok(typed(PROTOBUF, outcome.body))
        }
        Form::OutputProto | Form::SampleProto if outcome.body.len() > LARGE_BODY => {
            off_loop(move || as_json(outcome)).await
        }
        Form::OutputProto | Form::SampleProto => as_json(outcome),
    }
}

/// Writes a result for clients that take no protobuf.
fn as_json(outcome: Outcome) -> ApiResult<Response> {
    if outcome.form == Form::SampleProto {
        let message = proto::SampleResponse::decode(outcome.body).map_err(undecodable)?;
        let response = SampleResponse::try_from(&message).map_err(undecodable)?;
        return Ok(Json(response).into_response());
    }
    let message = proto::ForwardBackwardOutput::decode(outcome.body).map_err(undecodable)?;
    let output = ForwardBackwardOutput::try_from(&message).map_err(undecodable)?;
    Ok(Json(output).into_response())
}

fn typed(content_type: &'static str, body: Bytes) -> Response {
    ([(CONTENT_TYPE, content_type)], body).into_response()
}

fn undecodable(error: impl std::fmt::Display) -> ApiError {
    ApiError::internal("the stored result cannot be read", error.to_string())
}

/// Why an operation does not run.
enum Reason {
    /// This earlier one of its run never arrived.
    Missing(u64),
    /// The server's surroundings.
    Fault(String),
    /// So many operations wait, this one among them.
    Turn(usize),
}

fn try_again(id: RequestId, reason: Option<Reason>) -> Response {
    let state = match &reason {
        Some(Reason::Fault(_) | Reason::Turn(_)) => QueueState::PausedCapacity,
        Some(Reason::Missing(_)) | None => QueueState::Active,
    };
    let text = reason.map(|reason| match reason {
        Reason::Missing(seq) => {
            format!("waiting for operation {seq} of this run, which has not arrived")
        }
        Reason::Fault(text) => text,
        Reason::Turn(1) => "it has its turn when what runs now has ended".to_owned(),
        Reason::Turn(n) => {
            format!("{n} operations wait on this server; sessions take turns")
        }
    });
    let body = TryAgain {
        tag: Default::default(),
        queue_state: Some(state),
        queue_state_reason: text,
        request_id: Some(id),
    };
    (StatusCode::REQUEST_TIMEOUT, Json(body)).into_response()
}

fn held_back_by(app: &App, id: &RequestId, scope: &Scope) -> Option<Reason> {
    if let Some(fault) = app.core.held_by_fault(id) {
        return Some(Reason::Fault(fault));
    }
    if let Scope::Run(run) = scope {
        let journal = app.core.journal(run).ok()?;
        let journal = lock(&journal);
        if let Some(missing) = journal.missing_before(journal.next_seq(), id) {
            return Some(Reason::Missing(missing));
        }
    }
    let pending = app.core.pending();
    pending
        .is_waiting(id)
        .then(|| Reason::Turn(pending.n_waiting()))
}

/// A result that was here once is gone for good (sampling clients send the request again); a
/// request nobody made is unknown.
fn unknown(app: &App, id: &RequestId) -> ApiError {
    let owner = id.as_str().rsplit_once(":op:").map(|(owner, _)| owner);
    if is_yet_to_come(app, id) {
        return ApiError::not_found(format!("request {id} has not been accepted by this server"));
    }
    let known_sampler = owner
        .and_then(|o| o.parse().ok())
        .is_some_and(|sampler| app.core.catalog.sampler(&sampler).is_ok());
    if known_sampler || app.core.run_of(id).is_some() {
        return ApiError::gone(format!("the result of {id} is no longer kept"));
    }
    unknown_future(id)
}

fn unknown_future(id: &RequestId) -> ApiError {
    ApiError::not_found(format!("request {id} is unknown to this server"))
}

/// Whether a run is not as far as the operation that is asked for: clients that were told otherwise
/// learn that their run was put back.
fn is_yet_to_come(app: &App, id: &RequestId) -> bool {
    let seq = id.as_str().rsplit_once(":op:").map(|(_, seq)| seq.parse());
    let (Some(run), Some(Ok(seq))) = (app.core.run_of(id), seq) else {
        return false;
    };
    let journal = app.core.journal(&run);
    journal.is_ok_and(|journal| lock(&journal).next_seq() <= seq)
}

/// Says which samples of a client are done, holding the request until one is.
pub(crate) async fn retrieve_many(
    State(app): State<Arc<App>>,
    request: Parsed<RetrieveFuturesRequest>,
) -> ApiResult<Json<RetrieveFuturesResponse>> {
    let request = request.value;
    let CompletionsTarget::SamplingSession {
        sampling_session_id,
        cloned_sampler_id,
    } = request.target;
    let client = SamplerClient {
        sampler: sampling_session_id,
        number: cloned_sampler_id,
    };
    let hold = completions_hold(&app, request.timeout)?;
    let (cursor, retrieved) = (request.prev_cursor, request.retrieved_request_ids);
    let client = blocking(&app, move |app| {
        let core = &app.core;
        core.catalog.sampler(&client.sampler)?;
        let so_far = || core.ended_samples(&client);
        core.completions
            .acknowledge(&client, cursor, &retrieved, so_far);
        Ok(client)
    })
    .await?;
    let (lists, stop) = (&app.core.completions, app.stop_signal());
    let (completions, cursor) = tokio::select! {
        found = lists.wait(&client, hold, stop) => found,
        () = app.core.connections.pressing() => lists.wait(&client, Duration::ZERO, stop).await,
    };
    Ok(Json(RetrieveFuturesResponse {
        completions,
        cursor,
    }))
}

fn completions_hold(app: &App, timeout: Option<f64>) -> ApiResult<Duration> {
    let most = app.poll_hold().min(app.core.limits.completions_hold);
    let Some(seconds) = timeout else {
        return Ok(most);
    };
    match Duration::try_from_secs_f64(seconds) {
        Ok(asked) => Ok(asked.min(most)),
        Err(_) if seconds > 0.0 => Ok(most),
        Err(_) => Err(ApiError::bad_request(format!(
            "timeout {seconds} must be a number of seconds from 0"
        ))),
    }
}

/// Stops a sample that nobody waits for. Training operations are never cancelled: later ones build
/// on them.
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    request: Parsed<CancelFutureRequest>,
) -> ApiResult<StatusCode> {
    let id = request.value.request_id;
    if app.core.catalog.hides_future(&id) {
        return Err(unknown_future(&id));
    }
    app.core.send(Command::Cancel(id));
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    /// An answer in JSON to a sample of so many tokens: whether it was there at once, and its text.
    async fn answered(n_tokens: usize) -> (bool, serde_json::Value) {
        let sequence = proto::SampledSequence {
            stop_reason: proto::StopReason::Length.into(),
            tokens: vec![0; n_tokens * size_of::<i32>()].into(),
            ..Default::default()
        };
        let response = proto::SampleResponse {
            sequences: vec![sequence],
            ..Default::default()
        };
        let outcome = Outcome {
            form: Form::SampleProto,
            body: response.encode_to_vec().into(),
        };
        let headers = HeaderMap::new();
        let mut answer = pin!(answer(&headers, outcome));
        let mut context = Context::from_waker(Waker::noop());
        let (at_once, response) = match answer.as_mut().poll(&mut context) {
            Poll::Ready(response) => (true, response),
            Poll::Pending => (false, answer.await),
        };
        let body = axum::body::to_bytes(response.unwrap().into_body(), usize::MAX);
        let text = serde_json::from_slice(&body.await.unwrap()).unwrap();
        (at_once, text)
    }

    #[tokio::test]
    async fn a_large_result_is_written_off_the_event_loop() {
        let (at_once, small) = answered(10).await;
        assert!(at_once);
        assert_eq!(
            small["sequences"][0]["tokens"].as_array().unwrap().len(),
            10
        );

        let (at_once, large) = answered(1_000_000).await;
        assert!(!at_once, "others had to wait for it");
        let tokens = large["sequences"][0]["tokens"].as_array().unwrap();
        assert_eq!(tokens.len(), 1_000_000);
    }
}
