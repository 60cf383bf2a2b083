//! Adapters in the layout of the kernels: every factor in both orientations, gradients flat.

use std::collections::BTreeMap;

use super::buffer::{Buffer, round_up};
use super::elementwise::{self, AdamStep};
use super::pool::{Pool, SharedMut};
use crate::adapter::{ALPHA, AdapterState, HostTensor, LoraSpec};
use crate::arch::Arch;
use crate::error::{Error, Result};
use crate::optim::{AdamW, OptimReport};
use crate::rng;

/// A linear layer that an adapter can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    fn is_attention(self) -> bool {
        matches!(self, Self::Q | Self::K | Self::V | Self::O)
    }

    /// Input and output width.
    fn widths(self, arch: &Arch) -> (usize, usize) {
        let (hidden, mlp) = (arch.hidden_size, arch.intermediate_size);
        let (q, kv) = (
            arch.n_heads * arch.head_dim,
            arch.n_kv_heads * arch.head_dim,
        );
        match self {
            Self::Q => (hidden, q),
            Self::K | Self::V => (hidden, kv),
            Self::O => (q, hidden),
            Self::Gate | Self::Up => (hidden, mlp),
            Self::Down => (mlp, hidden),
        }
    }
}

/// Where a module's two factors lie in the flat buffers.
#[derive(Debug, Clone)]
struct Module {
    name: String,
    inner: usize,
    out: usize,
    /// Start of `A`; `B` follows.
    start: usize,
}

/// The modules of an adapter and their places, a function of the architecture and the spec.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// Rank rounded up to a whole vector; the rows and columns beyond the rank are zero and stay zero.
    rank: usize,
    modules: Vec<Module>,
    /// Index into `modules` of each projection of each layer.
    layers: Vec<[Option<usize>; 7]>,
    head: Option<usize>,
    len: usize,
}

impl Layout {
    fn new(arch: &Arch, spec: &LoraSpec) -> Result<Self> {
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
            modules: Vec::new(),
            layers: Vec::new(),
            head: None,
            len: 0,
        };
        for i in 0..arch.n_layers {
            let places = Projection::ALL.map(|p| {
                let wanted = if p.is_attention() {
                    spec.train_attn
                } else {
                    spec.train_mlp
                };
                let name = format!("model.layers.{i}.{}", p.name());
                wanted.then(|| layout.push(name, p.widths(arch)))
            });
            layout.layers.push(places);
        }
        if spec.train_unembed {
            let widths = (arch.hidden_size, arch.vocab_size);
            layout.head = Some(layout.push("lm_head".into(), widths));
        }
        Ok(layout)
    }

    fn push(&mut self, name: String, (inner, out): (usize, usize)) -> usize {
        let name = format!("base_model.model.{name}");
        self.modules.push(Module {
            name,
            inner,
            out,
            start: self.len,
        });
        self.len += round_up(self.rank * inner, 16) + round_up(self.rank * out, 16);
        self.modules.len() - 1
    }

    fn find(&self, layer: usize, projection: Projection) -> Option<&Module> {
        self.layers[layer][projection as usize].map(|i| &self.modules[i])
    }

    /// Places of `A` and `B` of a module.
    fn factors(&self, module: &Module) -> [(usize, usize); 2] {
        let (a, b) = (self.rank * module.inner, self.rank * module.out);
        [(module.start, a), (module.start + round_up(a, 16), b)]
    }

    /// Tensors by PEFT name, with rows, columns and how to find an element.
    fn tensors(&self, rank: usize) -> impl Iterator<Item = TensorPlace> {
        self.modules.iter().flat_map(move |module| {
            let [(a, _), (b, _)] = self.factors(module);
            let name = |factor: &str| format!("{}.lora_{factor}.weight", module.name);
            [
                TensorPlace {
                    name: name("A"),
                    shape: [rank, module.inner],
                    start: a,
                    strides: [module.inner, 1],
                },
                TensorPlace {
                    name: name("B"),
                    shape: [module.out, rank],
                    start: b,
                    strides: [1, module.out],
                },
            ]
        })
    }
}

/// How a PEFT tensor lies in a flat buffer: `A` as it is, `B` transposed, both without padding.
struct TensorPlace {
    name: String,
    shape: [usize; 2],
    start: usize,
    strides: [usize; 2],
}

impl TensorPlace {
    fn indices(&self) -> impl Iterator<Item = usize> {
        let [rows, columns] = self.shape;
        let [down, right] = self.strides;
        (0..rows).flat_map(move |i| (0..columns).map(move |j| self.start + i * down + j * right))
    }

    fn gather(&self, flat: &[f32]) -> Vec<f32> {
        self.indices().map(|i| flat[i]).collect()
    }

    fn scatter(&self, values: &[f32], flat: &mut [f32]) -> Result<()> {
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

/// An adapter: LoRA weights, gradient, optimizer moments.
#[derive(Debug, Clone)]
pub(crate) struct Adapter {
    spec: LoraSpec,
    layout: Layout,
    /// `A [rank, in]` and `B^T [rank, out]` of every module.
    weights: Buffer,
    /// `A^T [in, rank]` and `B [out, rank]`, in the same places.
    turned: Buffer,
    /// Accumulated gradient, in the layout of `weights`; empty when there is none.
    pub(crate) gradient: Buffer,
    first_moment: Buffer,
    second_moment: Buffer,
    step: u64,
}

impl Adapter {
    /// `A` uniform in `+-1/sqrt(in)` (Kaiming with `a = sqrt 5`, as PEFT draws it), `B` zero.
    pub(crate) fn new(arch: &Arch, spec: &LoraSpec) -> Result<Self> {
        let mut adapter = Self::zeros(arch, spec)?;
        let layout = &adapter.layout;
        for (i, module) in layout.modules.iter().enumerate() {
            let bound = 1.0 / (module.inner as f64).sqrt();
            let seed = rng::bits(spec.seed, i as u64);
            let a = &mut adapter.weights[module.start..][..spec.rank * module.inner];
            for (counter, value) in (0..).zip(a) {
                *value = ((2.0 * rng::uniform(seed, counter) - 1.0) * bound) as f32;
            }
        }
        adapter.turn();
        Ok(adapter)
    }

    fn zeros(arch: &Arch, spec: &LoraSpec) -> Result<Self> {
        let layout = Layout::new(arch, spec)?;
        Ok(Self {
            spec: *spec,
            weights: Buffer::zeros(layout.len),
            turned: Buffer::zeros(layout.len),
            gradient: Buffer::zeros(0),
            first_moment: Buffer::zeros(0),
            second_moment: Buffer::zeros(0),
            step: 0,
            layout,
        })
    }

    /// Reads a saved state; see [`crate::Backend::import_adapter`].
    pub(crate) fn import(arch: &Arch, state: &AdapterState) -> Result<Self> {
        let mut adapter = Self::zeros(arch, &state.spec)?;
        let layout = adapter.layout.clone();
        let places: Vec<TensorPlace> = layout.tensors(state.spec.rank).collect();
        check_names(&places, "weight", state.weights.keys(), false)?;
        check_names(&places, "moments", state.moments.keys(), true)?;
        check_names(&places, "gradient", state.gradient.keys(), true)?;
        if !state.moments.is_empty() {
            adapter.first_moment = Buffer::zeros(layout.len);
            adapter.second_moment = Buffer::zeros(layout.len);
        }
        if !state.gradient.is_empty() {
            adapter.gradient = Buffer::zeros(layout.len);
        }
        for place in &places {
            if let Some(tensor) = state.weights.get(&place.name) {
                if tensor.shape != place.shape {
                    let (name, shape, wanted) = (&place.name, &tensor.shape, place.shape);
                    let message =
                        format!("`{name}` has shape {shape:?}, the base model asks for {wanted:?}");
                    return Err(Error::Invalid(message));
                }
                place.scatter(&tensor.data, &mut adapter.weights)?;
            }
            if let Some((first, second)) = state.moments.get(&place.name) {
                place.scatter(first, &mut adapter.first_moment)?;
                place.scatter(second, &mut adapter.second_moment)?;
            }
            if let Some(gradient) = state.gradient.get(&place.name) {
                place.scatter(gradient, &mut adapter.gradient)?;
            }
        }
        adapter.step = state.step;
        adapter.turn();
        Ok(adapter)
    }

    /// Copies everything to the host.
    pub(crate) fn export(&self) -> AdapterState {
        let mut state = AdapterState {
            spec: self.spec,
            weights: BTreeMap::new(),
            moments: BTreeMap::new(),
            gradient: BTreeMap::new(),
            step: self.step,
        };
        for place in self.layout.tensors(self.spec.rank) {
            let data = place.gather(&self.weights);
            let tensor = HostTensor {
                shape: place.shape.to_vec(),
                data,
            };
            state.weights.insert(place.name.clone(), tensor);
            if !self.first_moment.is_empty() {
                let moments = (
                    place.gather(&self.first_moment),
                    place.gather(&self.second_moment),
                );
                state.moments.insert(place.name.clone(), moments);
            }
            if !self.gradient.is_empty() {
                state
                    .gradient
                    .insert(place.name.clone(), place.gather(&self.gradient));
            }
        }
        state
    }

    /// A copy of the weights alone.
    pub(crate) fn snapshot(&self) -> Self {
        Self {
            gradient: Buffer::zeros(0),
            first_moment: Buffer::zeros(0),
            second_moment: Buffer::zeros(0),
            ..self.clone()
        }
    }

    /// Recomputes the turned copies from the weights.
    fn turn(&mut self) {
        let rank = self.layout.rank;
        for module in &self.layout.modules {
            for (start, len) in self.layout.factors(module) {
                let width = len / rank;
                let (source, target) = (
                    &self.weights[start..][..len],
                    &mut self.turned[start..][..len],
                );
                for (j, row) in target.chunks_exact_mut(rank).enumerate() {
                    for (value, column) in row.iter_mut().zip(source.chunks_exact(width)) {
                        *value = column[j];
                    }
                }
            }
        }
    }

    /// Elements of a gradient.
    pub(crate) fn gradient_len(&self) -> usize {
        self.layout.len
    }

    /// The module of a projection, if it is trained.
    pub(crate) fn lora(&self, layer: usize, projection: Projection) -> Option<Lora<'_>> {
        self.layout
            .find(layer, projection)
            .map(|module| self.view(module))
    }

    /// The module of the head, if it is trained.
    pub(crate) fn head(&self) -> Option<Lora<'_>> {
        self.layout.head.map(|i| self.view(&self.layout.modules[i]))
    }

    fn view(&self, module: &Module) -> Lora<'_> {
        let places = self.layout.factors(module);
        let [(a, a_len), (b, b_len)] = places;
        Lora {
            rank: self.layout.rank,
            scale: ALPHA / self.spec.rank as f32,
            a: &self.weights[a..][..a_len],
            b_t: &self.weights[b..][..b_len],
            a_t: &self.turned[a..][..a_len],
            b: &self.turned[b..][..b_len],
            places,
        }
    }

    /// Widest padded rank, to size scratch with.
    pub(crate) fn padded_rank(&self) -> usize {
        self.layout.rank
    }

    /// One AdamW step; see [`crate::Backend::optim_step`].
    pub(crate) fn optim_step(&mut self, params: &AdamW, pool: &Pool) -> Result<OptimReport> {
        params.check()?;
        let len = self.layout.len;
        if self.gradient.is_empty() {
            self.gradient = Buffer::zeros(len);
        }
        let grad_norm = norm(&self.gradient, pool);
        if !grad_norm.is_finite() {
            return Err(Error::NotFinite(format!(
                "the gradient norm is {grad_norm}"
            )));
        }
        if self.first_moment.is_empty() {
            self.first_moment = Buffer::zeros(len);
            self.second_moment = Buffer::zeros(len);
        }
        self.step += 1;
        let step = AdamStep {
            params: *params,
            clip: params.clip_factor(grad_norm),
            correction1: params.correction(params.beta1, self.step) as f32,
            correction2_root: params.correction(params.beta2, self.step).sqrt() as f32,
        };
        let (weights, first, second) = (
            SharedMut::new(&mut self.weights),
            SharedMut::new(&mut self.first_moment),
            SharedMut::new(&mut self.second_moment),
        );
        let gradient = &self.gradient;
        pool.run(len.div_ceil(CHUNK), &|i| {
            let start = i * CHUNK;
            let n = CHUNK.min(len - start);
            // SAFETY: chunks do not overlap and lie inside the buffers, which outlive the call.
            let (w, m, v) = unsafe {
                (
                    weights.slice(start, n),
                    first.slice(start, n),
                    second.slice(start, n),
                )
            };
            elementwise::adamw(step, w, &gradient[start..][..n], m, v);
        });
        self.gradient = Buffer::zeros(0);
        self.turn();
        Ok(OptimReport {
            step: self.step,
            grad_norm,
        })
    }
}

/// Elements that one task of an optimizer step handles.
const CHUNK: usize = 1 << 14;

/// Global L2 norm; chunks are added in order, whoever computed them.
fn norm(gradient: &[f32], pool: &Pool) -> f64 {
    let mut sums = vec![0.0f64; gradient.len().div_ceil(CHUNK)];
    let shared = SharedMut::new(&mut sums);
    pool.run(gradient.len().div_ceil(CHUNK), &|i| {
        let chunk = &gradient[i * CHUNK..gradient.len().min((i + 1) * CHUNK)];
        // SAFETY: each task writes its own element.
        unsafe { shared.slice(i, 1)[0] = elementwise::sum_of_squares(chunk) };
    });
    sums.iter().sum::<f64>().sqrt()
}

fn check_names<'a>(
    places: &[TensorPlace],
    what: &str,
    mut names: impl Iterator<Item = &'a String> + Clone,
    may_be_empty: bool,
) -> Result<()> {
    let n = names.clone().count();
    if may_be_empty && n == 0 {
        return Ok(());
    }
    let known: std::collections::BTreeSet<&str> = places.iter().map(|p| p.name.as_str()).collect();
    if let Some(name) = names.clone().find(|name| !known.contains(name.as_str())) {
        return Err(Error::Invalid(format!(
            "{what} `{name}` is of no module that the adapter trains"
        )));
    }
    match places
        .iter()
        .find(|p| !names.clone().any(|name| *name == p.name))
    {
        Some(place) => Err(Error::Invalid(format!(
            "{what} of `{}` is missing",
            place.name
        ))),
        None => {
            debug_assert!(names.next().is_some());
            Ok(())
        }
    }
}

/// One module of an adapter: it adds `scale * B A x`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lora<'a> {
    /// Padded rank.
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// `[rank, in]`.
    pub(crate) a: &'a [f32],
    /// `[rank, out]`.
    pub(crate) b_t: &'a [f32],
    /// `[in, rank]`.
    pub(crate) a_t: &'a [f32],
    /// `[out, rank]`.
    pub(crate) b: &'a [f32],
    /// Start and length of `A` and `B^T` in a gradient.
    places: [(usize, usize); 2],
}

impl Lora<'_> {
    /// The parts of a gradient that belong to `A` and to `B^T`.
    pub(crate) fn gradients<'g>(&self, flat: &'g mut [f32]) -> (&'g mut [f32], &'g mut [f32]) {
        let [(a, a_len), (b, b_len)] = self.places;
        let (before_b, from_b) = flat.split_at_mut(b);
        (&mut before_b[a..][..a_len], &mut from_b[..b_len])
    }
}
