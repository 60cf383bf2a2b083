//! Training runs as the REST endpoints list them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::checkpoints::known_or_none;
use crate::{Checkpoint, Timestamp, TrainingRunId};

/// A training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingRun {
    /// Its id.
    pub training_run_id: TrainingRunId,
    /// Its base model.
    pub base_model: String,
    /// Who owns it.
    pub model_owner: String,
    /// Whether it trains an adapter.
    pub is_lora: bool,
    /// When it was last used.
    pub last_request_time: Timestamp,
    /// Whether its state was lost.
    #[serde(default)]
    pub corrupted: bool,
    /// Rank of the adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<u32>,
    /// Newest training checkpoint; none if it is of a kind that this version does not know.
    #[serde(
        default,
        deserialize_with = "known_or_none",
        skip_serializing_if = "Option::is_none"
    )]
    pub last_checkpoint: Option<Checkpoint>,
    /// Newest sampler checkpoint; none if it is of a kind that this version does not know.
    #[serde(
        default,
        deserialize_with = "known_or_none",
        skip_serializing_if = "Option::is_none"
    )]
    pub last_sampler_checkpoint: Option<Checkpoint>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<BTreeMap<String, serde_json::Value>>,
}

/// Where a page sits in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Rows before the page.
    pub offset: u64,
    /// Rows asked for.
    pub limit: u64,
    /// Rows in all.
    pub total_count: u64,
}

/// Answer of `GET /api/v1/training_runs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingRunsResponse {
    /// Newest first.
    pub training_runs: Vec<TrainingRun>,
    /// Where the page sits.
    pub cursor: Cursor,
}
