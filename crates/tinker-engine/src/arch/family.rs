//! The families of models, and what each makes of a `config.json`.

use super::config::{Config, Field, RopeConfig, RopeParameters};
use super::rope::{Rope, Setting, rope};
use super::{LayerArch, Moe};

/// A family of models whose blocks are alike; one class of transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, `SmolLM` 1 and 2.
    Llama,
    /// Mistral 7B and what followed it without experts.
    Mistral,
    /// `SmolLM3`.
    SmolLm3,
    /// Phi-3 and Phi-4.
    Phi3,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3 without experts.
    Qwen3,
    /// Qwen3 with experts.
    Qwen3Moe,
    /// Gemma 2.
    Gemma2,
    /// Gemma 3 for text.
    Gemma3,
}

/// Classes by name.
const CLASSES: [(&str, Family); 9] = [
    ("LlamaForCausalLM", Family::Llama),
    ("MistralForCausalLM", Family::Mistral),
    ("SmolLM3ForCausalLM", Family::SmolLm3),
    ("Phi3ForCausalLM", Family::Phi3),
    ("Qwen2ForCausalLM", Family::Qwen2),
    ("Qwen3ForCausalLM", Family::Qwen3),
    ("Qwen3MoeForCausalLM", Family::Qwen3Moe),
    ("Gemma2ForCausalLM", Family::Gemma2),
    ("Gemma3ForCausalLM", Family::Gemma3),
];

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";

impl Family {
    pub(super) fn of(class: &str) -> Result<Self, String> {
        match CLASSES.iter().find(|(name, _)| *name == class) {
            Some((_, family)) => Ok(*family),
            None => {
                let supported = CLASSES.map(|(name, _)| name).join(", ");
                Err(format!(
                    "architecture `{class}` is not supported; supported: {supported}"
                ))
            }
        }
    }

    pub(super) fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }

    pub(super) fn has_qk_norm(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Qwen3Moe | Self::Gemma3)
    }

    pub(super) fn ties_by_default(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3 | Self::SmolLm3)
    }

    /// Whether `attention_bias` is read.
    pub(super) fn has_bias_flags(self) -> bool {
        !matches!(self, Self::Mistral | Self::Phi3 | Self::Qwen2)
    }

    /// Whether `mlp_bias` is read.
    pub(super) fn has_mlp_bias_flag(self) -> bool {
        matches!(self, Self::Llama | Self::SmolLm3)
    }

    pub(super) fn default_head_dim(self) -> Option<usize> {
        match self {
            Self::Gemma2 | Self::Gemma3 => Some(256),
            Self::Qwen3 => Some(128),
            _ => None,
        }
    }

    /// Name of the activation, if it is given.
    pub(super) fn activation(self, config: &Config) -> Option<&str> {
        if self.is_gemma() {
            Some(
                config
                    .hidden_activation
                    .as_deref()
                    .unwrap_or("gelu_pytorch_tanh"),
            )
        } else {
            config.hidden_act.as_deref()
        }
    }

    pub(super) fn attention_scale(self, config: &Config, head_dim: usize) -> Result<f32, String> {
        if !self.is_gemma() {
            return Ok(1.0 / (head_dim as f32).sqrt());
        }
        let scalar = config.query_pre_attn_scalar.unwrap_or(256.0);
        if scalar.is_finite() && scalar > 0.0 {
            Ok(scalar.powf(-0.5) as f32)
        } else {
            Err(format!(
                "query_pre_attn_scalar is {scalar}, it must be above 0"
            ))
        }
    }

    /// Caps of the scores of attention and of the logits.
    pub(super) fn softcaps(self, config: &Config) -> Result<[Option<f32>; 2], String> {
        let defaults = match self {
            Self::Gemma2 => [Some(50.0), Some(30.0)],
            // transformers reads the first of these in Gemma 3 and does not apply it.
            Self::Gemma3 => [None, None],
            _ => return Ok([None, None]),
        };
        let attention = match self {
            Self::Gemma3 => None,
            _ => config.attn_logit_softcapping,
        };
        Ok([
            cap("attn_logit_softcapping", attention, defaults[0])?,
            cap(
                "final_logit_softcapping",
                config.final_logit_softcapping,
                defaults[1],
            )?,
        ])
    }

    /// The rotary positions that [`Family::layers`] refers to, and the context they end at.
    pub(super) fn ropes(
        self,
        config: &Config,
        head_dim: usize,
        max_context: usize,
    ) -> Result<(Vec<Rope>, Option<usize>), String> {
        let setting = Setting {
            head_dim,
            theta: config.rope_theta.unwrap_or(self.default_theta()),
            partial: config.partial_rotary_factor.unwrap_or(1.0),
            max_positions: max_context as f64,
            original_positions: config.original_max_position_embeddings,
        };
        let mut scalings = vec![(self.scaling(config, FULL), setting)];
        if self == Self::Gemma3 {
            let theta = config.rope_local_base_freq.unwrap_or(10_000.0);
            let local = match &config.rope_parameters {
                Some(RopeParameters::ByLayerType(_)) => self.scaling(config, SLIDING),
                // The older spelling scales the global blocks alone.
                _ => RopeConfig::default(),
            };
            scalings.push((local, Setting { theta, ..setting }));
        }
        let mut ropes = Vec::new();
        let mut shortest = None;
        for (scaling, setting) in scalings {
            self.check_partial(&scaling, setting)?;
            let (rope, context) = rope(&scaling, setting)?;
            ropes.push(rope);
            shortest = match (shortest, context) {
                (Some(a), Some(b)) => Some(usize::min(a, b)),
                (a, b) => a.or(b),
            };
        }
        Ok((ropes, shortest))
    }

    fn check_partial(self, scaling: &RopeConfig, setting: Setting) -> Result<(), String> {
        let partial = scaling.partial_rotary_factor.unwrap_or(setting.partial);
        if partial == 1.0 || matches!(self, Self::Phi3) {
            return Ok(());
        }
        Err(format!(
            "partial_rotary_factor {partial} is not supported here; supported: 1, and others in Phi-3"
        ))
    }

    fn default_theta(self) -> f64 {
        match self {
            Self::SmolLm3 => 2_000_000.0,
            Self::Gemma3 => 1_000_000.0,
            _ => 10_000.0,
        }
    }

    /// Scaling of blocks of a type, in either spelling.
    fn scaling(self, config: &Config, layer_type: &str) -> RopeConfig {
        let mut scaling = match (&config.rope_scaling, &config.rope_parameters) {
            (_, Some(RopeParameters::ByLayerType(by_type))) if !by_type.is_empty() => by_type
                .get(layer_type)
                .cloned()
                .flatten()
                .unwrap_or_default(),
            (Some(scaling), _) => scaling.clone(),
            (None, Some(RopeParameters::One(parameters))) => (**parameters).clone(),
            (None, _) => RopeConfig::default(),
        };
        // Phi-3 wrote its own scaling under this name for a while.
        if self == Self::Phi3 && scaling.rope_type.as_deref() == Some("yarn") {
            scaling.rope_type = Some("longrope".into());
        }
        scaling
    }

    /// Window and rotary positions of each block.
    pub(super) fn layers(self, config: &Config) -> Result<Vec<LayerArch>, String> {
        let n = config.num_hidden_layers;
        let types = self.layer_types(config, n)?;
        let window = self.window(config);
        let rotated = self.rotated(config, n)?;
        let layer = |i: usize| {
            let is_local = types[i];
            let rope = usize::from(self == Self::Gemma3 && is_local);
            LayerArch {
                window: window.filter(|_| is_local),
                rope: rotated[i].then_some(rope),
                sparse: self.is_sparse(config, i),
            }
        };
        Ok((0..n).map(layer).collect())
    }

    /// The mixture of experts; its sizes are yet to be checked.
    pub(super) fn moe(self, config: &Config) -> Option<Moe> {
        // transformers takes blocks for dense where there are no experts.
        let n_experts = config.num_experts.unwrap_or(128);
        (self == Self::Qwen3Moe && n_experts > 0).then(|| Moe {
            n_experts,
            per_token: config.num_experts_per_tok.unwrap_or(8),
            width: config.moe_intermediate_size.unwrap_or(768),
            normalised: config.norm_topk_prob.unwrap_or(false),
        })
    }

    /// Whether block `i` has experts.
    fn is_sparse(self, config: &Config, i: usize) -> bool {
        let step = config.decoder_sparse_step.unwrap_or(1).max(1);
        let dense = config.mlp_only_layers.as_deref().unwrap_or_default();
        self.moe(config).is_some() && (i + 1).is_multiple_of(step) && !dense.contains(&i)
    }

    /// The window of the blocks that have one.
    fn window(self, config: &Config) -> Option<usize> {
        let or = |default: Option<usize>| config.sliding_window.unwrap_or(default);
        match self {
            Self::Llama => None,
            Self::Phi3 => or(None),
            Self::Mistral | Self::Gemma2 | Self::Gemma3 => or(Some(4096)),
            Self::Qwen2 | Self::Qwen3 | Self::Qwen3Moe => {
                or(Some(4096)).filter(|_| config.use_sliding_window == Some(true))
            }
            Self::SmolLm3 => or(None).filter(|_| config.use_sliding_window == Some(true)),
        }
    }

    /// Which blocks have a window.
    fn layer_types(self, config: &Config, n: usize) -> Result<Vec<bool>, String> {
        if matches!(
            self,
            Self::Llama | Self::Mistral | Self::Phi3 | Self::Qwen3Moe
        ) {
            return Ok(vec![true; n]);
        }
        if let Some(types) = &config.layer_types {
            return parse_types(types, n);
        }
        let every = match self {
            Self::Gemma2 => 2,
            Self::Gemma3 => config.sliding_window_pattern.unwrap_or(6),
            Self::SmolLm3 => return Ok(self.rotated(config, n)?.iter().map(|r| !r).collect()),
            _ => {
                let first = config.max_window_layers.unwrap_or(28);
                return Ok((0..n).map(|i| i >= first).collect());
            }
        };
        if every == 0 {
            return Err("sliding_window_pattern is 0".into());
        }
        Ok((1..=n).map(|i| !i.is_multiple_of(every)).collect())
    }

    /// Which blocks rotate their heads.
    fn rotated(self, config: &Config, n: usize) -> Result<Vec<bool>, String> {
        if self != Self::SmolLm3 {
            return Ok(vec![true; n]);
        }
        if let Some(flags) = &config.no_rope_layers {
            check_length("no_rope_layers", flags.len(), n)?;
            return Ok(flags.iter().map(|flag| *flag != 0).collect());
        }
        match config.no_rope_layer_interval.unwrap_or(4) {
            0 => Err("no_rope_layer_interval is 0".into()),
            every => Ok((1..=n).map(|i| !i.is_multiple_of(every)).collect()),
        }
    }
}

fn parse_types(types: &[String], n: usize) -> Result<Vec<bool>, String> {
    check_length("layer_types", types.len(), n)?;
    let is_local = |name: &String| match name.as_str() {
        SLIDING => Ok(true),
        FULL => Ok(false),
        other => Err(format!(
            "layer type `{other}` is not supported; supported: {SLIDING}, {FULL}"
        )),
    };
    types.iter().map(is_local).collect()
}

fn check_length(name: &str, len: usize, n: usize) -> Result<(), String> {
    if len == n {
        return Ok(());
    }
    Err(format!("{name} has {len} entries for {n} layers"))
}

fn cap(name: &str, given: Field<f64>, default: Option<f64>) -> Result<Option<f32>, String> {
    match given.unwrap_or(default) {
        Some(cap) if !((cap as f32).is_finite() && cap as f32 > 0.0) => {
            Err(format!("{name} is {cap}, it must be above 0"))
        }
        cap => Ok(cap.map(|cap| cap as f32)),
    }
}
