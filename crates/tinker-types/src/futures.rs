//! Futures: what a submitted operation is answered with, and how its result is fetched.

use serde::{Deserialize, Serialize};

use crate::tags::{type_tag, wire_enum};
use crate::{RequestId, TrainingRunId};

type_tag!(TryAgainTag, "try_again");

/// Answer of every endpoint that submits work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UntypedFuture {
    /// What to ask for the result by.
    pub request_id: RequestId,
    /// The training run it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_id: Option<TrainingRunId>,
    /// One name per sample, of sampling requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_sequence_ids: Option<Vec<String>>,
}

/// Request of `POST /api/v1/retrieve_future`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetrieveFutureRequest {
    /// The future.
    pub request_id: RequestId,
    /// Whether the server may answer with [`CompleteMetadata`] first.
    #[serde(default)]
    pub allow_metadata_only: bool,
}

wire_enum! {
    /// Whether the queue that a request waits in moves.
    QueueState {
        /// Work is being done.
        Active = "active",
        /// Held back by a rate limit.
        PausedRateLimit = "paused_rate_limit",
        /// Held back for want of capacity.
        PausedCapacity = "paused_capacity",
    }
}

/// "Not yet": body of a 408 answer, or a 200 answer of some servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TryAgain {
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: TryAgainTag,
    /// The future.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<RequestId>,
    /// Whether its queue moves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_state: Option<QueueState>,
    /// Why it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_state_reason: Option<String>,
}

wire_enum! {
    /// The literal `complete_metadata` in a `status` field.
    CompleteStatus {
        /// The result is ready and large; ask again for it.
        CompleteMetadata = "complete_metadata",
    }
}

/// "Ready, and this large": lets a client reserve memory before it fetches a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompleteMetadata {
    /// Literal status.
    pub status: CompleteStatus,
    /// The future.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<RequestId>,
    /// Size of the result in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_payload_size: Option<u64>,
}

wire_enum! {
    /// Whose fault a failure is.
    ErrorCategory {
        /// The request was wrong; sending it again fails again.
        User = "user",
        /// The server failed.
        Server = "server",
    }
}

/// The result of a failed operation, sent with status 200.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedFuture {
    /// What went wrong.
    pub error: String,
    /// Whose fault it is.
    #[serde(default = "unknown_category")]
    pub category: ErrorCategory,
}

fn unknown_category() -> ErrorCategory {
    ErrorCategory::Unknown("unknown".into())
}

/// What a JSON answer of `retrieve_future` says, in the official client's order of interpretation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FutureReply {
    /// Not yet.
    TryAgain(TryAgain),
    /// Ready; ask again with `allow_metadata_only` false.
    MetadataOnly(CompleteMetadata),
    /// It failed.
    Failed(FailedFuture),
    /// The body is the result.
    Result,
}

impl FutureReply {
    /// Classifies a 2xx JSON body.
    ///
    /// # Errors
    /// If the body is not a JSON object.
    pub fn from_json(body: &[u8]) -> Result<Self, serde_json::Error> {
        let probe: Probe<'_> = serde_json::from_slice(body)?;
        Ok(if probe.tag.as_deref() == Some("try_again") {
            Self::TryAgain(serde_json::from_slice(body)?)
        } else if probe.status.as_deref() == Some("complete_metadata") {
            Self::MetadataOnly(serde_json::from_slice(body)?)
        } else if let Some(error) = probe.error {
            Self::Failed(FailedFuture {
                error: text_of(&error),
                category: probe
                    .category
                    .map_or_else(unknown_category, |c| category_of(&c)),
            })
        } else {
            Self::Result
        })
    }
}

/// The few keys that tell answers apart; values of odd types are tolerated.
#[derive(Deserialize)]
struct Probe<'a> {
    #[serde(rename = "type", default, borrow, deserialize_with = "lenient_text")]
    tag: Option<std::borrow::Cow<'a, str>>,
    #[serde(default, borrow, deserialize_with = "lenient_text")]
    status: Option<std::borrow::Cow<'a, str>>,
    #[serde(default)]
    error: Option<serde_json::Value>,
    #[serde(default)]
    category: Option<serde_json::Value>,
}

fn lenient_text<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<std::borrow::Cow<'de, str>>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(value.as_str().map(|text| text.to_owned().into()))
}

fn text_of(value: &serde_json::Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

fn category_of(value: &serde_json::Value) -> ErrorCategory {
    ErrorCategory::from(text_of(value).to_ascii_lowercase().as_str())
}

/// Request of `POST /api/v1/cancel_future`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelFutureRequest {
    /// The future nobody waits for any more.
    pub request_id: RequestId,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str, expected: impl Fn(&FutureReply) -> bool) {
        let reply = FutureReply::from_json(body.as_bytes()).unwrap();
        assert!(expected(&reply), "{body} gave {reply:?}");
    }

    #[test]
    fn tells_the_four_answers_apart() {
        check(r#"{"type":"try_again"}"#, |r| {
            matches!(r, FutureReply::TryAgain(_))
        });
        check(
            r#"{"status":"complete_metadata","request_id":"r","response_payload_size":5}"#,
            |r| matches!(r, FutureReply::MetadataOnly(m) if m.response_payload_size == Some(5)),
        );
        check(
            r#"{"error":"boom","category":"SERVER"}"#,
            |r| matches!(r, FutureReply::Failed(f) if f.category == ErrorCategory::Server),
        );
        check(r#"{"metrics":null}"#, |r| *r == FutureReply::Result);
    }

    #[test]
    fn a_failure_without_category_is_unknown() {
        check(
            r#"{"error":{"x":1}}"#,
            |r| matches!(r, FutureReply::Failed(f) if f.error == r#"{"x":1}"# && f.category == unknown_category()),
        );
    }
}
