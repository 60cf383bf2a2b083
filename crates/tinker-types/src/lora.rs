//! Which adapter a training run trains.

use serde::{Deserialize, Serialize};

/// The LoRA adapter of a training run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Inner dimension, 1 or more.
    pub rank: u32,
    /// Seed of the initial weights; the server picks one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Adapt the output head.
    #[serde(default = "yes")]
    pub train_unembed: bool,
    /// Adapt the MLP projections.
    #[serde(default = "yes")]
    pub train_mlp: bool,
    /// Adapt the attention projections.
    #[serde(default = "yes")]
    pub train_attn: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 32,
            seed: None,
            train_unembed: true,
            train_mlp: true,
            train_attn: true,
        }
    }
}

pub(crate) const fn yes() -> bool {
    true
}
