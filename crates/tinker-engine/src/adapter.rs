//! LoRA adapters on the host: what is trained, and their tensors by PEFT name.

use std::collections::BTreeMap;

/// Which adapter to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoraSpec {
    /// Inner dimension `r`; 1 or more.
    pub rank: usize,
    /// Seed of the initial `A`.
    pub seed: u64,
    /// Adapt the attention projections q, k, v and o.
    pub train_attn: bool,
    /// Adapt the MLP projections gate, up and down.
    pub train_mlp: bool,
    /// Adapt the output head (also when it is tied to the embedding).
    pub train_unembed: bool,
}

/// LoRA scaling numerator: a module adds `ALPHA / rank * B A x`.
pub const ALPHA: f32 = 32.0;

/// A named tensor on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Row-major dimensions.
    pub shape: Vec<usize>,
    /// Values.
    pub data: Vec<f32>,
}

/// Everything that makes an adapter continue exactly where it was.
///
/// Keys are PEFT names, such as
/// `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, `A` `[r, in]`, `B` `[out, r]`.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterState {
    /// How it was created.
    pub spec: LoraSpec,
    /// LoRA weights.
    pub weights: BTreeMap<String, HostTensor>,
    /// First and second moments by the name of their weight; empty before the first step. Dimuon has
    /// no second ones: they are empty.
    pub moments: BTreeMap<String, (Vec<f32>, Vec<f32>)>,
    /// Accumulated gradient by the name of its weight; empty when there is none.
    pub gradient: BTreeMap<String, Vec<f32>>,
    /// Optimizer steps taken.
    pub step: u64,
}
