//! Where the tensors of an adapter lie: its modules by their PEFT names, in flat buffers.

use crate::adapter::LoraSpec;
use crate::arch::Arch;
use crate::cpu::buffer::round_up;
use crate::error::{Error, Result};

/// Linear layers of a block that read the same input, and whose LoRA factors `A` are one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    Qkv,
    O,
    GateUp,
    Down,
}

/// A LoRA module: a linear layer as PEFT sees it.
#[derive(Debug, Clone)]
pub(crate) struct Module {
    /// Name within its block.
    pub(crate) name: String,
    /// Output widths of the layers that the module computes, one beside the other: more than one
    /// where the file has joined them.
    pub(crate) parts: Vec<usize>,
}

impl Group {
    const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// Input width and modules, in a block or in one of its experts.
    pub(crate) fn modules(self, arch: &Arch, expert: Option<usize>) -> (usize, Vec<Module>) {
        let hidden = arch.hidden_size;
        let mlp = match (expert, &arch.moe) {
            (Some(_), Some(moe)) => moe.width,
            _ => arch.intermediate_size,
        };
        let (q, kv) = (
            arch.n_heads * arch.head_dim,
            arch.n_kv_heads * arch.head_dim,
        );
        let (inner, names, parts): (_, &[&str], _) = match self {
            Self::Qkv if arch.fused => (hidden, &["qkv_proj"], vec![q, kv, kv]),
            Self::Qkv => (hidden, &["q_proj", "k_proj", "v_proj"], vec![q, kv, kv]),
            Self::O => (q, &["o_proj"], vec![hidden]),
            Self::GateUp if arch.fused => (hidden, &["gate_up_proj"], vec![mlp, mlp]),
            Self::GateUp => (hidden, &["gate_proj", "up_proj"], vec![mlp, mlp]),
            Self::Down => (mlp, &["down_proj"], vec![hidden]),
        };
        let owner = match (self, expert) {
            (Self::Qkv | Self::O, _) => "self_attn".to_owned(),
            (_, None) => "mlp".to_owned(),
            (_, Some(expert)) => format!("mlp.experts.{expert}"),
        };
        let per_module = parts.len() / names.len();
        let modules = names.iter().zip(parts.chunks(per_module));
        let modules = modules.map(|(name, parts)| Module {
            name: format!("{owner}.{name}"),
            parts: parts.to_vec(),
        });
        (inner, modules.collect())
    }

    fn is_trained(self, spec: &LoraSpec) -> bool {
        match self {
            Self::Qkv | Self::O => spec.train_attn,
            Self::GateUp | Self::Down => spec.train_mlp,
        }
    }
}

/// Where the factors of a group lie in the flat buffers.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) inner: usize,
    /// Start of the common `A [modules * rank, in]`.
    pub(crate) a: usize,
    pub(crate) modules: Vec<ModulePlace>,
    pub(crate) layers: Vec<LayerPlace>,
}

/// Where the second factor of a module lies.
#[derive(Debug, Clone)]
pub(crate) struct ModulePlace {
    /// PEFT name without the factor.
    pub(crate) name: String,
    pub(crate) out: usize,
    /// Start of `B^T [rank, out]`.
    pub(crate) b: usize,
}

/// The part of a module that one layer computes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerPlace {
    /// Index of the module.
    pub(crate) module: usize,
    /// First of the module's outputs.
    pub(crate) start: usize,
    pub(crate) out: usize,
}

/// The modules of an adapter and their places, a function of the architecture and the spec.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// Rank rounded up to a whole vector; the rows and columns beyond the rank are zero and stay zero.
    pub(crate) rank: usize,
    /// Each group of each block, if it is trained.
    pub(crate) blocks: Vec<[Option<Place>; 4]>,
    /// Gate and up, and down, of each expert of each block.
    pub(crate) experts: Vec<Vec<[Option<Place>; 2]>>,
    pub(crate) head: Option<Place>,
    pub(crate) len: usize,
}

impl Layout {
    pub(crate) fn new(arch: &Arch, spec: &LoraSpec) -> Result<Self> {
        if spec.rank == 0 || spec.rank > arch.hidden_size {
            let (rank, hidden) = (spec.rank, arch.hidden_size);
            return Err(Error::Invalid(format!(
                "LoRA rank {rank} is not in 1..={hidden}"
            )));
        }
        if !(spec.train_attn || spec.train_mlp || spec.train_unembed) {
            let message = "LoRA needs one of train_attn, train_mlp and train_unembed";
            return Err(Error::Invalid(message.into()));
        }
        let rank = round_up(spec.rank, 16);
        let mut layout = Self {
            rank,
            blocks: Vec::new(),
            experts: Vec::new(),
            head: None,
            len: 0,
        };
        for i in 0..arch.n_layers {
            let experts = match &arch.moe {
                Some(moe) if arch.layers[i].sparse => moe.n_experts,
                _ => 0,
            };
            let is_dense = |group| experts == 0 || matches!(group, Group::Qkv | Group::O);
            let mut place = |group: Group, expert| {
                let (inner, modules) = group.modules(arch, expert);
                let name = |module: &Module| format!("model.layers.{i}.{}", module.name);
                let named = modules.into_iter().map(|m| (name(&m), m.parts));
                group.is_trained(spec).then(|| layout.place(inner, named))
            };
            let block =
                Group::ALL.map(|group| is_dense(group).then(|| place(group, None)).flatten());
            let of_expert = |expert| [Group::GateUp, Group::Down].map(|g| place(g, Some(expert)));
            let experts = (0..experts).map(of_expert).collect();
            layout.blocks.push(block);
            layout.experts.push(experts);
        }
        if spec.train_unembed {
            let module = [("lm_head".to_owned(), vec![arch.vocab_size])];
            layout.head = Some(layout.place(arch.hidden_size, module.into_iter()));
        }
        Ok(layout)
    }

    fn place(
        &mut self,
        inner: usize,
        modules: impl ExactSizeIterator<Item = (String, Vec<usize>)>,
    ) -> Place {
        let mut place = Place {
            inner,
            a: self.take(modules.len() * self.rank * inner),
            modules: Vec::with_capacity(modules.len()),
            layers: Vec::new(),
        };
        for (module, (name, parts)) in modules.enumerate() {
            let mut start = 0;
            for out in parts {
                place.layers.push(LayerPlace { module, start, out });
                start += out;
            }
            place.modules.push(ModulePlace {
                name: format!("base_model.model.{name}"),
                out: start,
                b: self.take(self.rank * start),
            });
        }
        place
    }

    /// Start of the next `n` elements.
    fn take(&mut self, n: usize) -> usize {
        let start = self.len;
        self.len += n;
        start
    }

    pub(crate) fn places(&self) -> impl Iterator<Item = &Place> {
        let experts = self.experts.iter().flatten().flatten().flatten();
        let blocks = self.blocks.iter().flatten().flatten();
        blocks.chain(experts).chain(&self.head)
    }

    /// Tensors by PEFT name, with rows, columns and how to find an element.
    pub(crate) fn tensors(&self, rank: usize) -> impl Iterator<Item = TensorPlace> {
        self.places().flat_map(move |place| {
            place
                .modules
                .iter()
                .enumerate()
                .flat_map(move |(i, module)| {
                    let name = |factor: &str| format!("{}.lora_{factor}.weight", module.name);
                    [
                        TensorPlace {
                            name: name("A"),
                            shape: [rank, place.inner],
                            start: place.a + i * self.rank * place.inner,
                            strides: [place.inner, 1],
                        },
                        TensorPlace {
                            name: name("B"),
                            shape: [module.out, rank],
                            start: module.b,
                            strides: [1, module.out],
                        },
                    ]
                })
        })
    }
}

/// Names and shapes of the tensors of an adapter.
///
/// # Errors
/// As for [`Adapter::new`](super::Adapter::new).
pub(crate) fn tensor_shapes(
    arch: &Arch,
    spec: &LoraSpec,
) -> Result<impl Iterator<Item = (String, [usize; 2])>> {
    let layout = Layout::new(arch, spec)?;
    let tensors = layout.tensors(spec.rank).map(|t| (t.name, t.shape));
    Ok(tensors.collect::<Vec<_>>().into_iter())
}

/// How a PEFT tensor lies in a flat buffer: `A` as it is, `B` transposed, both without padding.
pub(crate) struct TensorPlace {
    pub(crate) name: String,
    pub(crate) shape: [usize; 2],
    pub(crate) start: usize,
    pub(crate) strides: [usize; 2],
}

impl TensorPlace {
    pub(crate) fn is_a(&self) -> bool {
        self.strides[1] == 1
    }

    pub(crate) fn indices(&self) -> impl Iterator<Item = usize> {
        let [rows, columns] = self.shape;
        let [down, right] = self.strides;
        (0..rows).flat_map(move |i| (0..columns).map(move |j| self.start + i * down + j * right))
    }

    pub(crate) fn gather(&self, flat: &[f32]) -> Vec<f32> {
        self.indices().map(|i| flat[i]).collect()
    }

    pub(crate) fn scatter(&self, values: &[f32], flat: &mut [f32]) -> Result<()> {
        let [rows, columns] = self.shape;
        if values.len() != rows * columns {
            let (name, n) = (&self.name, values.len());
            return Err(Error::Invalid(format!(
                "`{name}` has {n} values, not {rows} x {columns}"
            )));
        }
        if let Some(value) = values.iter().find(|v| !v.is_finite()) {
            return Err(Error::Invalid(format!("`{}` holds {value}", self.name)));
        }
        self.indices()
            .zip(values)
            .for_each(|(i, value)| flat[i] = *value);
        Ok(())
    }
}
