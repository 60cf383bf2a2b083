//! What a refused request gets back: a status, a text for people, and a detail for the log alone.

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use tinker_types::ErrorBody;

use crate::error::Error;

/// Result of a handler.
pub(crate) type ApiResult<T> = Result<T, ApiError>;

/// A refusal.
///
/// Clients retry 408, 409, 429 and 5xx for minutes, so those never stand for a permanent mistake;
/// and they take an empty 400 for a broken proxy, so there is always a body.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    detail: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            detail: None,
        }
    }

    /// The status of the answer.
    pub(crate) const fn status(&self) -> StatusCode {
        self.status
    }

    /// The text for people.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// 400: the request makes no sense as it stands.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 401: no or a wrong token.
    pub(crate) fn unauthenticated(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, message)
    }

    /// 403: a browser page or a foreign host name.
    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    /// 404: no such thing.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// 405: the path exists, the method does not.
    pub(crate) fn method_not_allowed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, message)
    }

    /// 410: it was there once; sampling clients send the request again.
    pub(crate) fn gone(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GONE, message)
    }

    /// 413: the body is larger than the server reads.
    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    }

    /// 422: well formed, but its values contradict each other or an earlier request.
    pub(crate) fn unprocessable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, message)
    }

    /// 429: back-pressure; the same request will be accepted later. The answer says to wait a second.
    pub(crate) fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, message)
    }

    /// 503: the server is stopping; the same request will be accepted after a restart.
    pub(crate) fn stopping() -> Self {
        Self::unavailable("the server is stopping")
    }

    /// 503: the server cannot do its work, for a while or until somebody sees to it.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// 500: our fault. The detail goes to the log, not to the client.
    pub(crate) fn internal(message: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            detail: Some(detail.into()),
            ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
        }
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        match error {
            Error::NotFound(message) => Self::not_found(message),
            Error::Invalid(message) | Error::NoMemory(message) => Self::bad_request(message),
            // Not 409: clients would retry it for minutes.
            Error::Conflict(message) => Self::unprocessable(message),
            // There is room once something was deleted.
            Error::OverQuota(message) | Error::AwaitsMemory { message, .. } => Self::busy(message),
            Error::Engine(tinker_engine::Error::Invalid(message)) => Self::bad_request(message),
            Error::Engine(error @ tinker_engine::Error::Model { .. }) => {
                Self::bad_request(error.to_string())
            }
            Error::Stopping => Self::stopping(),
            // The path in a disk error is the user's own: it is their machine.
            Error::Io { .. } => Self::internal(error.to_string(), error.with_causes()),
            Error::Corrupt { .. } | Error::Newer { .. } => Self::bad_request(error.to_string()),
            other => Self::internal("internal error; see the server's log", other.with_causes()),
        }
    }
}

impl ApiError {
    /// Notes the refusal in the log.
    pub(crate) fn log(&self) {
        if let Some(detail) = &self.detail {
            tracing::error!(status = self.status.as_u16(), detail, "request failed");
        } else {
            tracing::debug!(
                status = self.status.as_u16(),
                message = self.message,
                "request refused"
            );
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.log();
        let is_busy = self.status == StatusCode::TOO_MANY_REQUESTS;
        let body = Json(ErrorBody::new(self.message));
        if is_busy {
            return (self.status, [(header::RETRY_AFTER, "1")], body).into_response();
        }
        (self.status, body).into_response()
    }
}
