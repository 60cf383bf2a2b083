//! Checkpoints as the REST endpoints list them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{CheckpointId, CheckpointKind, Cursor, TinkerPath};

/// A moment as RFC 3339 text, kept as it came.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub String);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A saved set of weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Its id within the run.
    pub checkpoint_id: CheckpointId,
    /// What it holds.
    pub checkpoint_type: CheckpointKind,
    /// When it was saved.
    pub time: Timestamp,
    /// Its full path.
    pub tinker_path: TinkerPath,
    /// Size on the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Whether anybody may read it.
    #[serde(default)]
    pub public: bool,
    /// Annotations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<BTreeMap<String, String>>,
    /// When it will be deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// Base model; servers for SDK 0.39 say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
}

/// Answer of `GET /api/v1/checkpoints` and `GET /api/v1/training_runs/{id}/checkpoints`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointsResponse {
    /// Newest first.
    pub checkpoints: Vec<Checkpoint>,
    /// Where the page sits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<Cursor>,
}

/// Request of `PUT /api/v1/training_runs/{id}/checkpoints/{checkpoint}/ttl`; null is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetTtlRequest {
    /// Seconds from now until it is deleted, 3600 to ten years; `None` keeps it.
    #[serde(default)]
    pub ttl_seconds: Option<u64>,
}
