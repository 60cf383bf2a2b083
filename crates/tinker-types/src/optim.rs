//! Optimizers and the hyper-parameters of one step.

use serde::{Deserialize, Serialize};

/// One AdamW step (Loshchilov and Hutter 2019). All fields are always sent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdamParams {
    /// Step size, at least 0. Default 1e-4.
    pub learning_rate: f64,
    /// Decay of the first moment, in `[0, 1)`. Default 0.9.
    pub beta1: f64,
    /// Decay of the second moment, in `[0, 1)`. Default 0.95.
    pub beta2: f64,
    /// Added to the root of the second moment, above 0. Default 1e-12.
    pub eps: f64,
    /// Decoupled weight decay. Default 0.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0, the default, turns clipping off.
    pub grad_clip_norm: f64,
}

impl Default for AdamParams {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-12,
            weight_decay: 0.0,
            grad_clip_norm: 0.0,
        }
    }
}

/// The optimizer of a training run, chosen at creation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    /// Family, such as `adamw` or `dimuon`.
    #[serde(rename = "type")]
    pub family: String,
    /// Settings of other families.
    #[serde(flatten)]
    pub settings: serde_json::Map<String, serde_json::Value>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            family: "adamw".into(),
            settings: serde_json::Map::new(),
        }
    }
}
