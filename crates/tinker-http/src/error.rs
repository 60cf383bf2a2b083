//! Errors of the transport, named by what the caller can do.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use tinker_types::{ErrorBody, ErrorCategory};

use crate::capability::capability;
use crate::credentials::CredentialOrigin;

/// Result of the transport.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an error.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Give another key (401).
    Unauthenticated,
    /// Ask for access (403).
    PermissionDenied,
    /// Name something that exists (404).
    NotFound,
    /// Settle who came first (409).
    Conflict,
    /// Correct the request: its values, or how the client is configured.
    InvalidRequest,
    /// Come back later (429).
    RateLimited {
        /// When, if the server said so.
        retry_after: Option<Duration>,
    },
    /// Settle the bill (402).
    BillingPaused,
    /// Submit again: the server forgot the future (410).
    Expired,
    /// Wait longer.
    Timeout,
    /// See whether the server runs.
    Connect,
    /// Report a bug: the answer was not understood.
    Decode,
    /// Try again later: the server failed (5xx).
    Server,
    /// Make room, or name another place: a file could not be read or written.
    File,
    /// Do not trust the sender: what it sent is damaged or meant to do harm.
    Untrusted,
    /// Use another server: this one lacks the endpoint or the feature.
    Unsupported,
}

impl ErrorKind {
    /// What to do next, in a sentence for people: lower case, no final period.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Unauthenticated => "check the API key: it starts with tml- and must be in force",
            Self::PermissionDenied => "ask the owner for access, or use a key that has it",
            Self::NotFound => "list what exists and check the name",
            Self::Conflict => "see what took the name or the number first, then choose another",
            Self::InvalidRequest => "correct the request as the message says",
            Self::RateLimited { .. } => "wait a little, then try again",
            Self::BillingPaused => "settle the account's bill, then try again",
            Self::Expired => "submit again; training goes on from the last checkpoint",
            Self::Timeout => "wait longer, or see whether the server is overloaded",
            Self::Connect => "check the address and whether the server runs",
            Self::Decode => "check that the address is of such a server; if so, report it",
            Self::Server => "try again later, or look into the server's log",
            Self::Unsupported => "use a server that has it, or do without",
            Self::File => "make room, or name another place",
            Self::Untrusted => "do not use what was received; tell who sent it",
        }
    }
}

/// A call that failed, with what is needed to find it in a log.
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    call: Option<(String, String)>,
    status: Option<u16>,
    request_id: Option<String>,
    category: Option<ErrorCategory>,
    attempts: u32,
    may_have_arrived: bool,
    may_have_been_taken: bool,
    elapsed: Duration,
    credential: Option<CredentialOrigin>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            call: None,
            status: None,
            request_id: None,
            category: None,
            attempts: 0,
            may_have_arrived: false,
            may_have_been_taken: false,
            elapsed: Duration::ZERO,
            credential: None,
            source: None,
        }))
    }

    /// The error of a non-2xx answer.
    pub(crate) fn of_status(status: u16, body: &[u8], retry_after: Option<Duration>) -> Self {
        let (detail, category) = read_body(body);
        let kind = if is_missing_route(status, &detail) {
            ErrorKind::Unsupported
        } else {
            kind_of_status(status, retry_after)
        };
        let mut error = Self::new(kind, detail);
        error.0.status = Some(status);
        error.0.category = category;
        error
    }

    pub(crate) fn with_source(
        mut self,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        self.0.source = Some(source.into());
        self
    }

    pub(crate) fn with_request_id(mut self, request_id: Option<String>) -> Self {
        self.0.request_id = request_id.or(self.0.request_id);
        self
    }

    /// Says of which call it is, and of what a server lacks, what that would do.
    pub(crate) fn with_call(mut self, method: &str, route: &str) -> Self {
        if self.0.kind == ErrorKind::Unsupported && self.0.call.is_none() {
            let lacking = capability(method, route);
            self.0.message = format!("this server cannot {lacking}: {}", self.0.message);
        }
        self.0.call = Some((method.to_owned(), route.to_owned()));
        self
    }

    pub(crate) fn with_effort(mut self, attempts: u32, elapsed: Duration) -> Self {
        self.0.attempts = attempts;
        self.0.elapsed = elapsed;
        self
    }

    pub(crate) fn with_arrival(mut self, may_have_arrived: bool) -> Self {
        self.0.may_have_arrived = may_have_arrived;
        self
    }

    pub(crate) fn with_taking(mut self, may_have_been_taken: bool) -> Self {
        self.0.may_have_been_taken = may_have_been_taken;
        self
    }

    /// Says where the credential came from that was refused, if that is what happened.
    pub(crate) fn with_credential(mut self, origin: &CredentialOrigin) -> Self {
        let kind = &self.0.kind;
        if matches!(
            kind,
            ErrorKind::Unauthenticated | ErrorKind::PermissionDenied
        ) {
            self.0.credential.get_or_insert_with(|| origin.clone());
        }
        self
    }

    /// The same error, of a server that lacks something else than an endpoint.
    pub(crate) fn into_unsupported(mut self, lacking: &str) -> Self {
        self.0.kind = ErrorKind::Unsupported;
        self.0.message = format!("this server cannot {lacking}: {}", self.0.message);
        self
    }

    /// What to do next, for people.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        self.0.kind.hint()
    }

    /// What the caller can do.
    #[must_use]
    pub const fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(
            self.0.kind,
            ErrorKind::RateLimited { .. }
                | ErrorKind::Timeout
                | ErrorKind::Connect
                | ErrorKind::Server
                | ErrorKind::Conflict
        )
    }

    /// The server's name of the request or future, if it gave one.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        self.0.request_id.as_deref()
    }

    /// Status of the last answer, if one came.
    #[must_use]
    pub const fn status(&self) -> Option<u16> {
        self.0.status
    }

    /// Whose fault it is, if the server said so.
    #[must_use]
    pub const fn category(&self) -> Option<&ErrorCategory> {
        self.0.category.as_ref()
    }

    /// Where the credential came from that was refused (401, 403) or could not be used, if that is
    /// what happened.
    #[must_use]
    pub const fn credential_origin(&self) -> Option<&CredentialOrigin> {
        self.0.credential.as_ref()
    }

    /// What went wrong, without the call's particulars.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// How often the request was sent.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        self.0.attempts
    }

    /// Whether any of the attempts may have reached the server and taken effect, even if the last
    /// one was refused.
    #[must_use]
    pub const fn may_have_arrived(&self) -> bool {
        self.0.may_have_arrived
    }

    /// Whether any of the attempts that were not answered 409 may have taken effect: what the others
    /// conflict with may be that attempt.
    #[must_use]
    pub const fn may_have_been_taken(&self) -> bool {
        self.0.may_have_been_taken
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Error").field(&self.0).finish()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        f.write_str(&inner.message)?;
        let Some((method, route)) = &inner.call else {
            return Ok(());
        };
        write!(f, " ({method} {route}")?;
        if let Some(status) = inner.status {
            write!(f, ": {status}")?;
        }
        match &inner.credential {
            None | Some(CredentialOrigin::Given) => {}
            Some(origin) => write!(f, ", credential from {origin}")?,
        }
        if let Some(id) = &inner.request_id {
            write!(f, ", request id {id}")?;
        }
        if inner.attempts > 0 {
            let plural = if inner.attempts == 1 { "" } else { "s" };
            let secs = inner.elapsed.as_secs_f64();
            write!(f, ", {} attempt{plural}, {secs:.1}s", inner.attempts)?;
        }
        f.write_str(")")
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0
            .source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

/// Whether a server says that it has no such endpoint, rather than no such thing: the bare 404 of
/// the common Python framework and the answers of our own.
fn is_missing_route(status: u16, detail: &str) -> bool {
    match status {
        405 | 501 => true,
        404 => detail == "Not Found" || detail.ends_with("is not part of this server"),
        _ => false,
    }
}

fn kind_of_status(status: u16, retry_after: Option<Duration>) -> ErrorKind {
    match status {
        401 => ErrorKind::Unauthenticated,
        402 => ErrorKind::BillingPaused,
        403 => ErrorKind::PermissionDenied,
        404 => ErrorKind::NotFound,
        408 => ErrorKind::Timeout,
        409 => ErrorKind::Conflict,
        410 => ErrorKind::Expired,
        429 => ErrorKind::RateLimited { retry_after },
        400..=499 => ErrorKind::InvalidRequest,
        500.. => ErrorKind::Server,
        _ => ErrorKind::Decode,
    }
}

/// The text and category of an error body: `detail`, `message` or `error`, else the body itself.
fn read_body(body: &[u8]) -> (String, Option<ErrorCategory>) {
    let json = serde_json::from_slice::<serde_json::Value>(body).unwrap_or_default();
    let category = json
        .get("category")
        .and_then(|value| value.as_str())
        .map(|text| ErrorCategory::from(text.to_ascii_lowercase().as_str()));
    let detail = serde_json::from_slice::<ErrorBody>(body)
        .map(|error| error.detail)
        .ok()
        .or_else(|| json.get("message").cloned())
        .or_else(|| json.get("error").cloned());
    let text = match detail {
        Some(serde_json::Value::String(text)) => text,
        Some(other) => other.to_string(),
        None => String::from_utf8_lossy(body).trim().to_owned(),
    };
    let text = if text.is_empty() {
        "the server gave no reason".to_owned()
    } else {
        text.chars().take(2000).collect()
    };
    (text, category)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_a_kind() {
        for (status, expected) in [
            (302, ErrorKind::Decode),
            (400, ErrorKind::InvalidRequest),
            (401, ErrorKind::Unauthenticated),
            (402, ErrorKind::BillingPaused),
            (403, ErrorKind::PermissionDenied),
            (404, ErrorKind::NotFound),
            (408, ErrorKind::Timeout),
            (409, ErrorKind::Conflict),
            (410, ErrorKind::Expired),
            (413, ErrorKind::InvalidRequest),
            (422, ErrorKind::InvalidRequest),
            (429, ErrorKind::RateLimited { retry_after: None }),
            (500, ErrorKind::Server),
            (503, ErrorKind::Server),
        ] {
            assert_eq!(kind_of_status(status, None), expected, "{status}");
        }
    }

    #[test]
    fn a_missing_endpoint_is_told_from_a_missing_thing() {
        let of = |status, body: &str| Error::of_status(status, body.as_bytes(), None);

        for (status, body) in [
            (404, r#"{"detail":"Not Found"}"#),
            (404, r#"{"detail":"GET /x is not part of this server"}"#),
            (405, r#"{"detail":"Method Not Allowed"}"#),
            (501, ""),
        ] {
            assert_eq!(*of(status, body).kind(), ErrorKind::Unsupported, "{body}");
        }
        for body in ["", "<html>", r#"{"detail":"no run named x"}"#] {
            assert_eq!(*of(404, body).kind(), ErrorKind::NotFound, "{body}");
        }
        assert_eq!(
            of(404, r#"{"detail":"Not Found"}"#)
                .with_call("GET", "/api/v1/sessions")
                .to_string(),
            "this server cannot list sessions: Not Found (GET /api/v1/sessions: 404)"
        );
    }

    #[test]
    fn names_the_call_the_values_and_the_effort() {
        let error = Error::of_status(404, br#"{"detail":"no such run"}"#, None)
            .with_call("GET", "/api/v1/training_runs/{id}")
            .with_request_id(Some("9f2c".into()))
            .with_effort(1, Duration::from_millis(230));

        assert_eq!(
            error.to_string(),
            "no such run (GET /api/v1/training_runs/{id}: 404, request id 9f2c, 1 attempt, 0.2s)"
        );
    }

    #[test]
    fn reads_text_structures_and_categories_of_error_bodies() {
        let check = |body: &str, text: &str, category: Option<ErrorCategory>| {
            assert_eq!(read_body(body.as_bytes()), (text.to_owned(), category));
        };

        check(
            r#"{"detail":"x","category":"User"}"#,
            "x",
            Some(ErrorCategory::User),
        );
        check(r#"{"detail":[{"loc":1}]}"#, r#"[{"loc":1}]"#, None);
        check(r#"{"message":"m"}"#, "m", None);
        check("<html>", "<html>", None);
        check("", "the server gave no reason", None);
    }
}
