//! The `tracing` spans of the transport: `attempt` around every request that is sent, `future`
//! around the wait for every result. Without a subscriber they cost nothing.

use tinker_types::{QueueState, RequestId};
use tracing::Span;
use tracing::field::{Empty, display};

use crate::call::{Answer, Call};
use crate::error::Result;
use crate::request_type::RequestType;
use crate::send::NoAnswer;

/// One request: `method`, `route`, `attempt` from 0; then `status` and the server's `request.id` of
/// the answer, or the `error`.
pub(crate) fn attempt(call: &Call, attempt: u32) -> Span {
    tracing::debug_span!(
        "attempt",
        method = %call.method,
        route = call.url.path(),
        attempt,
        status = Empty,
        request.id = Empty,
        error = Empty,
    )
}

/// Notes what came of an attempt.
pub(crate) fn note_outcome(span: &Span, result: &Result<Answer, NoAnswer>) {
    if span.is_disabled() {
        return;
    }
    match result {
        Ok(answer) => {
            span.record("status", answer.status);
            if let Some(id) = &answer.request_id {
                span.record("request.id", id);
            }
        }
        Err(none) => {
            span.record("error", display(&none.error));
        }
    }
}

/// The wait for a result: `request.id`, `operation`; then, as they change, how often it was asked
/// for as `attempt`, and `queue.state` and `queue.reason`.
pub(crate) fn future(request_id: &RequestId, operation: RequestType) -> Span {
    tracing::debug_span!(
        "future",
        request.id = %request_id,
        operation = operation.as_str(),
        attempt = Empty,
        queue.state = Empty,
        queue.reason = Empty,
    )
}

/// Notes in the span of a future how often it was asked for.
pub(crate) fn note_ask(attempt: u32) {
    Span::current().record("attempt", attempt);
}

/// Notes in the span of a future what queue it waits in.
pub(crate) fn note_queue(state: &QueueState, reason: Option<&str>) {
    let span = Span::current();
    span.record("queue.state", display(state));
    if let Some(reason) = reason {
        span.record("queue.reason", reason);
    }
}
