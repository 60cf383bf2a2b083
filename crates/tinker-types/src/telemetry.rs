//! Telemetry: what a client reports to the service about itself, if its user agrees.

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::tags::wire_enum;

/// Request of `POST /api/v1/telemetry`. Bodies of other clients may hold keys: never log one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TelemetryRequest {
    /// At most 100.
    pub events: Vec<TelemetryEvent>,
    /// Operating system, such as `Linux`.
    pub platform: String,
    /// Version of the client.
    pub sdk_version: String,
    /// The session, or `sessionless-<uuid>`.
    pub session_id: String,
    /// The process, as a UUID.
    pub process_uuid: String,
}

/// Answer of `POST /api/v1/telemetry`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TelemetryResponse {
    /// Always `accepted`.
    pub status: String,
}

wire_enum! {
    /// How grave an event is.
    Severity {
        /// Of use when looking for a fault.
        Debug = "DEBUG",
        /// Normal.
        Info = "INFO",
        /// Unexpected.
        Warning = "WARNING",
        /// Something failed.
        Error = "ERROR",
        /// Nothing works.
        Critical = "CRITICAL",
    }
}

/// What all events have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventHead {
    /// A UUID.
    pub event_id: String,
    /// Position in the session, from 0.
    pub event_session_index: u64,
    /// How grave.
    pub severity: Severity,
    /// When.
    pub timestamp: Timestamp,
}

/// Something that happened in a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "SCREAMING_SNAKE_CASE")]
#[non_exhaustive]
pub enum TelemetryEvent {
    /// The session began.
    SessionStart {
        /// What all events have.
        #[serde(flatten)]
        head: EventHead,
    },
    /// The session ended with a failure.
    SessionEnd {
        /// What all events have.
        #[serde(flatten)]
        head: EventHead,
        /// How long it was, as `H:MM:SS.ffffff`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        duration: Option<String>,
    },
    /// A failure that nobody handled.
    UnhandledException {
        /// What all events have.
        #[serde(flatten)]
        head: EventHead,
        /// Its type.
        error_type: String,
        /// Its text.
        error_message: String,
        /// Where it happened.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        traceback: Option<String>,
    },
    /// Anything else.
    GenericEvent {
        /// What all events have.
        #[serde(flatten)]
        head: EventHead,
        /// What, such as `APIFuture.result_async.timeout`.
        event_name: String,
        /// Its particulars.
        #[serde(default)]
        event_data: serde_json::Map<String, serde_json::Value>,
    },
    /// A kind this version does not know.
    #[serde(untagged)]
    Unknown(serde_json::Value),
}
