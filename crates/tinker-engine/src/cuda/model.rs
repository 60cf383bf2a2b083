//! The frozen weights on the device, in the numbers of the file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::device::{Device, Number, fault};
use super::memory::{Buffer, Memory, as_bytes};
use super::ops::{self, Heads};
use crate::arch::Arch;
use crate::cpu::lora::Group;
use crate::error::{Error, Result};
use crate::load::{Tensor, Weights};

/// Numbers that are converted and uploaded at once.
const AT_ONCE: usize = 1 << 22;

/// A frozen linear layer `y = x W^T + b`, or the embeddings of all tokens.
#[derive(Debug)]
pub(super) struct Linear {
    /// `[out, in]`.
    memory: Memory,
    numbers: Number,
    pub(super) out: usize,
    pub(super) inner: usize,
    /// `[out]`.
    pub(super) bias: Option<Buffer>,
}

impl Linear {
    /// Rows `start..start + out` of a tensor.
    fn load(
        device: &Arc<dyn Device>,
        tensor: &Tensor<'_>,
        start: usize,
        [out, inner]: [usize; 2],
    ) -> Result<Self> {
        let numbers = if tensor.is_bf16() {
            Number::Bf16
        } else {
            Number::F32
        };
        let len = out * inner;
        let mut memory = Memory::take(device, len * numbers.bytes())?;
        let mut values = vec![0.0f32; AT_ONCE.min(len)];
        for at in (0..len).step_by(AT_ONCE) {
            let values = &mut values[..AT_ONCE.min(len - at)];
            tensor.read(start * inner + at, values)?;
            let to = at * numbers.bytes();
            match numbers {
                Number::F32 => memory.upload(to, as_bytes(values))?,
                Number::Bf16 => {
                    let halves = values.iter().map(|x| (x.to_bits() >> 16) as u16);
                    memory.upload(to, as_bytes(&halves.collect::<Vec<_>>()))?;
                }
            }
        }
        Ok(Self {
            memory,
            numbers,
            out,
            inner,
            bias: None,
        })
    }

    /// As right factor: `x W^T`.
    pub(super) fn weights(&self) -> ops::Weights {
        ops::Weights {
            address: self.memory.address(),
            numbers: self.numbers,
            n: self.out,
            inner: self.inner,
            stride: self.inner,
            turned: false,
        }
    }
}

/// One decoder block.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attention_norm: Buffer,
    pub(super) mlp_norm: Buffer,
    /// Norms of what attention and MLP add, where the architecture has them.
    pub(super) post_attention_norm: Option<Buffer>,
    pub(super) post_mlp_norm: Option<Buffer>,
    /// Norms of query and key heads, `[head_dim]` each.
    pub(super) qk_norm: Option<(Buffer, Buffer)>,
    pub(super) q: Linear,
    pub(super) k: Linear,
    pub(super) v: Linear,
    pub(super) o: Linear,
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// A base model.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) arch: Arch,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Buffer,
    pub(super) head: Linear,
    /// `None` where it is the head.
    embedding: Option<Linear>,
    n_parameters: u64,
}

/// Where weights come from and go to.
struct Source<'a> {
    arch: &'a Arch,
    weights: &'a Weights,
    device: &'a Arc<dyn Device>,
}

/// Refuses what the kernels do not compute, before any memory is taken.
pub(super) fn check(arch: &Arch, dir: &Path) -> Result<usize> {
    let refuse = |message: String| Error::Model {
        path: dir.join("config.json"),
        message,
    };
    if arch.moe.is_some() && arch.layers.iter().any(|layer| layer.sparse) {
        let name = &arch.name;
        return Err(refuse(format!(
            "{name} has a mixture of experts, which the GPU does not compute: use --device cpu"
        )));
    }
    super::device::kernels_for(arch.head_dim).ok_or_else(|| {
        let (size, most) = (arch.head_dim, super::device::HEADS[2]);
        refuse(format!(
            "head_dim is {size}, the GPU computes up to {most}: use --device cpu"
        ))
    })
}

impl Model {
    /// Uploads a model directory.
    pub(super) fn load(device: &Arc<dyn Device>, dir: &Path, arch: Arch) -> Result<Self> {
        let weights = Weights::open(dir)?;
        let (needed, free) = (weights.bytes_on_device(), device.free_memory()?);
        if needed > free {
            let (needed, free, name) = (needed >> 20, free >> 20, device.name());
            return Err(fault(format!(
                "the weights in {} take {needed} MiB, {name} has {free} MiB left: use --device cpu",
                dir.display()
            )));
        }
        let source = Source {
            arch: &arch,
            weights: &weights,
            device,
        };
        let (vocab, hidden) = (arch.vocab_size, arch.hidden_size);
        let layers = (0..arch.n_layers)
            .map(|i| source.layer(i))
            .collect::<Result<Vec<_>>>()?;
        let table = |name: &str| {
            let tensor = weights.tensor(&format!("{name}.weight"), &[vocab, hidden])?;
            Linear::load(device, &tensor, 0, [vocab, hidden])
        };
        let embedding = table("model.embed_tokens")?;
        let (head, embedding) = if arch.tied_head {
            (embedding, None)
        } else {
            (table("lm_head")?, Some(embedding))
        };
        let final_norm = source.norm("model.norm.weight", hidden)?;
        let beyond = arch.n_layers;
        if weights.contains(&format!("model.layers.{beyond}.input_layernorm.weight")) {
            return Err(Error::Model {
                path: dir.to_path_buf(),
                message: format!(
                    "has weights of layer {beyond}, but config.json has {beyond} layers"
                ),
            });
        }
        let mut model = Self {
            n_parameters: 0,
            arch,
            layers,
            final_norm,
            head,
            embedding,
        };
        model.n_parameters = model.count();
        Ok(model)
    }

    /// The embeddings of all tokens.
    pub(super) fn embedding(&self) -> ops::Weights {
        self.embedding.as_ref().unwrap_or(&self.head).weights()
    }

    pub(super) fn n_parameters(&self) -> u64 {
        self.n_parameters
    }

    fn count(&self) -> u64 {
        let linear = |l: &Linear| l.out * l.inner + l.bias.as_ref().map_or(0, Buffer::len);
        let layers = self.layers.iter().map(|l| {
            let linears = [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down];
            let qk = l.qk_norm.iter().flat_map(|(q, k)| [q, k]);
            let norms = [&l.attention_norm, &l.mlp_norm].into_iter();
            let norms = norms.chain(&l.post_attention_norm).chain(&l.post_mlp_norm);
            let norms = norms.chain(qk).map(Buffer::len).sum::<usize>();
            linears.into_iter().map(linear).sum::<usize>() + norms
        });
        let embedding = self.embedding.as_ref().map_or(0, linear);
        (layers.sum::<usize>() + embedding + linear(&self.head) + self.final_norm.len()) as u64
    }

    /// What attention of block `layer` needs to know.
    pub(super) fn heads(&self, layer: usize) -> Heads {
        let arch = &self.arch;
        Heads {
            n: arch.n_heads,
            n_kv: arch.n_kv_heads,
            size: arch.head_dim,
            window: arch.layers[layer].window,
            scale: arch.attention_scale,
            softcap: arch.attention_softcap,
        }
    }
}

impl Source<'_> {
    /// A norm's weight, `[n]`.
    fn norm(&self, name: &str, n: usize) -> Result<Buffer> {
        let mut weight = self.weights.vector(name, n)?;
        weight.iter_mut().for_each(|w| *w += self.arch.norm_shift);
        Buffer::of(self.device, &weight)
    }

    fn layer(&self, i: usize) -> Result<Layer> {
        let arch = self.arch;
        let name = |part: &str| format!("model.layers.{i}.{part}.weight");
        let norm = |part: &str| self.norm(&name(part), arch.hidden_size);
        let head_norm = |part: &str| self.norm(&name(part), arch.head_dim);
        let qk_norm = if arch.qk_norm {
            Some((
                head_norm("self_attn.q_norm")?,
                head_norm("self_attn.k_norm")?,
            ))
        } else {
            None
        };
        let after_attention = norm("post_attention_layernorm")?;
        let (mlp_norm, post_attention_norm, post_mlp_norm) = if arch.post_norms {
            let after_mlp = norm("post_feedforward_layernorm")?;
            let before_mlp = norm("pre_feedforward_layernorm")?;
            (before_mlp, Some(after_attention), Some(after_mlp))
        } else {
            (after_attention, None, None)
        };
        let [q, k, v] = self.split(i, Group::Qkv, arch.qkv_bias)?;
        let [o] = self.split(i, Group::O, arch.o_bias)?;
        let [gate, up] = self.split(i, Group::GateUp, arch.mlp_bias)?;
        let [down] = self.split(i, Group::Down, arch.mlp_bias)?;
        Ok(Layer {
            attention_norm: norm("input_layernorm")?,
            mlp_norm,
            post_attention_norm,
            post_mlp_norm,
            qk_norm,
            q,
            k,
            v,
            o,
            gate,
            up,
            down,
        })
    }

    /// The `N` layers of a group of block `i`, whatever the file joins of them.
    fn split<const N: usize>(&self, i: usize, group: Group, bias: bool) -> Result<[Linear; N]> {
        let (inner, modules) = group.modules(self.arch, None);
        let mut layers = Vec::with_capacity(N);
        for module in modules {
            let name = format!("model.layers.{i}.{}", module.name);
            let of = module.parts.iter().sum();
            let tensor = self
                .weights
                .tensor(&format!("{name}.weight"), &[of, inner])?;
            let biases = if bias {
                self.weights.vector(&format!("{name}.bias"), of)?
            } else {
                Vec::new()
            };
            let mut start = 0;
            for out in module.parts {
                let mut layer = Linear::load(self.device, &tensor, start, [out, inner])?;
                if bias {
                    layer.bias = Some(Buffer::of(self.device, &biases[start..start + out])?);
                }
                start += out;
                layers.push(layer);
            }
        }
        let n = layers.len();
        layers.try_into().map_err(|_| Error::Model {
            path: PathBuf::from("config.json"),
            message: format!("{group:?} has {n} layers"),
        })
    }
}
