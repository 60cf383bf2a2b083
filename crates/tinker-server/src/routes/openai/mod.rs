//! The OpenAI-compatible endpoints: models, text completions and chat completions.

mod chat;
mod chat_stream;
mod completions;
mod models;

pub(crate) use chat::create as chat;
pub(crate) use completions::create as completions;
pub(crate) use models::{get as model, list as models};

use std::convert::Infallible;

use axum::Json;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::api_error::{ApiError, ApiResult};
use crate::clock::now;

/// A refusal in the form of this API.
#[derive(Debug)]
pub(crate) struct OpenAiError(ApiError);

impl From<ApiError> for OpenAiError {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl OpenAiError {
    fn body(&self) -> Value {
        let kind = match self.0.status().as_u16() {
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.0.message(), "type": kind, "param": null, "code": null}})
    }
}

impl IntoResponse for OpenAiError {
    fn into_response(self) -> Response {
        self.0.log();
        (self.0.status(), Json(self.body())).into_response()
    }
}

/// One text or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "stop takes a string or a list of strings")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// What both kinds of completion take beside what they continue.
#[derive(Debug, Deserialize)]
struct Common {
    model: String,
    #[serde(default = "one")]
    n: u32,
    #[serde(default)]
    temperature: Option<f64>,
    #[serde(default)]
    top_p: Option<f64>,
    /// Not in OpenAI's API; other servers have it.
    #[serde(default)]
    top_k: Option<i64>,
    #[serde(default)]
    seed: Option<i64>,
    #[serde(default)]
    stop: Option<OneOrMany>,
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    stream_options: Option<StreamOptions>,
    #[serde(default)]
    presence_penalty: f64,
    #[serde(default)]
    frequency_penalty: f64,
    #[serde(default)]
    logit_bias: Option<serde_json::Map<String, Value>>,
}

const fn one() -> u32 {
    1
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

impl Common {
    /// Refuses what would silently be ignored.
    fn check(&self) -> ApiResult<()> {
        let has_bias = self
            .logit_bias
            .as_ref()
            .is_some_and(|bias| !bias.is_empty());
        let unsupported = [
            ("presence_penalty", self.presence_penalty != 0.0),
            ("frequency_penalty", self.frequency_penalty != 0.0),
            ("logit_bias", has_bias),
        ];
        refuse_any(&unsupported)
    }

    fn include_usage(&self) -> bool {
        self.stream_options.unwrap_or_default().include_usage
    }
}

fn refuse_any(unsupported: &[(&str, bool)]) -> ApiResult<()> {
    match unsupported.iter().find(|(_, is_set)| *is_set) {
        Some((name, _)) => Err(ApiError::bad_request(format!(
            "{name} is not supported by this server: leave it out"
        ))),
        None => Ok(()),
    }
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

impl Usage {
    const fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

/// Seconds since 1970.
fn created() -> i64 {
    now() / 1000
}

fn new_id(prefix: &str) -> String {
    format!("{prefix}-{}", uuid::Uuid::new_v4().simple())
}

/// A chunk of a stream.
fn event(value: &Value) -> Result<Event, Infallible> {
    Ok(Event::default().data(value.to_string()))
}

/// What ends a stream.
fn done() -> Result<Event, Infallible> {
    Ok(Event::default().data("[DONE]"))
}

/// A failure after the stream has begun.
fn failed(error: ApiError) -> Result<Event, Infallible> {
    let error = OpenAiError(error);
    error.0.log();
    event(&error.body())
}
