//! A model's `config.json`, read into the description of one decoder block.
//!
//! An architecture is data: which norms, biases, head sizes and rotary scaling the block has. What
//! is not listed here is refused by name, never ignored.

use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};

/// Everything the engine needs to know about a decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct Arch {
    /// As in `config.json`, such as `Qwen3ForCausalLM`.
    pub name: String,
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
    /// RMS norm of each query and key head before the rotation (Qwen3).
    pub qk_norm: bool,
    /// Biases of the q, k and v projections (Qwen2).
    pub qkv_bias: bool,
    /// The output head is the embedding.
    pub tied_head: bool,
    /// Longest sequence in tokens.
    pub max_context: usize,
    /// Inverse frequency of each pair of a head, `[head_dim / 2]`, radians per position.
    pub inverse_frequencies: Vec<f32>,
}

const SUPPORTED: [&str; 3] = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"];

/// The fields of `config.json` that are read. Unknown fields are ignored, as every writer adds some.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(default)]
    architectures: Vec<String>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
}

/// `rope_scaling`, or `rope_parameters` as transformers 5 writes it.
#[derive(Debug, Default, Deserialize)]
struct Rope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
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
        if !SUPPORTED.contains(&name.as_str()) {
            let supported = SUPPORTED.join(", ");
            return Err(format!(
                "architecture `{name}` is not supported; supported: {supported}"
            ));
        }
        refuse_unsupported(&config)?;
        let head_dim = match config.head_dim {
            Some(size) => size,
            None if config.num_attention_heads > 0 => {
                config.hidden_size / config.num_attention_heads
            }
            None => 0,
        };
        let qwen2 = name == "Qwen2ForCausalLM";
        let mut arch = Self {
            qk_norm: name == "Qwen3ForCausalLM",
            qkv_bias: qwen2,
            name,
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            n_layers: config.num_hidden_layers,
            n_heads: config.num_attention_heads,
            n_kv_heads: config
                .num_key_value_heads
                .unwrap_or(config.num_attention_heads),
            head_dim,
            rms_eps: config.rms_norm_eps.unwrap_or(1e-6) as f32,
            tied_head: config.tie_word_embeddings.unwrap_or(false),
            max_context: config.max_position_embeddings.unwrap_or(2048),
            inverse_frequencies: Vec::new(),
        };
        arch.check()?;
        arch.inverse_frequencies = inverse_frequencies(&config, head_dim)?;
        Ok(arch)
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
        const LARGEST: usize = 1 << 30;
        if let Some((name, value)) = positive.iter().find(|(_, n)| *n == 0 || *n > LARGEST) {
            return Err(format!("{name} is {value}"));
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

fn refuse_unsupported(config: &Config) -> Result<(), String> {
    let act = config.hidden_act.as_deref().unwrap_or("silu");
    if act != "silu" {
        return Err(format!(
            "hidden_act `{act}` is not supported; supported: silu"
        ));
    }
    let flags = [
        ("attention_bias", config.attention_bias),
        ("mlp_bias", config.mlp_bias),
        ("use_sliding_window", config.use_sliding_window),
    ];
    match flags.iter().find(|(_, value)| *value == Some(true)) {
        Some((name, _)) => Err(format!("{name} is not supported")),
        None => Ok(()),
    }
}

/// Rotary frequencies with their scaling applied (Su et al. 2021, section 3.2.2).
fn inverse_frequencies(config: &Config, head_dim: usize) -> Result<Vec<f32>, String> {
    let none = Rope::default();
    let parameters = config.rope_parameters.as_ref();
    let scaling = parameters.or(config.rope_scaling.as_ref()).unwrap_or(&none);
    let theta = scaling.rope_theta.or(config.rope_theta).unwrap_or(10_000.0);
    if !(theta.is_finite() && theta > 0.0) {
        return Err(format!("rope_theta is {theta}, it must be above 0"));
    }
    let exponents = (0..head_dim / 2).map(|i| (2 * i) as f64 / head_dim as f64);
    let plain = exponents.map(|e| 1.0 / theta.powf(e));
    let need = |name: &str, value: Option<f64>| {
        let value = value.filter(|v| v.is_finite() && *v > 0.0);
        value.ok_or_else(|| format!("rope scaling has no usable `{name}`"))
    };
    let frequencies: Vec<f32> = match scaling.rope_type.as_deref().unwrap_or("default") {
        "default" => plain.map(|f| f as f32).collect(),
        "linear" => {
            let factor = need("factor", scaling.factor)?;
            plain.map(|f| (f / factor) as f32).collect()
        }
        "llama3" => {
            let rule = Llama3 {
                factor: need("factor", scaling.factor)?,
                low: need("low_freq_factor", scaling.low_freq_factor)?,
                high: need("high_freq_factor", scaling.high_freq_factor)?,
                context: need(
                    "original_max_position_embeddings",
                    scaling.original_max_position_embeddings,
                )?,
            };
            plain.map(|f| rule.scale(f) as f32).collect()
        }
        other => {
            return Err(format!(
                "rope type `{other}` is not supported; supported: default, linear, llama3"
            ));
        }
    };
    match frequencies.iter().find(|f| !f.is_finite()) {
        None => Ok(frequencies),
        Some(f) => Err(format!("rope_theta {theta} gives the frequency {f}")),
    }
}

/// Llama 3.1's scaling: short wavelengths stay, long ones are stretched, between them a blend.
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    context: f64,
}

impl Llama3 {
    fn scale(&self, frequency: f64) -> f64 {
        let wavelength = std::f64::consts::TAU / frequency;
        if wavelength < self.context / self.high {
            frequency
        } else if wavelength > self.context / self.low {
            frequency / self.factor
        } else {
            let blend = (self.context / wavelength - self.low) / (self.high - self.low);
            (1.0 - blend) * frequency / self.factor + blend * frequency
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(extra: &str) -> String {
        format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16,
            "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4{extra}}}"#
        )
    }

    #[test]
    fn old_and_new_spellings_of_rope_mean_the_same() {
        let scaling = r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64"#;
        let old = format!(
            r#", "rope_theta": 500.0, "rope_scaling": {{"rope_type": "llama3", {scaling}}}"#
        );
        let new = format!(
            r#", "rope_parameters": {{"rope_theta": 500.0, "rope_type": "llama3", {scaling}}}"#
        );

        let (old, new) = (
            Arch::parse(&config(&old)).unwrap(),
            Arch::parse(&config(&new)).unwrap(),
        );

        assert_eq!(old, new);
        assert_eq!(old.inverse_frequencies[0], 1.0);
        assert!(old.inverse_frequencies[1] < 500f32.powf(-0.5));
    }

    #[test]
    fn what_cannot_be_computed_is_refused_by_name() {
        let cases = [
            (
                config("").replace("Llama", "Mamba"),
                "architecture `MambaForCausalLM` is not supported",
            ),
            (
                config(r#", "rope_scaling": {"type": "yarn"}"#),
                "rope type `yarn` is not supported",
            ),
            (
                config(r#", "hidden_act": "gelu""#),
                "hidden_act `gelu` is not supported",
            ),
            (config(r#", "mlp_bias": true"#), "mlp_bias is not supported"),
            (
                config(r#", "num_key_value_heads": 3"#),
                "4 query heads cannot share 3 key heads",
            ),
            (config(r#", "head_dim": 5"#), "head_dim 5 is odd"),
            (config("").replace("32", "0"), "vocab_size is 0"),
            (
                config(r#", "head_dim": 18446744073709551614"#),
                "head_dim is 18446744073709551614",
            ),
            (
                config(r#", "head_dim": 1000000000"#),
                "head_dim is 1000000000, above 65536",
            ),
            (
                config(r#", "rope_theta": 0"#),
                "rope_theta is 0, it must be above 0",
            ),
            (
                config(r#", "rope_parameters": {"rope_theta": -10.0}"#),
                "rope_theta is -10, it must be above 0",
            ),
            (
                config(r#", "rope_theta": 1e-200"#),
                "gives the frequency inf",
            ),
            (
                config(r#", "rms_norm_eps": -1e-6"#),
                "rms_norm_eps is -0.000001, it must be at least 0",
            ),
            (
                config(r#", "rms_norm_eps": 1e300"#),
                "rms_norm_eps is inf, it must be at least 0",
            ),
            ("{".into(), "EOF while parsing"),
        ];
        for (text, expected) in cases {
            let message = Arch::parse(&text).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }
}
