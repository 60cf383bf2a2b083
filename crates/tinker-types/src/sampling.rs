//! Samplers and samples.

use serde::{Deserialize, Deserializer, Serialize};

use crate::tags::{type_tag, wire_enum};
use crate::{ModelInput, SamplingParams, SamplingSessionId, SessionId, TensorData, TinkerPath};

type_tag!(CreateSamplingSessionTag, "create_sampling_session");
type_tag!(SampleTag, "sample");

/// Request of `POST /api/v1/create_sampling_session`: a base model, or a checkpoint of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateSamplingSessionRequest {
    /// Owner.
    pub session_id: SessionId,
    /// Number of the sampler within the session, from 0.
    pub sampling_session_seq_id: u64,
    /// Base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    /// Checkpoint; a text here so that the server can explain a malformed one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_path: Option<String>,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: CreateSamplingSessionTag,
}

/// Answer of `POST /api/v1/create_sampling_session`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateSamplingSessionResponse {
    /// The new sampler.
    pub sampling_session_id: SamplingSessionId,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: CreateSamplingSessionTag,
}

/// Answer of `GET /api/v1/samplers/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerInfo {
    /// The sampler.
    pub sampler_id: SamplingSessionId,
    /// Its base model.
    pub base_model: String,
    /// Its checkpoint, if it has one of a kind that this version knows.
    #[serde(
        default,
        deserialize_with = "known_path",
        skip_serializing_if = "Option::is_none"
    )]
    pub model_path: Option<TinkerPath>,
}

fn known_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<TinkerPath>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    Ok(text.and_then(|text| text.parse().ok()))
}

/// Request of `POST /api/v1/asample`; answered by a future of [`SampleResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleRequest {
    /// Independent continuations to draw. Default 1.
    #[serde(default = "one")]
    pub num_samples: u32,
    /// What to continue.
    pub prompt: ModelInput,
    /// How.
    pub sampling_params: SamplingParams,
    /// The sampler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_session_id: Option<SamplingSessionId>,
    /// Number of the request within the sampler; unordered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq_id: Option<u64>,
    /// Return the prompt's log-probabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<bool>,
    /// Return the k most likely tokens at each prompt position.
    #[serde(default)]
    pub topk_prompt_logprobs: u32,
    /// Return the k most likely tokens at each sampled position.
    #[serde(default)]
    pub topk_sample_logprobs: u32,
    /// Return the log-probabilities of these tokens: int64 `[prompt - 1, k]`, -1 skips a cell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_prompt_logprobs: Option<TensorData>,
    /// Draw alternatives at each prompt position.
    #[serde(default)]
    pub prompt_alt_tokens_k: u32,
    /// Return only the last n prompt log-probabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs_last_n: Option<u32>,
    /// Keep what the `stable_reinforce` loss needs.
    #[serde(default)]
    pub record_stability_info: bool,
    /// Base model, when no sampler is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    /// Checkpoint, when no sampler is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_path: Option<String>,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: SampleTag,
}

const fn one() -> u32 {
    1
}

impl SampleRequest {
    /// One continuation of `prompt` with no extras.
    #[must_use]
    pub const fn new(prompt: ModelInput, sampling_params: SamplingParams) -> Self {
        Self {
            num_samples: 1,
            prompt,
            sampling_params,
            sampling_session_id: None,
            seq_id: None,
            prompt_logprobs: Some(false),
            topk_prompt_logprobs: 0,
            topk_sample_logprobs: 0,
            target_prompt_logprobs: None,
            prompt_alt_tokens_k: 0,
            prompt_logprobs_last_n: None,
            record_stability_info: false,
            base_model: None,
            model_path: None,
            tag: SampleTag,
        }
    }
}

wire_enum! {
    /// Why a continuation ended.
    StopReason {
        /// A stop condition was met.
        Stop = "stop",
        /// `max_tokens` or the context was used up.
        Length = "length",
    }
}

/// Tokens and their log-probabilities at one position, most likely first; `None` if not known.
pub type TopkLogprobs = Vec<Option<Vec<(u32, f32)>>>;

/// One continuation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampledSequence {
    /// Why it ended.
    pub stop_reason: StopReason,
    /// The tokens, a stop token included.
    pub tokens: Vec<u32>,
    /// One per token, natural log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<f32>>,
    /// The most likely tokens at each position, if asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topk_logprobs: Option<TopkLogprobs>,
    /// The name the future gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence_id: Option<String>,
}

/// Alternatives drawn at each prompt position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptAltTokens {
    /// int64 `[prompt - 1, k]`.
    pub tokens: TensorData,
    /// float32 `[prompt - 1, k]`, natural log.
    pub logprobs: TensorData,
}

/// Result of [`SampleRequest`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct SampleResponse {
    /// `num_samples` continuations.
    pub sequences: Vec<SampledSequence>,
    /// One per prompt token, natural log; the first is `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Option<f32>>>,
    /// The most likely tokens at each prompt position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topk_prompt_logprobs: Option<TopkLogprobs>,
    /// Laid out as the request's; 0 where skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_prompt_logprobs: Option<TensorData>,
    /// Alternatives at each prompt position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_alt_tokens: Option<PromptAltTokens>,
    /// Prompt tokens that were not computed anew.
    #[serde(default)]
    pub prompt_cache_hit_tokens: u32,
}
