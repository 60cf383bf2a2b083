//! The frozen weights, packed for the kernels.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::amx::Tiles;
use super::buffer::Buffer;
use super::elementwise;
use super::gemm::{Cols, Panels, Rounding, Rows};
use super::lora::Group;
use super::quant::Quantized;
#[cfg(target_arch = "x86_64")]
use super::tile::TileUnit;
use crate::arch::{Arch, Moe};
use crate::backend::{Precision, Quantization};
use crate::error::{Error, Result};
use crate::load::{Tensor, Weights};

/// A weight as right factor, in the form that its kernels read.
#[derive(Debug)]
pub(crate) enum Factor {
    /// For vectors.
    Panels(Panels),
    /// For the matrix unit.
    #[cfg(target_arch = "x86_64")]
    Tiles(Tiles),
    /// For either, widened on the way.
    Quantized(Quantized),
}

impl Factor {
    /// As the right factor of a product.
    pub(crate) fn cols(&self) -> Cols<'_> {
        match self {
            Self::Panels(panels) => panels.cols(),
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(tiles) => tiles.cols(),
            Self::Quantized(weights) => Cols::quantized(weights),
        }
    }

    fn column(&self, j: usize, out: &mut [f32]) {
        match self {
            Self::Panels(panels) => panels.column(j, out),
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(tiles) => tiles.column(j, out),
            Self::Quantized(weights) => weights.column(j, out),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Panels(panels) => panels.len(),
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(tiles) => tiles.len(),
            Self::Quantized(weights) => weights.len(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Quantized(weights) => weights.bytes(),
            _ => size_of_val(self.cols().data()),
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
    /// Vectors that multiply bf16 numbers, for rounded inputs and weights; made only for a machine that has
    /// them.
    Dots,
    /// The matrix unit where it is faster; made only for a machine that has it.
    Matrix,
}

impl Units {
    /// The best of this machine.
    pub(crate) fn best(precision: Precision) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if super::amx::is_available() {
                return Self::Matrix;
            }
            if precision == Precision::Bf16 && super::amx::has_dots() {
                return Self::Dots;
            }
        }
        let _ = precision;
        Self::Vectors
    }

    /// A right factor of `f32` that is rounded to bf16, to be multiplied on these units with rounded rows.
    fn on_rounded(self, factor: Cols<'_>) -> Cols<'_> {
        match self {
            Self::Vectors => factor,
            #[cfg(target_arch = "x86_64")]
            Self::Dots | Self::Matrix => factor.round().on(self.tiles()),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Dots | Self::Matrix => factor,
        }
    }

    /// What multiplies tiles.
    #[cfg(target_arch = "x86_64")]
    fn tiles(self) -> TileUnit {
        match self {
            Self::Dots => TileUnit::Dots,
            Self::Matrix | Self::Vectors => TileUnit::Amx,
        }
    }

    /// A right factor of `f32`, to be multiplied on these units.
    pub(crate) fn on(self, factor: Cols<'_>) -> Cols<'_> {
        match self {
            Self::Matrix => factor.split(),
            // Three parts of each number would take longer than its product with the other.
            Self::Vectors | Self::Dots => factor,
        }
    }
}

/// In what form a model is held, and what computes with it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    pub(crate) units: Units,
    /// What the layers of blocks are turned into.
    pub(crate) quantization: Option<Quantization>,
    pub(crate) precision: Precision,
}

impl Form {
    /// That of the model's file.
    #[cfg(test)]
    pub(crate) fn of_file(units: Units) -> Self {
        Self {
            units,
            quantization: None,
            precision: Precision::F32,
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
    /// `W` as right factor of vectors, `[out, in]`; made when something is first trained. The matrix unit
    /// turns its tiles instead.
    backward: OnceLock<Panels>,
    /// `[out]`.
    pub(crate) bias: Option<Vec<f32>>,
    /// What training computes with.
    pub(crate) units: Units,
    precision: Precision,
}

impl Linear {
    fn load(source: &Source<'_>, part: Part<'_>) -> Result<Self> {
        let Part {
            name,
            rows,
            of,
            inner,
            bias,
            quantization,
            precision,
        } = part;
        let (weights, out) = (source.weights, rows.len());
        let units = match (source.form.units, precision) {
            // Which take bf16 numbers alone.
            (Units::Dots, Precision::F32) => Units::Vectors,
            (units, _) => units,
        };
        let tensor = weights.tensor(&format!("{name}.weight"), &[of, inner])?;
        let column = |j: usize, row: &mut [f32]| {
            tensor.read((rows.start + j) * inner, row)?;
            if precision == Precision::Bf16 && quantization.is_none() {
                elementwise::round_to_bf16(row);
            }
            Ok(())
        };
        let forward = match (quantization, units) {
            (Some(quantization), _) => {
                Factor::Quantized(Quantized::from_columns(quantization, inner, out, column)?)
            }
            #[cfg(target_arch = "x86_64")]
            (None, Units::Matrix | Units::Dots)
                if tensor.is_bf16()
                    || precision == Precision::Bf16
                    || is_bf16(out, inner, column)? =>
            {
                Factor::Tiles(Tiles::from_columns(inner, out, column)?)
            }
            (None, _) => Factor::Panels(Panels::from_columns(inner, out, column)?),
        };
        let bias = bias
            .then(|| weights.vector(&format!("{name}.bias"), of))
            .transpose()?;
        let bias = bias.map(|bias| bias[rows].to_vec());
        Ok(Self {
            forward,
            backward: OnceLock::new(),
            bias,
            units,
            precision,
        })
    }

    /// The input, or the gradient of the output, as left factor: rows of `width`.
    pub(crate) fn rows<'a>(&self, data: &'a [f32], width: usize) -> Rows<'a> {
        match self.precision {
            Precision::F32 => Rows::row_major(data, width),
            Precision::Bf16 => Rows::rounded(data, width),
        }
    }

    /// How a backward pass multiplies activations with each other.
    pub(crate) fn rounding(&self) -> Rounding {
        #[cfg(target_arch = "x86_64")]
        if self.precision == Precision::Bf16 && self.units != Units::Vectors {
            return Rounding(Some(self.units.tiles()));
        }
        Rounding(None)
    }

    /// `W^T` as right factor, to sample or score prompts with.
    pub(crate) fn inference(&self) -> Cols<'_> {
        match &self.forward {
            #[cfg(target_arch = "x86_64")]
            Factor::Tiles(tiles) => tiles.cols().on(self.units.tiles()),
            Factor::Quantized(weights) if self.precision == Precision::Bf16 => {
                self.units.on_rounded(Cols::quantized(weights))
            }
            other => other.cols(),
        }
    }

    /// `W^T` as right factor, to train with.
    pub(crate) fn training(&self) -> Cols<'_> {
        match &self.forward {
            Factor::Panels(panels) => self.units.on(panels.cols()),
            #[cfg(target_arch = "x86_64")]
            Factor::Tiles(tiles) => tiles.cols().on(self.units.tiles()),
            Factor::Quantized(weights) => self.widened(Cols::quantized(weights)),
        }
    }

    /// `W` as right factor, for gradients.
    pub(crate) fn backward(&self) -> Cols<'_> {
        match &self.forward {
            Factor::Panels(panels) => {
                let turned = self.backward.get_or_init(|| panels.transposed());
                self.units.on(turned.cols())
            }
            #[cfg(target_arch = "x86_64")]
            Factor::Tiles(tiles) => tiles.turned().on(self.units.tiles()),
            Factor::Quantized(weights) => self.widened(Cols::turned_quantized(weights)),
        }
    }

    /// Quantized weights, or their transpose, to train with.
    fn widened<'a>(&self, factor: Cols<'a>) -> Cols<'a> {
        match self.precision {
            Precision::F32 => self.units.on(factor),
            Precision::Bf16 => self.units.on_rounded(factor),
        }
    }

    /// Copies row `j` of `W`, `[in]`, from whichever packing holds it closer together.
    fn row(&self, j: usize, out: &mut [f32]) {
        match self.backward.get() {
            Some(panels) => panels.row(j, out),
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
    /// Norms of what attention and MLP add, where the architecture has them.
    pub(crate) post_attention_norm: Option<Vec<f32>>,
    pub(crate) post_mlp_norm: Option<Vec<f32>>,
    /// Norms of query and key heads, `[head_dim]` each.
    pub(crate) qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) o: Linear,
    pub(crate) mlp: Mlp,
}

/// The second half of a block.
#[derive(Debug)]
pub(crate) enum Mlp {
    Dense(Box<Gated>),
    Sparse(Box<Experts>),
}

/// A gated MLP.
#[derive(Debug)]
pub(crate) struct Gated {
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

/// A mixture of experts.
#[derive(Debug)]
pub(crate) struct Experts {
    pub(crate) moe: Moe,
    /// `[experts, hidden]`, frozen.
    pub(crate) router: Linear,
    pub(crate) experts: Vec<Gated>,
}

impl Mlp {
    fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Dense(gated) => gated.linears().to_vec(),
            Self::Sparse(sparse) => {
                let Experts {
                    router, experts, ..
                } = &**sparse;
                let experts = experts.iter().flat_map(Gated::linears);
                experts.chain([router]).collect()
            }
        }
    }
}

impl Gated {
    fn linears(&self) -> [&Linear; 3] {
        [&self.gate, &self.up, &self.down]
    }
}

/// Embeddings of all tokens, `[vocab, hidden]`, in as many bits as the file has them.
#[derive(Debug)]
enum Embedding {
    Single(Buffer),
    /// bf16 numbers.
    Half(Vec<u16>),
}

impl Embedding {
    fn load(tensor: &Tensor<'_>, len: usize) -> Result<Self> {
        const AT_ONCE: usize = 1 << 16;
        if !tensor.is_bf16() {
            let mut rows = Buffer::zeros_huge(len);
            tensor.read(0, &mut rows)?;
            return Ok(Self::Single(rows));
        }
        let (mut rows, mut values) = (Vec::with_capacity(len), vec![0.0; AT_ONCE.min(len)]);
        while rows.len() < len {
            let values = &mut values[..AT_ONCE.min(len - rows.len())];
            tensor.read(rows.len(), values)?;
            rows.extend(values.iter().map(|x| (x.to_bits() >> 16) as u16));
        }
        Ok(Self::Half(rows))
    }

    fn row(&self, token: usize, out: &mut [f32]) {
        let range = token * out.len()..(token + 1) * out.len();
        match self {
            Self::Single(rows) => out.copy_from_slice(&rows[range]),
            Self::Half(rows) => {
                for (out, bits) in out.iter_mut().zip(&rows[range]) {
                    *out = f32::from_bits(u32::from(*bits) << 16);
                }
            }
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Single(rows) => rows.len(),
            Self::Half(rows) => rows.len(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Single(rows) => size_of_val(&rows[..]),
            Self::Half(rows) => size_of_val(&rows[..]),
        }
    }
}

/// A base model.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) arch: Arch,
    pub(crate) layers: Vec<Layer>,
    pub(crate) final_norm: Vec<f32>,
    pub(crate) head: Linear,
    /// `None` where it is the head.
    embedding: Option<Embedding>,
}

/// Where weights come from.
struct Source<'a> {
    arch: &'a Arch,
    weights: &'a Weights,
    form: Form,
}

/// Rows of a linear layer's weight `[of, inner]` in the file.
struct Part<'a> {
    name: &'a str,
    rows: Range<usize>,
    of: usize,
    inner: usize,
    bias: bool,
    quantization: Option<Quantization>,
    precision: Precision,
}

impl<'a> Part<'a> {
    /// All of a weight `[out, inner]`.
    fn whole(name: &'a str, [out, inner]: [usize; 2], precision: Precision) -> Self {
        Self {
            name,
            rows: 0..out,
            of: out,
            inner,
            bias: false,
            quantization: None,
            precision,
        }
    }
}

impl Model {
    /// Loads and packs a model directory. What is quantized are the layers of blocks: head, embedding,
    /// norms and routers stay what they are.
    pub(crate) fn load_as(dir: &Path, form: Form) -> Result<Self> {
        let arch = Arch::load(dir)?;
        let weights = Weights::open(dir)?;
        let source = Source {
            arch: &arch,
            weights: &weights,
            form,
        };
        let (vocab, hidden) = (arch.vocab_size, arch.hidden_size);
        let layers = (0..arch.n_layers)
            .map(|i| source.layer(i))
            .collect::<Result<Vec<_>>>()?;
        let linear = |name: &str| {
            let part = Part::whole(name, [vocab, hidden], form.precision);
            Linear::load(&source, part)
        };
        let embedding = "model.embed_tokens";
        let (head, embedding) = if arch.tied_head {
            (linear(embedding)?, None)
        } else {
            let tensor = weights.tensor(&format!("{embedding}.weight"), &[vocab, hidden])?;
            let rows = Embedding::load(&tensor, vocab * hidden)?;
            (linear("lm_head")?, Some(rows))
        };
        let final_norm = source.norm("model.norm.weight", hidden)?;
        let beyond = arch.n_layers;
        if weights.contains(&format!("model.layers.{beyond}.input_layernorm.weight")) {
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
                Some(rows) => rows.row(token, out),
                None => self.head.row(token, out),
            }
            if self.arch.embedding_scale != 1.0 {
                elementwise::scale(self.arch.embedding_scale, out);
            }
        }
    }

    /// Caps logits, where the architecture does.
    pub(crate) fn cap_logits(&self, logits: &mut [f32]) {
        if let Some(cap) = self.arch.logit_softcap {
            elementwise::softcap(logits, cap);
        }
    }

    /// Bytes that the weights take for sampling, but for the small ones.
    pub(crate) fn bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|layer| {
            let attention = [&layer.q, &layer.k, &layer.v, &layer.o];
            attention.into_iter().chain(layer.mlp.linears())
        });
        let linears = layers.chain([&self.head]);
        let embedding = self.embedding.as_ref().map_or(0, Embedding::bytes);
        linears.map(|l| l.forward.bytes()).sum::<usize>() + embedding
    }

    /// Bytes that the first backward pass adds: layers that are turned for it and were not yet.
    pub(crate) fn bytes_to_turn(&self) -> usize {
        let layers = self.layers.iter().flat_map(|layer| {
            let attention = [&layer.q, &layer.k, &layer.v, &layer.o];
            attention.into_iter().chain(layer.mlp.linears())
        });
        let to_turn = layers.chain([&self.head]).filter(|linear| {
            matches!(linear.forward, Factor::Panels(_)) && linear.backward.get().is_none()
        });
        to_turn.map(|linear| linear.forward.bytes()).sum()
    }

    /// Number of parameters.
    pub(crate) fn n_parameters(&self) -> u64 {
        let linear = |l: &Linear| l.forward.len() + l.bias.as_ref().map_or(0, Vec::len);
        let layers = self.layers.iter().map(|l| {
            let post = [&l.post_attention_norm, &l.post_mlp_norm];
            let post = post.map(|norm| norm.as_ref().map_or(0, Vec::len));
            let norms = l.attention_norm.len() + l.mlp_norm.len() + post[0] + post[1];
            let qk = l.qk_norm.as_ref().map_or(0, |(q, k)| q.len() + k.len());
            let mlp = l.mlp.linears().into_iter();
            let linears = [&l.q, &l.k, &l.v, &l.o].into_iter().chain(mlp);
            norms + qk + linears.map(linear).sum::<usize>()
        });
        let embedding = self.embedding.as_ref().map_or(0, Embedding::len);
        (layers.sum::<usize>() + linear(&self.head) + embedding + self.final_norm.len()) as u64
    }
}

impl Source<'_> {
    /// A norm's weight, `[n]`.
    fn norm(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        let mut weight = self.weights.vector(name, n)?;
        weight.iter_mut().for_each(|w| *w += self.arch.norm_shift);
        Ok(weight)
    }

    fn layer(&self, i: usize) -> Result<Layer> {
        let arch = self.arch;
        let name = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str| self.norm(&name(part), arch.hidden_size);
        let head_norm = |part: &str| self.norm(&name(part), arch.head_dim);
        let qk_norm = if arch.qk_norm {
            let q = head_norm("self_attn.q_norm.weight")?;
            Some((q, head_norm("self_attn.k_norm.weight")?))
        } else {
            None
        };
        let (mlp_norm, post_norms) = if arch.post_norms {
            let after_attention = norm("post_attention_layernorm.weight")?;
            let after_mlp = norm("post_feedforward_layernorm.weight")?;
            let before_mlp = norm("pre_feedforward_layernorm.weight")?;
            (before_mlp, (Some(after_attention), Some(after_mlp)))
        } else {
            (norm("post_attention_layernorm.weight")?, (None, None))
        };
        let block = (i, None);
        let [q, k, v] = self.split(block, Group::Qkv, arch.qkv_bias)?;
        let [o] = self.split(block, Group::O, arch.o_bias)?;
        let mlp = match &arch.moe {
            Some(moe) if arch.layers[i].sparse => Mlp::Sparse(Box::new(self.experts(i, moe)?)),
            _ => Mlp::Dense(Box::new(self.gated(block)?)),
        };
        Ok(Layer {
            attention_norm: norm("input_layernorm.weight")?,
            mlp_norm,
            post_attention_norm: post_norms.0,
            post_mlp_norm: post_norms.1,
            qk_norm,
            q,
            k,
            v,
            o,
            mlp,
        })
    }

    /// The MLP of a block, or one of its experts.
    fn gated(&self, of: (usize, Option<usize>)) -> Result<Gated> {
        let bias = self.arch.mlp_bias;
        let [gate, up] = self.split(of, Group::GateUp, bias)?;
        let [down] = self.split(of, Group::Down, bias)?;
        Ok(Gated { gate, up, down })
    }

    fn experts(&self, i: usize, moe: &Moe) -> Result<Experts> {
        let name = format!("model.layers.{i}.mlp.gate");
        // Rounding would send tokens to other experts, which no other rounding does.
        let sizes = [moe.n_experts, self.arch.hidden_size];
        let router = Part::whole(&name, sizes, Precision::F32);
        let experts = (0..moe.n_experts).map(|expert| self.gated((i, Some(expert))));
        Ok(Experts {
            moe: *moe,
            router: Linear::load(self, router)?,
            experts: experts.collect::<Result<_>>()?,
        })
    }

    /// The `N` layers of a group of a block or of one of its experts, whatever the file joins of them.
    fn split<const N: usize>(
        &self,
        (i, expert): (usize, Option<usize>),
        group: Group,
        bias: bool,
    ) -> Result<[Linear; N]> {
        let (inner, modules) = group.modules(self.arch, expert);
        let mut layers = Vec::with_capacity(N);
        for module in modules {
            let name = format!("model.layers.{i}.{}", module.name);
            let of = module.parts.iter().sum();
            let mut start = 0;
            for part in module.parts {
                let part = Part {
                    name: &name,
                    rows: start..start + part,
                    of,
                    inner,
                    bias,
                    quantization: self.form.quantization,
                    precision: self.form.precision,
                };
                start = part.rows.end;
                layers.push(Linear::load(self, part)?);
            }
        }
        let n = layers.len();
        layers.try_into().map_err(|_| Error::Model {
            path: PathBuf::from("config.json"),
            message: format!("{group:?} has {n} layers"),
        })
    }
}
