//! Saving and loading the weights of a training run.

use std::collections::BTreeMap;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::tags::{type_tag, wire_enum};
use crate::{
    OptimizerConfig, ProjectId, SamplingSessionId, SessionId, TinkerPath, TrainingRunId,
    UserMetadata,
};

type_tag!(SaveWeightsTag, "save_weights");
type_tag!(LoadWeightsTag, "load_weights");
type_tag!(SaveWeightsForSamplerTag, "save_weights_for_sampler");

/// Request of `POST /api/v1/save_weights`; answered by a future of [`SaveWeightsResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SaveWeightsRequest {
    /// The training run.
    pub model_id: TrainingRunId,
    /// Checkpoint name; the server picks one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Position in the run's order of operations.
    #[serde(default)]
    pub seq_id: u64,
    /// Seconds until it is deleted, 3600 to ten years; absent keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
    /// Replace a checkpoint of that name.
    #[serde(default)]
    pub overwrite: bool,
    /// Annotations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<BTreeMap<String, String>>,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: SaveWeightsTag,
}

/// Result of [`SaveWeightsRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveWeightsResponse {
    /// The checkpoint.
    pub path: TinkerPath,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: SaveWeightsTag,
}

/// Request of `POST /api/v1/load_weights`; answered by a future of [`LoadWeightsResponse`].
///
/// Either `session_id` and `model_seq_id` (a new training run) or `model_id` and `seq_id`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadWeightsRequest {
    /// Owner of a new training run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionId>,
    /// Number of the new training run within the session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_seq_id: Option<u64>,
    /// An existing training run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_id: Option<TrainingRunId>,
    /// Position in the existing run's order of operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq_id: Option<u64>,
    /// Base model, if another than the checkpoint's is insisted on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<UserMetadata>,
    /// The optimizer, when only weights are loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimizer_config: Option<OptimizerConfig>,
    /// The checkpoint.
    pub path: TinkerPath,
    /// Restore the optimizer state too.
    pub optimizer: bool,
    /// Permission to read somebody else's weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_access_token: Option<String>,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: LoadWeightsTag,
}

/// Result of [`LoadWeightsRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LoadWeightsResponse {
    /// What was loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<TinkerPath>,
    /// Into which training run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_id: Option<TrainingRunId>,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: LoadWeightsTag,
}

wire_enum! {
    /// What a sampler made from a training run follows.
    SamplerKind {
        /// The weights as they are now.
        Snapshot = "snapshot",
        /// The newest weights saved this way.
        Inflight = "inflight",
    }
}

/// Request of `POST /api/v1/save_weights_for_sampler`; answered by a future of
/// [`SaveWeightsForSamplerResponse`].
///
/// Named (`path`) for a lasting checkpoint, or numbered (`sampling_session_seq_id`) for a sampler
/// that lives with the session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SaveWeightsForSamplerRequest {
    /// The training run.
    pub model_id: TrainingRunId,
    /// Position in the run's order of operations.
    #[serde(default)]
    pub seq_id: u64,
    /// Checkpoint name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Seconds until it is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<BTreeMap<String, String>>,
    /// Number of the sampler within the session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_session_seq_id: Option<u64>,
    /// What the sampler follows.
    #[serde(default = "snapshot")]
    pub kind: SamplerKind,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: SaveWeightsForSamplerTag,
}

const fn snapshot() -> SamplerKind {
    SamplerKind::Snapshot
}

/// Result of [`SaveWeightsForSamplerRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveWeightsForSamplerResponse {
    /// The checkpoint, if it was named.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "sampler_path"
    )]
    pub path: Option<TinkerPath>,
    /// The sampler, if it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_session_id: Option<SamplingSessionId>,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: SaveWeightsForSamplerTag,
}

/// Reads the path of a sampler checkpoint; SkyRL's servers leave the kind out:
/// `tinker://<run>/<name>`.
fn sampler_path<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<TinkerPath>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else {
        return Ok(None);
    };
    let short = text
        .strip_prefix("tinker://")
        .and_then(|rest| rest.split_once('/'));
    let parsed = match short {
        Some((run, name)) if !name.contains('/') => {
            format!("tinker://{run}/sampler_weights/{name}").parse()
        }
        _ => text.parse(),
    };
    parsed.map(Some).map_err(D::Error::custom)
}

/// Request of `POST /api/v1/weights_info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsInfoRequest {
    /// The checkpoint.
    pub tinker_path: TinkerPath,
}

/// Answer of `POST /api/v1/weights_info`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WeightsInfo {
    /// Base model of the checkpoint.
    pub base_model: String,
    /// Whether it is an adapter.
    pub is_lora: bool,
    /// Rank of the adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<u32>,
    /// Whether the output head is adapted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_unembed: Option<bool>,
    /// Whether the MLP projections are adapted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_mlp: Option<bool>,
    /// Whether the attention projections are adapted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_attn: Option<bool>,
    /// The optimizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimizer_config: Option<OptimizerConfig>,
}

/// Request of `POST /api/v1/copy_weights`; the copy goes to a project, or into a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyWeightsRequest {
    /// The checkpoint.
    pub source_path: TinkerPath,
    /// Project of the copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_project_id: Option<ProjectId>,
    /// Session of the copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionId>,
    /// Number of the training run that the copy makes within that session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_seq_id: Option<u64>,
    /// Seconds until the copy is deleted, 3600 to ten years; absent keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
}

/// Answer of `POST /api/v1/copy_weights`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyWeightsResponse {
    /// The copy.
    pub tinker_path: TinkerPath,
}
