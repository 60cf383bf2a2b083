//! Sessions: creation, heartbeat, end and look-up.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::tags::{type_tag, wire_enum};
use crate::{ProjectId, SamplingSessionId, SessionId, SignedUrl, TrainingRunId};

type_tag!(CreateSessionTag, "create_session");
type_tag!(SessionHeartbeatTag, "session_heartbeat");

/// Free-form annotations that a user puts on a session, run or checkpoint.
pub type UserMetadata = BTreeMap<String, serde_json::Value>;

/// Request of `POST /api/v1/create_session`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CreateSessionRequest {
    /// Labels.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Annotations.
    #[serde(default)]
    pub user_metadata: UserMetadata,
    /// Version of the client.
    pub sdk_version: String,
    /// Project to file the session under.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project_id: Option<ProjectId>,
    /// Name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: CreateSessionTag,
}

/// Answer of `POST /api/v1/create_session`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateSessionResponse {
    /// The new session.
    pub session_id: SessionId,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: CreateSessionTag,
    /// To be logged as information.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub info_message: Option<String>,
    /// To be logged as a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning_message: Option<String>,
    /// To be logged as an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_message: Option<String>,
}

/// Request of `POST /api/v1/session_heartbeat`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatRequest {
    /// The session that is alive.
    pub session_id: SessionId,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: SessionHeartbeatTag,
}

/// Answer of `POST /api/v1/session_heartbeat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HeartbeatResponse {
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: SessionHeartbeatTag,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FinishReason {
    /// The program ran to its end.
    Success,
    /// It failed.
    Errored,
    /// It was stopped.
    Interrupted,
}

/// Request of `POST /api/v1/sessions/{id}/finish`; `detail` is sent even when null.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinishSessionRequest {
    /// How it ended; the first reason given wins.
    pub reason: FinishReason,
    /// More, for people.
    #[serde(default)]
    pub detail: Option<String>,
}

/// Answer of `GET /api/v1/sessions`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionsResponse {
    /// Sessions, newest first.
    pub sessions: Vec<SessionId>,
}

/// Answer of `GET /api/v1/sessions/{id}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Training runs it created.
    pub training_run_ids: Vec<TrainingRunId>,
    /// Samplers it created.
    pub sampler_ids: Vec<SamplingSessionId>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<UserMetadata>,
    /// Name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
}

/// Request of `PUT /api/v1/sessions/{id}/project`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssignProjectRequest {
    /// Where the session, its runs and its checkpoints belong from now on.
    pub project_id: ProjectId,
}

wire_enum! {
    /// Whether a trace can be read yet.
    TraceStatus {
        /// It is being written.
        Pending = "pending",
        /// It can.
        Ready = "ready",
        /// It never will.
        Failed = "failed",
    }
}

/// Answer of `GET /api/v1/sessions/{id}/trace_export`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceExport {
    /// Whether it can be read.
    pub status: TraceStatus,
    /// Where, once it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<SignedUrl>,
    /// Why it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
