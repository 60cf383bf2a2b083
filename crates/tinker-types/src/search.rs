//! Search of sessions and checkpoints.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::tags::wire_enum;
use crate::{
    Checkpoint, CheckpointKind, FinishReason, ProjectId, SamplingSessionId, SessionId, Timestamp,
    TrainingRunId, UserMetadata,
};

/// Rows of a page unless asked for otherwise.
const DEFAULT_LIMIT: u32 = 50;

/// Whose sessions or checkpoints to find.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum SearchOwner {
    /// One's own.
    #[default]
    Own,
    /// All that one may read.
    Accessible,
    /// Those of certain users.
    User {
        /// The users as URNs, one to ten.
        owner_urns: Vec<String>,
    },
}

/// Request of `POST /api/v1/sessions/search`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionSearchRequest {
    /// One session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionId>,
    /// In one of these projects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project_ids: Option<Vec<ProjectId>>,
    /// With these annotations.
    #[serde(default)]
    pub user_metadata: UserMetadata,
    /// With this name, one character or more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    /// Whose.
    #[serde(default)]
    pub owner: SearchOwner,
    /// In one of these states; at least one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statuses: Option<Vec<SessionStatusQuery>>,
    /// Most rows, 1 to 200. Default 50.
    #[serde(default = "default_limit")]
    pub limit: u32,
    /// Where the last page ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<SessionSearchCursor>,
}

const fn default_limit() -> u32 {
    DEFAULT_LIMIT
}

impl Default for SessionSearchRequest {
    fn default() -> Self {
        Self {
            session_id: None,
            project_ids: None,
            user_metadata: UserMetadata::new(),
            display_name: None,
            owner: SearchOwner::Own,
            statuses: None,
            limit: DEFAULT_LIMIT,
            cursor: None,
        }
    }
}

/// A state to look for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum SessionStatusQuery {
    /// Not over.
    Active,
    /// Ended from outside.
    Cancelled,
    /// Ended by a failure.
    Failed,
    /// Ended by its client.
    ClientFinished {
        /// For one of these reasons; any if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reasons: Option<Vec<FinishKind>>,
    },
}

wire_enum! {
    /// How a client ended its session, as a search names it.
    FinishKind {
        /// The program ran to its end.
        Success = "success",
        /// It failed.
        Errored = "errored",
        /// It was stopped.
        Interrupted = "interrupted",
    }
}

/// Where a page of sessions ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionSearchCursor {
    /// Creation of its last session.
    pub last_created_at: Timestamp,
    /// Its last session.
    pub last_session_id: SessionId,
}

/// Answer of `POST /api/v1/sessions/search`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionSearchResponse {
    /// Newest first.
    pub sessions: Vec<SessionSummary>,
    /// Where to go on; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<SessionSearchCursor>,
}

/// A session that was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionSummary {
    /// Its id.
    pub session_id: SessionId,
    /// When it was opened.
    pub created_at: Timestamp,
    /// Whose it is.
    pub owner: String,
    /// Its project.
    pub project_id: ProjectId,
    /// Checkpoints that it saved.
    pub checkpoints_count: u64,
    /// Its state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<SessionStatus>,
    /// Its name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    /// Its annotations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<UserMetadata>,
    /// Size of its checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_storage_bytes: Option<u64>,
}

/// State of a session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum SessionStatus {
    /// Not over.
    Active,
    /// Ended from outside.
    Cancelled {
        /// More, for people.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
    /// Ended by its client.
    ClientFinished {
        /// How.
        reason: FinishReason,
        /// More, for people.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
    /// Ended by a failure.
    Failed {
        /// Whose fault it is: `user` or `internal`.
        category: String,
        /// What went wrong.
        message: String,
        /// Where.
        reason: SessionFailure,
    },
    /// A state this version does not know.
    #[serde(untagged)]
    Unknown(serde_json::Value),
}

/// What made a session fail.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum SessionFailure {
    /// A request.
    Request {
        /// Which.
        request_id: String,
        /// Of which kind.
        request_type: String,
    },
    /// A training run.
    TrainingRun {
        /// Which.
        training_run_id: TrainingRunId,
    },
    /// A sampler.
    SamplingSession {
        /// Which.
        sampling_session_id: SamplingSessionId,
    },
    /// A cause this version does not know.
    #[serde(untagged)]
    Unknown(serde_json::Value),
}

/// Request of `POST /api/v1/checkpoints/search` (SDK 0.39, experimental).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointSearchRequest {
    /// In one of these projects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project_ids: Option<Vec<ProjectId>>,
    /// With these annotations.
    #[serde(default)]
    pub user_metadata: BTreeMap<String, String>,
    /// Of this kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_type: Option<CheckpointKind>,
    /// Whose.
    #[serde(default)]
    pub owner: SearchOwner,
    /// Of one of these base models; an empty list matches nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_models: Option<Vec<String>>,
    /// Most rows, 1 to 200. Default 50.
    #[serde(default = "default_limit")]
    pub limit: u32,
    /// Where the last page ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<CheckpointSearchCursor>,
}

impl Default for CheckpointSearchRequest {
    fn default() -> Self {
        Self {
            project_ids: None,
            user_metadata: BTreeMap::new(),
            checkpoint_type: None,
            owner: SearchOwner::Own,
            base_models: None,
            limit: DEFAULT_LIMIT,
            cursor: None,
        }
    }
}

/// Where a page of checkpoints ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointSearchCursor {
    /// Creation of its last checkpoint.
    pub last_created_at: Timestamp,
    /// Its last checkpoint.
    pub last_checkpoint_uuid: String,
}

/// Answer of `POST /api/v1/checkpoints/search`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointSearchResponse {
    /// Newest first, without those of kinds that this version does not know.
    #[serde(deserialize_with = "known_checkpoints")]
    pub checkpoints: Vec<Checkpoint>,
    /// Where to go on; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<CheckpointSearchCursor>,
}

fn known_checkpoints<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<Checkpoint>, D::Error> {
    Vec::deserialize(deserializer).map(crate::checkpoints::known)
}
