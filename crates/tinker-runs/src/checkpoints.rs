//! One row of `checkpoints.jsonl`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tinker_types::TinkerPath;

/// A checkpoint that was saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointRow {
    /// Six digits of the step, or `final`.
    pub name: String,
    /// Position in the epoch of the next batch to train.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<u64>,
    /// Epoch of the next batch to train, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// Whether the run ended with it.
    #[serde(default, rename = "final", skip_serializing_if = "std::ops::Not::not")]
    pub is_final: bool,
    /// Weights and optimizer state, to resume from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_path: Option<TinkerPath>,
    /// Weights to sample from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampler_path: Option<TinkerPath>,
    /// Everything else a writer recorded.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl CheckpointRow {
    /// A row with a name and nothing else.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            batch: None,
            epoch: None,
            is_final: false,
            state_path: None,
            sampler_path: None,
            extra: Map::new(),
        }
    }
}
