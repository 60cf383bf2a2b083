//! The fields of `config.json` that are read. Unknown fields are ignored, as every writer adds some.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// A field that may be absent, `null` or a value: some families read these differently.
pub(super) type Field<T> = Option<Option<T>>;

fn present<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Field<T>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// `config.json` of any of the supported families.
#[derive(Debug, Deserialize)]
pub(super) struct Config {
    #[serde(default)]
    pub(super) architectures: Vec<String>,
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) num_key_value_heads: Option<usize>,
    pub(super) head_dim: Option<usize>,
    pub(super) rms_norm_eps: Option<f64>,
    pub(super) max_position_embeddings: Option<usize>,
    pub(super) tie_word_embeddings: Option<bool>,
    pub(super) hidden_act: Option<String>,
    pub(super) hidden_activation: Option<String>,
    pub(super) attention_bias: Option<bool>,
    pub(super) mlp_bias: Option<bool>,
    pub(super) use_sliding_window: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    pub(super) sliding_window: Field<usize>,
    pub(super) max_window_layers: Option<usize>,
    pub(super) layer_types: Option<Vec<String>>,
    pub(super) sliding_window_pattern: Option<usize>,
    pub(super) use_bidirectional_attention: Option<bool>,
    pub(super) query_pre_attn_scalar: Option<f64>,
    #[serde(default, deserialize_with = "present")]
    pub(super) attn_logit_softcapping: Field<f64>,
    #[serde(default, deserialize_with = "present")]
    pub(super) final_logit_softcapping: Field<f64>,
    pub(super) no_rope_layers: Option<Vec<u8>>,
    pub(super) no_rope_layer_interval: Option<usize>,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_local_base_freq: Option<f64>,
    pub(super) partial_rotary_factor: Option<f64>,
    pub(super) original_max_position_embeddings: Option<f64>,
    pub(super) rope_scaling: Option<RopeConfig>,
    pub(super) rope_parameters: Option<RopeParameters>,
    /// transformers 5 writes the second name.
    #[serde(alias = "num_local_experts")]
    pub(super) num_experts: Option<usize>,
    pub(super) num_experts_per_tok: Option<usize>,
    pub(super) moe_intermediate_size: Option<usize>,
    pub(super) norm_topk_prob: Option<bool>,
    pub(super) decoder_sparse_step: Option<usize>,
    pub(super) mlp_only_layers: Option<Vec<usize>>,
    pub(super) quantization_config: Option<serde_json::Value>,
}

/// `rope_parameters`, as transformers 5 writes it: one for all blocks, or one for each type of block.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum RopeParameters {
    ByLayerType(BTreeMap<String, Option<RopeConfig>>),
    One(Box<RopeConfig>),
}

/// `rope_scaling`, or one entry of `rope_parameters`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct RopeConfig {
    #[serde(alias = "type")]
    pub(super) rope_type: Option<String>,
    pub(super) rope_theta: Option<f64>,
    pub(super) partial_rotary_factor: Option<f64>,
    pub(super) factor: Option<f64>,
    pub(super) low_freq_factor: Option<f64>,
    pub(super) high_freq_factor: Option<f64>,
    pub(super) original_max_position_embeddings: Option<f64>,
    pub(super) attention_factor: Option<f64>,
    pub(super) beta_fast: Option<f64>,
    pub(super) beta_slow: Option<f64>,
    pub(super) mscale: Option<f64>,
    pub(super) mscale_all_dim: Option<f64>,
    pub(super) truncate: Option<bool>,
    pub(super) short_factor: Option<Vec<f64>>,
}
