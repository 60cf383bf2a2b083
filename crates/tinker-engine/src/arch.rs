//! A model's `config.json`, read into the description of one decoder block.
//!
//! An architecture is data: which norms, biases, head sizes, windows and rotary scaling the blocks
//! have. What is not listed here is refused by name, never ignored. Defaults are those of
//! transformers, since a `config.json` may leave them out.

mod config;
mod family;
mod rope;

use std::path::Path;

pub use self::family::Family;
pub use self::rope::Rope;

use self::config::Config;
use crate::error::{Error, Result};

/// Everything the engine needs to know about a decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct Arch {
    /// As in `config.json`, such as `Qwen3ForCausalLM`.
    pub name: String,
    /// Which of the families of models it is.
    pub family: Family,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Added to the mean square in norms.
    pub rms_eps: f32,
    /// Added to the weight of every norm: 1 where files hold the difference from 1 (Gemma), else 0.
    pub norm_shift: f32,
    /// RMS norm of each query and key head before the rotation (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// RMS norms also after attention and after the MLP, before they are added (Gemma).
    pub post_norms: bool,
    /// Biases of the q, k and v projections (Qwen2).
    pub qkv_bias: bool,
    /// Bias of the o projection.
    pub o_bias: bool,
    /// Biases of the gate, up and down projections.
    pub mlp_bias: bool,
    /// The file, and LoRA with it, has q, k and v as one layer, and gate and up as another (Phi-3).
    pub fused: bool,
    /// What the gate goes through.
    pub activation: Activation,
    /// Factor on the embedding of a token.
    pub embedding_scale: f32,
    /// Factor on the scores of attention.
    pub attention_scale: f32,
    /// Scores of attention become `cap * tanh(score / cap)` (Gemma 2).
    pub attention_softcap: Option<f32>,
    /// So do logits.
    pub logit_softcap: Option<f32>,
    /// The output head is the embedding.
    pub tied_head: bool,
    /// Longest sequence in tokens.
    pub max_context: usize,
    /// The rotary positions that blocks choose from; at least one.
    pub ropes: Vec<Rope>,
    /// What differs between blocks, `[n_layers]`.
    pub layers: Vec<LayerArch>,
    /// The mixture of experts that some blocks have instead of the MLP.
    pub moe: Option<Moe>,
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moe {
    /// Experts of a block.
    pub n_experts: usize,
    /// Experts that a token goes to; at most `n_experts`.
    pub per_token: usize,
    /// Width of an expert's MLP.
    pub width: usize,
    /// Probabilities of a token's experts are divided by their sum.
    pub normalised: bool,
}

impl Moe {
    fn check(&self) -> Result<(), String> {
        const MOST: usize = 1 << 12;
        let Self {
            n_experts,
            per_token,
            width,
            ..
        } = *self;
        if n_experts == 0 || n_experts > MOST {
            return Err(format!(
                "num_experts is {n_experts}, it must be in 1..={MOST}"
            ));
        }
        if per_token == 0 || per_token > n_experts {
            return Err(format!(
                "num_experts_per_tok is {per_token}, it must be in 1..={n_experts}"
            ));
        }
        if width == 0 || width > LARGEST {
            return Err(format!("moe_intermediate_size is {width}"));
        }
        Ok(())
    }
}

/// What differs between the blocks of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerArch {
    /// Tokens that a token attends to, itself included; all before it if absent. At least 1.
    pub window: Option<usize>,
    /// Index in [`Arch::ropes`]; without it heads are not rotated.
    pub rope: Option<usize>,
    /// Whether it has [`Arch::moe`] instead of the MLP.
    pub sparse: bool,
}

/// No size is larger, so that products of two fit.
const LARGEST: usize = 1 << 30;

/// Nonlinearity of a gated MLP (Shazeer 2020).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// The approximation of GELU with a hyperbolic tangent (Hendrycks and Gimpel 2016, section 2).
    GeluTanh,
}

impl Activation {
    fn parse(name: &str) -> Result<Self, String> {
        match name {
            "silu" | "swish" => Ok(Self::Silu),
            "gelu_pytorch_tanh" => Ok(Self::GeluTanh),
            other => Err(format!(
                "hidden_act `{other}` is not supported; supported: silu, gelu_pytorch_tanh"
            )),
        }
    }
}

impl Arch {
    /// Reads `config.json` in a model directory.
    ///
    /// # Errors
    /// If the file cannot be read, or describes something the engine does not compute.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let refuse = |message: String| Error::Model {
            path: path.clone(),
            message,
        };
        let text = std::fs::read_to_string(&path).map_err(|e| refuse(e.to_string()))?;
        Self::parse(&text).map_err(refuse)
    }

    /// Reads the text of a `config.json`; the error is a message.
    fn parse(text: &str) -> Result<Self, String> {
        let config: Config = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let name = config.architectures.first().cloned().unwrap_or_default();
        let family = Family::of(&name)?;
        refuse_quantised(&config)?;
        if config.use_bidirectional_attention == Some(true) {
            return Err("use_bidirectional_attention is not supported".into());
        }
        if config.use_bidirectional_attention == Some(true) {
            return Err("use_bidirectional_attention is not supported".into());
        }
        let n_heads = config.num_attention_heads;
        let head_dim = match (config.head_dim, family.default_head_dim()) {
            (Some(size), _) | (None, Some(size)) => size,
            (None, None) => config.hidden_size.checked_div(n_heads).unwrap_or(0),
        };
        let activation = family
            .activation(&config)
            .map_or(Ok(Activation::Silu), Activation::parse)?;
        let attention_bias = family.has_bias_flags() && config.attention_bias == Some(true);
        let is_gemma = family.is_gemma();
        let max_context = config.max_position_embeddings.unwrap_or(2048);
        let mut arch = Self {
            name,
            family,
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            n_layers: config.num_hidden_layers,
            n_heads,
            n_kv_heads: config.num_key_value_heads.unwrap_or(n_heads),
            head_dim,
            rms_eps: config.rms_norm_eps.unwrap_or(1e-6) as f32,
            norm_shift: if is_gemma { 1.0 } else { 0.0 },
            qk_norm: family.has_qk_norm(),
            post_norms: is_gemma,
            qkv_bias: attention_bias || family == Family::Qwen2,
            o_bias: attention_bias,
            mlp_bias: family.has_mlp_bias_flag() && config.mlp_bias == Some(true),
            fused: family == Family::Phi3,
            activation,
            embedding_scale: if is_gemma {
                (config.hidden_size as f32).sqrt()
            } else {
                1.0
            },
            attention_scale: family.attention_scale(&config, head_dim)?,
            attention_softcap: None,
            logit_softcap: None,
            tied_head: config
                .tie_word_embeddings
                .unwrap_or(family.ties_by_default()),
            max_context,
            ropes: Vec::new(),
            layers: Vec::new(),
            moe: family.moe(&config),
        };
        arch.check()?;
        let [attention, logits] = family.softcaps(&config)?;
        (arch.attention_softcap, arch.logit_softcap) = (attention, logits);
        arch.add_layers(&config)?;
        Ok(arch)
    }

    /// Windows and rotary positions, once sizes are known to be sane.
    fn add_layers(&mut self, config: &Config) -> Result<(), String> {
        let (ropes, context) = self.family.ropes(config, self.head_dim, self.max_context)?;
        self.max_context = self.max_context.min(context.unwrap_or(self.max_context));
        self.ropes = ropes;
        self.layers = self.family.layers(config)?;
        if let Some(moe) = &self.moe {
            moe.check()?;
        }
        for layer in &mut self.layers {
            if layer.window == Some(0) {
                return Err("sliding_window is 0".into());
            }
            // A window that no sequence is longer than is none.
            layer.window = layer.window.filter(|w| *w < self.max_context);
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.n_layers),
            ("num_attention_heads", self.n_heads),
            ("num_key_value_heads", self.n_kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_context),
        ];
        if let Some((name, value)) = positive.iter().find(|(_, n)| *n == 0 || *n > LARGEST) {
            return Err(format!("{name} is {value}"));
        }
        const MOST_LAYERS: usize = 1 << 14;
        if self.n_layers > MOST_LAYERS {
            let n = self.n_layers;
            return Err(format!("num_hidden_layers is {n}, above {MOST_LAYERS}"));
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let (heads, kv) = (self.n_heads, self.n_kv_heads);
            return Err(format!("{heads} query heads cannot share {kv} key heads"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("head_dim {} is odd", self.head_dim));
        }
        const WIDEST_HEAD: usize = 1 << 16;
        if self.head_dim > WIDEST_HEAD {
            let size = self.head_dim;
            return Err(format!("head_dim is {size}, above {WIDEST_HEAD}"));
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            let eps = self.rms_eps;
            return Err(format!("rms_norm_eps is {eps}, it must be at least 0"));
        }
        Ok(())
    }
}

/// Weights must be numbers of 16 or 32 bits; quantised ones have their own layout.
fn refuse_quantised(config: &Config) -> Result<(), String> {
    let Some(quantisation) = &config.quantization_config else {
        return Ok(());
    };
    let method = quantisation.get("quant_method").and_then(|m| m.as_str());
    let method = method.unwrap_or("unknown");
    Err(format!(
        "quantised weights (quant_method `{method}`) are not supported; supported: F32, F16, BF16"
    ))
}

#[cfg(test)]
mod tests;
