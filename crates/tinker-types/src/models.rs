//! Creating, describing and unloading the model of a training run.

use serde::{Deserialize, Serialize};

use crate::tags::type_tag;
use crate::{LoraConfig, OptimizerConfig, SessionId, TrainingRunId, UserMetadata};

type_tag!(CreateModelTag, "create_model");
type_tag!(GetInfoTag, "get_info");
type_tag!(UnloadModelTag, "unload_model");

/// Request of `POST /api/v1/create_model`; answered by a future of [`CreateModelResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CreateModelRequest {
    /// Owner.
    pub session_id: SessionId,
    /// Number of the model within the session, from 0; shared with models made by loading weights.
    pub model_seq_id: u64,
    /// Base model to adapt.
    pub base_model: String,
    /// Annotations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<UserMetadata>,
    /// The adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_config: Option<LoraConfig>,
    /// The optimizer.
    #[serde(default)]
    pub optimizer_config: OptimizerConfig,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: CreateModelTag,
}

/// Result of [`CreateModelRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateModelResponse {
    /// The new training run.
    pub model_id: TrainingRunId,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: CreateModelTag,
}

/// Request of `POST /api/v1/get_info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetInfoRequest {
    /// The training run.
    pub model_id: TrainingRunId,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: GetInfoTag,
}

/// Answer of `POST /api/v1/get_info`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GetInfoResponse {
    /// The training run.
    pub model_id: TrainingRunId,
    /// Its base model.
    pub model_data: ModelData,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: GetInfoTag,
    /// The optimizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimizer_config: Option<OptimizerConfig>,
    /// Whether it trains an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_lora: Option<bool>,
    /// Rank of the adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<u32>,
    /// Name of the base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
}

/// A base model as `get_info` describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ModelData {
    /// Architecture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,
    /// Name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
    /// Where its tokenizer is loaded from: a hub id, or a directory for local models.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_id: Option<String>,
}

/// Request of `POST /api/v1/unload_model`; answered by a future of [`UnloadModelResponse`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnloadModelRequest {
    /// The training run.
    pub model_id: TrainingRunId,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: UnloadModelTag,
}

/// Result of [`UnloadModelRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnloadModelResponse {
    /// The training run.
    pub model_id: TrainingRunId,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: UnloadModelTag,
}
