//! One request to be sent, perhaps several times, and its answer.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tinker_types::PROTOBUF;
use url::Url;

use crate::client::Client;
use crate::error::{Error, ErrorKind, Result};
use crate::machine::RetryPolicy;
use crate::pools::TrafficClass;

/// Content type of JSON bodies.
pub(crate) const JSON: &str = "application/json";

/// Which credential a call carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Credential {
    /// The API key: the calls that come before a token exists.
    RawKey,
    /// The token if the server asks for one, else the key.
    TokenOrKey,
}

/// A request: the same bytes however often it is sent.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) class: TrafficClass,
    /// The connections to use instead of those of the class.
    pub(crate) apart: Option<reqwest::Client>,
    pub(crate) credential: Credential,
    pub(crate) body: Option<Body>,
    pub(crate) accept: &'static str,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) retry: RetryPolicy,
    /// Report a 429 at once instead of repeating the call.
    pub(crate) surface_throttling: bool,
    /// Report a 409 at once: what is asked for is so already.
    pub(crate) surface_conflict: bool,
    /// Return an answer that points elsewhere instead of reporting it.
    pub(crate) surface_redirect: bool,
}

/// An encoded body.
#[derive(Debug, Clone)]
pub(crate) struct Body {
    pub(crate) content_type: &'static str,
    pub(crate) zstd: bool,
    pub(crate) bytes: Bytes,
}

impl Body {
    /// A JSON body.
    pub(crate) fn json(value: &impl Serialize) -> Result<Self> {
        let bytes = serde_json::to_vec(value).map_err(|error| {
            Error::new(
                ErrorKind::InvalidRequest,
                "the request cannot be written as JSON",
            )
            .with_source(error)
        })?;
        Ok(Self {
            content_type: JSON,
            zstd: false,
            bytes: bytes.into(),
        })
    }
}

impl Call {
    pub(crate) fn new(client: &Client, method: Method, class: TrafficClass, url: Url) -> Self {
        let mut headers = Vec::new();
        if method != Method::GET {
            let key = format!("tinker-rust-retry-{}", uuid::Uuid::new_v4());
            headers.push(("x-idempotency-key", key));
        }
        Self {
            method,
            url,
            class,
            apart: None,
            credential: Credential::TokenOrKey,
            body: None,
            accept: JSON,
            headers,
            timeout: None,
            retry: client.retry_policy().clone(),
            surface_throttling: false,
            surface_conflict: false,
            surface_redirect: false,
        }
    }

    pub(crate) fn get(client: &Client, class: TrafficClass, url: Url) -> Self {
        Self::new(client, Method::GET, class, url)
    }

    pub(crate) fn post(
        client: &Client,
        class: TrafficClass,
        route: &str,
        body: &impl Serialize,
    ) -> Result<Self> {
        let url = client.base_url().join(route, []);
        Ok(Self::new(client, Method::POST, class, url).body(Body::json(body)?))
    }

    pub(crate) fn body(mut self, body: Body) -> Self {
        self.body = Some(body);
        self
    }

    pub(crate) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Uses connections apart from the client's, for a runtime that depends on no other.
    pub(crate) fn apart(mut self, pool: Option<reqwest::Client>) -> Self {
        self.apart = pool;
        self
    }

    pub(crate) const fn accept(mut self, content_type: &'static str) -> Self {
        self.accept = content_type;
        self
    }

    pub(crate) const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    pub(crate) fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    pub(crate) const fn surface_throttling(mut self) -> Self {
        self.surface_throttling = true;
        self
    }

    pub(crate) const fn surface_conflict(mut self) -> Self {
        self.surface_conflict = true;
        self
    }

    pub(crate) const fn surface_redirect(mut self) -> Self {
        self.surface_redirect = true;
        self
    }

    pub(crate) const fn with_raw_key(mut self) -> Self {
        self.credential = Credential::RawKey;
        self
    }
}

/// An answer, whatever its status.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) content_type: String,
    pub(crate) body: Bytes,
    pub(crate) retry_after: Option<Duration>,
    pub(crate) should_retry: Option<bool>,
    pub(crate) token_refused: bool,
    pub(crate) request_id: Option<String>,
    pub(crate) location_host: Option<String>,
    /// Where the answer points, in full: it may be signed.
    pub(crate) location: Option<Url>,
    /// The call it answers and what that took; set once the call has succeeded.
    pub(crate) origin: Option<Origin>,
}

/// Which call an answer belongs to, for errors found while reading it.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) method: Method,
    pub(crate) route: String,
    pub(crate) attempts: u32,
    pub(crate) elapsed: Duration,
}

impl Answer {
    pub(crate) fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// Whether it points elsewhere.
    pub(crate) fn is_redirect(&self) -> bool {
        (300..400).contains(&self.status) && self.location.is_some()
    }

    pub(crate) fn is_protobuf(&self) -> bool {
        self.content_type.contains(PROTOBUF)
    }

    pub(crate) fn has_empty_body(&self) -> bool {
        self.body.iter().all(u8::is_ascii_whitespace)
    }

    /// Reads a JSON body.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.body).map_err(|error| {
            let kind = if self.content_type.is_empty() {
                "no content type"
            } else {
                &self.content_type
            };
            let error = Error::new(
                ErrorKind::Decode,
                format!("the answer ({}, {kind}) was not understood", self.status),
            )
            .with_source(error)
            .with_arrival(true)
            .with_request_id(self.request_id.clone());
            match &self.origin {
                None => error,
                Some(origin) => error
                    .with_call(origin.method.as_str(), &origin.route)
                    .with_effort(origin.attempts, origin.elapsed),
            }
        })
    }

    /// The error that a non-2xx answer amounts to.
    pub(crate) fn error(&self) -> Error {
        if (300..400).contains(&self.status) {
            let host = self.location_host.as_deref().unwrap_or("nowhere");
            return Error::new(
                ErrorKind::Decode,
                format!(
                    "unexpected redirect ({}) to {host}; the key is not sent there",
                    self.status
                ),
            );
        }
        Error::of_status(self.status, &self.body, self.retry_after)
            .with_request_id(self.request_id.clone())
    }
}
