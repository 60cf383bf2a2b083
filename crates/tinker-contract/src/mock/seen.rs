//! A request as the double saw it.

use std::collections::BTreeMap;
use std::time::Instant;

use prost::Message;
use serde_json::Value;
use tinker_types::{ForwardBackwardRequest, proto};
use wiremock::Request;

/// One request.
#[derive(Debug, Clone)]
pub struct Seen {
    /// `GET`, `POST`, …
    pub method: String,
    /// Path without query.
    pub path: String,
    /// Query, empty if none.
    pub query: String,
    /// Headers by lower-case name.
    pub headers: BTreeMap<String, String>,
    /// Body, decompressed.
    pub body: Vec<u8>,
    /// When it was answered.
    pub at: Instant,
}

impl Seen {
    pub(super) fn new(request: &Request) -> Self {
        let headers: BTreeMap<String, String> = request
            .headers
            .iter()
            .map(|(name, value)| {
                (
                    name.as_str().to_owned(),
                    String::from_utf8_lossy(value.as_bytes()).into_owned(),
                )
            })
            .collect();
        let compressed = headers
            .get("content-encoding")
            .is_some_and(|name| name == "zstd");
        let body = if compressed {
            zstd::decode_all(&request.body[..]).expect("a zstd frame")
        } else {
            request.body.clone()
        };
        Self {
            method: request.method.to_string(),
            path: request.url.path().to_owned(),
            query: request.url.query().unwrap_or_default().to_owned(),
            headers,
            body,
            at: Instant::now(),
        }
    }

    /// The JSON body; null if there is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// A header, by lower-case name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The protobuf body of a forward-backward request.
    ///
    /// # Panics
    /// If it is not one.
    #[must_use]
    pub fn forward_backward(&self) -> ForwardBackwardRequest {
        let message = proto::ForwardBackwardRequest::decode(&self.body[..]).expect("protobuf");
        ForwardBackwardRequest::try_from(&message).expect("a forward-backward request")
    }

    /// `seq_id`, whatever the encoding of the body.
    #[must_use]
    pub fn seq_id(&self) -> u64 {
        if self.path == tinker_types::FORWARD_BACKWARD {
            return self.forward_backward().seq_id;
        }
        self.json()["seq_id"].as_u64().unwrap_or_default()
    }
}
