//! The frozen weights, packed for the kernels.

use std::path::Path;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::amx::Tiles;
use super::buffer::Buffer;
use super::gemm::{Cols, Panels};
use crate::arch::Arch;
use crate::error::{Error, Result};
use crate::load::Weights;

/// A weight as right factor, in the form that its kernels read.
#[derive(Debug)]
pub(crate) enum Factor {
    /// For vectors.
    Panels(Panels),
    /// For the matrix unit.
    #[cfg(target_arch = "x86_64")]
    Tiles(Tiles),
}

impl Factor {
    /// As the right factor of a product.
    pub(crate) fn cols(&self) -> Cols<'_> {
        match self {
            Self::Panels(panels) => panels.cols(),
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(tiles) => tiles.cols(),
        }
    }

    fn transposed(&self) -> Self {
        match self {
            Self::Panels(panels) => Self::Panels(panels.transposed()),
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(tiles) => Self::Tiles(tiles.transposed()),
        }
    }

    fn row(&self, t: usize, out: &mut [f32]) {
        match self {
            Self::Panels(panels) => panels.row(t, out),
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(tiles) => tiles.row(t, out),
        }
    }

    fn column(&self, j: usize, out: &mut [f32]) {
        match self {
            Self::Panels(panels) => panels.column(j, out),
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(tiles) => tiles.column(j, out),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Panels(panels) => panels.len(),
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(tiles) => tiles.len(),
        }
    }
}

/// Which units of the processor compute with the frozen weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "no other architecture has the unit")
)]
pub(crate) enum Units {
    /// Vectors alone.
    Vectors,
    /// The matrix unit where it is faster; made only for a machine that has it.
    Matrix,
}

impl Units {
    /// The best of this machine.
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if super::amx::is_available() {
            return Self::Matrix;
        }
        Self::Vectors
    }

    /// A right factor of `f32`, to be multiplied on these units.
    pub(crate) fn on(self, factor: Cols<'_>) -> Cols<'_> {
        match self {
            Self::Matrix => factor.split(),
            Self::Vectors => factor,
        }
    }
}

/// A frozen linear layer `y = x W^T + b`, `W [out, in]`.
///
/// A weight of bf16 is one number to the matrix unit, which then always takes it. A weight of `f32` has
/// to be split for it: that pays for the many rows of training, but not in decoding, which waits for
/// memory, so sampling and scoring of prompts stay on vectors.
#[derive(Debug)]
pub(crate) struct Linear {
    /// `W^T` as right factor, `[in, out]`.
    forward: Factor,
    /// `W` as right factor, `[out, in]`; made when something is first trained.
    backward: OnceLock<Factor>,
    /// `[out]`.
    pub(crate) bias: Option<Vec<f32>>,
    /// What training computes with.
    pub(crate) units: Units,
}

impl Linear {
    fn load(
        weights: &Weights,
        units: Units,
        name: &str,
        [out, inner]: [usize; 2],
        bias: bool,
    ) -> Result<Self> {
        let tensor = weights.tensor(&format!("{name}.weight"), &[out, inner])?;
        let column = |j: usize, row: &mut [f32]| tensor.read(j * inner, row);
        let forward = match units {
            #[cfg(target_arch = "x86_64")]
            Units::Matrix if tensor.is_bf16() || is_bf16(out, inner, column)? => {
                Factor::Tiles(Tiles::from_columns(inner, out, column)?)
            }
            _ => Factor::Panels(Panels::from_columns(inner, out, column)?),
        };
        let bias = bias
            .then(|| weights.vector(&format!("{name}.bias"), out))
            .transpose()?;
        Ok(Self {
            forward,
            backward: OnceLock::new(),
            bias,
            units,
        })
    }

    /// `W^T` as right factor, to sample or score prompts with.
    pub(crate) fn inference(&self) -> Cols<'_> {
        self.forward.cols()
    }

    /// `W^T` as right factor, to train with.
    pub(crate) fn training(&self) -> Cols<'_> {
        self.for_training(&self.forward)
    }

    /// `W` as right factor, for gradients.
    pub(crate) fn backward(&self) -> Cols<'_> {
        self.for_training(self.backward.get_or_init(|| self.forward.transposed()))
    }

    fn for_training<'a>(&self, factor: &'a Factor) -> Cols<'a> {
        match factor {
            Factor::Panels(panels) => self.units.on(panels.cols()),
            #[cfg(target_arch = "x86_64")]
            Factor::Tiles(tiles) => tiles.cols(),
        }
    }

    /// Copies row `j` of `W`, `[in]`, from whichever packing holds it closer together.
    fn row(&self, j: usize, out: &mut [f32]) {
        match self.backward.get() {
            Some(factor) => factor.row(j, out),
            None => self.forward.column(j, out),
        }
    }
}

/// Whether all of a matrix's columns are bf16 numbers.
#[cfg(target_arch = "x86_64")]
fn is_bf16(
    n: usize,
    k: usize,
    mut column: impl FnMut(usize, &mut [f32]) -> Result<()>,
) -> Result<bool> {
    let mut values = vec![0.0; k];
    for j in 0..n {
        column(j, &mut values)?;
        if !super::amx::is_bf16(&values) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// One decoder block.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) mlp_norm: Vec<f32>,
    /// Norms of query and key heads, `[head_dim]` each.
    pub(crate) qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) o: Linear,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

/// A base model.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) arch: Arch,
    pub(crate) layers: Vec<Layer>,
    pub(crate) final_norm: Vec<f32>,
    pub(crate) head: Linear,
    /// `[vocab, hidden]`; `None` where it is the head.
    embedding: Option<Buffer>,
}

impl Model {
    /// Loads and packs a model directory.
    pub(crate) fn load(dir: &Path, units: Units) -> Result<Self> {
        let arch = Arch::load(dir)?;
        let weights = Weights::open(dir)?;
        let (vocab, hidden) = (arch.vocab_size, arch.hidden_size);
        let layers = (0..arch.n_layers)
            .map(|i| load_layer(&arch, &weights, units, i))
            .collect::<Result<Vec<_>>>()?;
        let embedding = "model.embed_tokens";
        let (head, embedding) = if arch.tied_head {
            (
                Linear::load(&weights, units, embedding, [vocab, hidden], false)?,
                None,
            )
        } else {
            let tensor = weights.tensor(&format!("{embedding}.weight"), &[vocab, hidden])?;
            let mut rows = Buffer::zeros_huge(vocab * hidden);
            tensor.read(0, &mut rows)?;
            (
                Linear::load(&weights, units, "lm_head", [vocab, hidden], false)?,
                Some(rows),
            )
        };
        let final_norm = weights.vector("model.norm.weight", hidden)?;
        let beyond = arch.n_layers;
        if weights.contains(&format!("model.layers.{beyond}.mlp.down_proj.weight")) {
            let message =
                format!("has weights of layer {beyond}, but config.json has {beyond} layers");
            return Err(Error::Model {
                path: dir.to_path_buf(),
                message,
            });
        }
        Ok(Self {
            arch,
            layers,
            final_norm,
            head,
            embedding,
        })
    }

    /// Writes the embedding of each token to `out`, `[tokens, hidden]`.
    pub(crate) fn embed(&self, tokens: &[u32], out: &mut [f32]) {
        let hidden = self.arch.hidden_size;
        for (token, out) in tokens.iter().zip(out.chunks_exact_mut(hidden)) {
            let token = *token as usize;
            match &self.embedding {
                Some(rows) => out.copy_from_slice(&rows[token * hidden..][..hidden]),
                None => self.head.row(token, out),
            }
        }
    }

    /// Number of parameters.
    pub(crate) fn n_parameters(&self) -> u64 {
        let linear = |l: &Linear| l.forward.len() + l.bias.as_ref().map_or(0, Vec::len);
        let layers = self.layers.iter().map(|l| {
            let norms = l.attention_norm.len() + l.mlp_norm.len();
            let qk = l.qk_norm.as_ref().map_or(0, |(q, k)| q.len() + k.len());
            let linears = [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down];
            norms + qk + linears.map(linear).iter().sum::<usize>()
        });
        let embedding = self.embedding.as_ref().map_or(0, |e| e.len());
        (layers.sum::<usize>() + linear(&self.head) + embedding + self.final_norm.len()) as u64
    }
}

fn load_layer(arch: &Arch, weights: &Weights, units: Units, i: usize) -> Result<Layer> {
    let (hidden, mlp) = (arch.hidden_size, arch.intermediate_size);
    let (q, kv) = (
        arch.n_heads * arch.head_dim,
        arch.n_kv_heads * arch.head_dim,
    );
    let name = |part: &str| format!("model.layers.{i}.{part}");
    let linear = |part: &str, out: usize, inner: usize, bias: bool| {
        Linear::load(weights, units, &name(part), [out, inner], bias)
    };
    let head_norm = |part: &str| weights.vector(&name(part), arch.head_dim);
    let qk_norm = if arch.qk_norm {
        Some((
            head_norm("self_attn.q_norm.weight")?,
            head_norm("self_attn.k_norm.weight")?,
        ))
    } else {
        None
    };
    Ok(Layer {
        attention_norm: weights.vector(&name("input_layernorm.weight"), hidden)?,
        mlp_norm: weights.vector(&name("post_attention_layernorm.weight"), hidden)?,
        qk_norm,
        q: linear("self_attn.q_proj", q, hidden, arch.qkv_bias)?,
        k: linear("self_attn.k_proj", kv, hidden, arch.qkv_bias)?,
        v: linear("self_attn.v_proj", kv, hidden, arch.qkv_bias)?,
        o: linear("self_attn.o_proj", hidden, q, false)?,
        gate: linear("mlp.gate_proj", mlp, hidden, false)?,
        up: linear("mlp.up_proj", mlp, hidden, false)?,
        down: linear("mlp.down_proj", hidden, mlp, false)?,
    })
}
