//! Forward, forward-backward and optimizer steps.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::tags::type_tag;
use crate::{AdamParams, Datum, LossConfig, LossFn, TensorData, TrainingRunId};

type_tag!(OptimStepTag, "optim_step");
type_tag!(ZeroGradTag, "zero_grad");
type_tag!(GradientStatsTag, "gradient_stats");

/// Request of `POST /api/v1/forward_backward`, sent as protobuf (see [`crate::proto`]).
///
/// Answered by a future of [`ForwardBackwardOutput`].
#[derive(Debug, Clone, PartialEq)]
pub struct ForwardBackwardRequest {
    /// The training run.
    pub model_id: TrainingRunId,
    /// Position in the run's order of operations, from 1.
    pub seq_id: u64,
    /// The examples.
    pub data: Vec<Datum>,
    /// The loss.
    pub loss_fn: LossFn,
    /// Its settings.
    pub loss_fn_config: LossConfig,
    /// Leave the gradient alone.
    pub forward_only: bool,
}

/// Named tensors of one datum; `logprobs` is shaped like its targets, natural log.
pub type LossFnOutput = BTreeMap<String, TensorData>;

/// Result of forward and forward-backward.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ForwardBackwardOutput {
    /// Class name of the outputs; informational.
    #[serde(default)]
    pub loss_fn_output_type: String,
    /// One per datum, in input order.
    #[serde(default)]
    pub loss_fn_outputs: Vec<LossFnOutput>,
    /// Metrics by `name:reduction`; `loss:sum` is the loss summed over tokens and data.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
}

/// Request of `POST /api/v1/optim_step`; answered by a future of [`OptimStepResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimStepRequest {
    /// The training run.
    pub model_id: TrainingRunId,
    /// Position in the run's order of operations.
    #[serde(default)]
    pub seq_id: u64,
    /// AdamW; exactly one of this and `optimizer_params` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adam_params: Option<AdamParams>,
    /// Another optimizer, tagged by `type`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimizer_params: Option<serde_json::Value>,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: OptimStepTag,
}

/// Result of [`OptimStepRequest`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct OptimStepResponse {
    /// What the server measured, such as the gradient norm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<BTreeMap<String, f64>>,
}

/// Request of `POST /api/v1/extensions/zero_grad`, which throws the accumulated gradient away;
/// answered by a future of [`ZeroGradResponse`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZeroGradRequest {
    /// The training run.
    pub model_id: TrainingRunId,
    /// Position in the run's order of operations.
    #[serde(default)]
    pub seq_id: u64,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: ZeroGradTag,
}

/// Result of [`ZeroGradRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ZeroGradResponse {
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: ZeroGradTag,
}

/// Request of `POST /api/v1/extensions/gradient_stats`, which describes the accumulated gradient and
/// changes nothing; answered by a future of [`GradientStatsResponse`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GradientStatsRequest {
    /// The training run.
    pub model_id: TrainingRunId,
    /// Position in the run's order of operations.
    #[serde(default)]
    pub seq_id: u64,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: GradientStatsTag,
}

/// Result of [`GradientStatsRequest`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct GradientStatsResponse {
    /// The whole gradient; zeros if there is none.
    pub total: GradientStats,
    /// The gradient of each weight by its PEFT name; empty if there is none.
    pub tensors: BTreeMap<String, GradientStats>,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: GradientStatsTag,
}

/// Sizes of a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct GradientStats {
    /// L2 norm, before any clipping.
    pub l2: f64,
    /// Largest magnitude.
    pub max_abs: f64,
    /// How many values are zero, of `n_values`.
    pub n_zero: u64,
    /// Number of values.
    pub n_values: u64,
}
