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
#[serde(from = "ListedCheckpoints")]
pub struct CheckpointsResponse {
    /// Newest first, without those of kinds that this version does not know.
    pub checkpoints: Vec<Checkpoint>,
    /// How many were left out for that.
    #[serde(skip)]
    pub n_left_out: usize,
    /// Where the page sits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<Cursor>,
}

/// The list as it comes.
#[derive(Deserialize)]
struct ListedCheckpoints {
    checkpoints: Vec<ListedCheckpoint>,
    #[serde(default)]
    cursor: Option<Cursor>,
}

impl From<ListedCheckpoints> for CheckpointsResponse {
    fn from(listed: ListedCheckpoints) -> Self {
        let n_listed = listed.checkpoints.len();
        let checkpoints = known(listed.checkpoints);
        Self {
            n_left_out: n_listed - checkpoints.len(),
            checkpoints,
            cursor: listed.cursor,
        }
    }
}

/// A row of a list: of a known kind, or of one that a later version has.
pub(crate) struct ListedCheckpoint(Option<Checkpoint>);

impl<'de> Deserialize<'de> for ListedCheckpoint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let row = serde_json::Value::deserialize(deserializer)?;
        if is_of_unknown_kind(&row) {
            return Ok(Self(None));
        }
        let row = Checkpoint::deserialize(row).map_err(serde::de::Error::custom)?;
        Ok(Self(Some(row)))
    }
}

/// Whether a row says so in one of its fields that name a kind.
fn is_of_unknown_kind(row: &serde_json::Value) -> bool {
    let text = |field| row.get(field).and_then(serde_json::Value::as_str);
    let kind = text("checkpoint_type").map(CheckpointKind::from_name);
    let segment = text("checkpoint_id").and_then(|id| id.split_once('/'));
    let segment = segment.map(|(segment, _)| CheckpointKind::from_segment(segment));
    kind == Some(None) || segment == Some(None)
}

/// Reads a checkpoint that may be absent, or of a kind that a later version has.
pub(crate) fn known_or_none<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Checkpoint>, D::Error> {
    let row = Option::<ListedCheckpoint>::deserialize(deserializer)?;
    Ok(row.and_then(|row| row.0))
}

/// The rows of known kinds.
pub(crate) fn known(rows: Vec<ListedCheckpoint>) -> Vec<Checkpoint> {
    rows.into_iter().filter_map(|row| row.0).collect()
}

/// Request of `PUT /api/v1/training_runs/{id}/checkpoints/{checkpoint}/ttl`; null is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetTtlRequest {
    /// Seconds from now until it is deleted, 3600 to ten years; `None` keeps it.
    #[serde(default)]
    pub ttl_seconds: Option<u64>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::CheckpointSearchResponse;

    fn row(kind: &str, segment: &str) -> serde_json::Value {
        json!({
            "checkpoint_id": format!("{segment}/a"),
            "checkpoint_type": kind,
            "time": "2026-01-01T00:00:00Z",
            "tinker_path": format!("tinker://r/{segment}/a"),
        })
    }

    #[test]
    fn rows_of_kinds_from_the_future_are_left_out_and_counted() {
        let rows = json!([
            row("training", "weights"),
            row("merged", "merged_weights"),
            row("training", "merged_weights"),
        ]);

        let list: CheckpointsResponse =
            serde_json::from_value(json!({"checkpoints": rows})).unwrap();
        let found: CheckpointSearchResponse =
            serde_json::from_value(json!({"checkpoints": rows})).unwrap();

        assert_eq!((list.checkpoints.len(), list.n_left_out), (1, 2));
        assert_eq!(found.checkpoints.len(), 1);
    }

    #[test]
    fn a_run_whose_checkpoints_are_of_kinds_from_the_future_is_read_without_them() {
        let run = json!({
            "training_run_id": "r",
            "base_model": "m",
            "model_owner": "o",
            "is_lora": true,
            "last_request_time": "2026-01-01T00:00:00Z",
            "last_checkpoint": row("merged", "merged_weights"),
            "last_sampler_checkpoint": row("sampler", "sampler_weights"),
        });

        let run: crate::TrainingRun = serde_json::from_value(run).unwrap();

        assert_eq!(run.last_checkpoint, None);
        let sampler = run.last_sampler_checkpoint.unwrap();
        assert_eq!(sampler.checkpoint_type, CheckpointKind::Sampler);
    }

    #[test]
    fn a_malformed_row_of_a_known_kind_is_an_error() {
        let rows = json!([{"checkpoint_type": "training"}]);

        let list = serde_json::from_value::<CheckpointsResponse>(json!({"checkpoints": rows}));

        assert!(list.is_err());
    }
}
