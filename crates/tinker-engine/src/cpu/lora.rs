//! Adapters in the layout of the kernels: every factor in both orientations, gradients flat.

mod step;

use std::collections::{BTreeMap, BTreeSet};

use super::buffer::{Buffer, round_up};
use super::elementwise;
use crate::adapter::{ALPHA, AdapterState, HostTensor, LoraSpec};
use crate::arch::Arch;
use crate::error::{Error, Result};
use crate::optim::Family;
use crate::rng;

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
struct Place {
    inner: usize,
    /// Start of the common `A [modules * rank, in]`.
    a: usize,
    modules: Vec<ModulePlace>,
    layers: Vec<LayerPlace>,
}

/// Where the second factor of a module lies.
#[derive(Debug, Clone)]
struct ModulePlace {
    /// PEFT name without the factor.
    name: String,
    out: usize,
    /// Start of `B^T [rank, out]`.
    b: usize,
}

/// The part of a module that one layer computes.
#[derive(Debug, Clone, Copy)]
struct LayerPlace {
    /// Index of the module.
    module: usize,
    /// First of the module's outputs.
    start: usize,
    out: usize,
}

/// The modules of an adapter and their places, a function of the architecture and the spec.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// Rank rounded up to a whole vector; the rows and columns beyond the rank are zero and stay zero.
    rank: usize,
    /// Each group of each block, if it is trained.
    blocks: Vec<[Option<Place>; 4]>,
    /// Gate and up, and down, of each expert of each block.
    experts: Vec<Vec<[Option<Place>; 2]>>,
    head: Option<Place>,
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

    fn places(&self) -> impl Iterator<Item = &Place> {
        let experts = self.experts.iter().flatten().flatten().flatten();
        let blocks = self.blocks.iter().flatten().flatten();
        blocks.chain(experts).chain(&self.head)
    }

    /// Tensors by PEFT name, with rows, columns and how to find an element.
    fn tensors(&self, rank: usize) -> impl Iterator<Item = TensorPlace> {
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
/// As for [`Adapter::new`].
pub(crate) fn tensor_shapes(
    arch: &Arch,
    spec: &LoraSpec,
) -> Result<impl Iterator<Item = (String, [usize; 2])>> {
    let layout = Layout::new(arch, spec)?;
    let tensors = layout.tensors(spec.rank).map(|t| (t.name, t.shape));
    Ok(tensors.collect::<Vec<_>>().into_iter())
}

/// How a PEFT tensor lies in a flat buffer: `A` as it is, `B` transposed, both without padding.
struct TensorPlace {
    name: String,
    shape: [usize; 2],
    start: usize,
    strides: [usize; 2],
}

impl TensorPlace {
    fn is_a(&self) -> bool {
        self.strides[1] == 1
    }

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
    /// `A^T [in, modules * rank]` and `B [out, rank]`, in the same places.
    turned: Buffer,
    /// Accumulated gradient, in the layout of `weights`; empty when there is none.
    pub(crate) gradient: Buffer,
    first_moment: Buffer,
    /// Empty with Dimuon, which has none.
    second_moment: Buffer,
    step: u64,
}

impl Adapter {
    /// `A` uniform in `+-1/sqrt(in)` (Kaiming with `a = sqrt 5`, as PEFT draws it), `B` zero.
    pub(crate) fn new(arch: &Arch, spec: &LoraSpec) -> Result<Self> {
        let mut adapter = Self::zeros(arch, spec)?;
        let factors = adapter
            .layout
            .tensors(spec.rank)
            .filter(|place| place.is_a());
        for (i, place) in (0..).zip(factors.collect::<Vec<_>>()) {
            let bound = 1.0 / (place.shape[1] as f64).sqrt();
            let seed = rng::bits(spec.seed, i);
            for (counter, at) in (0..).zip(place.indices()) {
                let draw = 2.0 * rng::uniform(seed, counter) - 1.0;
                adapter.weights[at] = (draw * bound) as f32;
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
        check_step(state)?;
        check_names(&places, "weight", &state.weights, false)?;
        check_names(&places, "moments", &state.moments, true)?;
        check_names(&places, "gradient", &state.gradient, true)?;
        if !state.moments.is_empty() {
            adapter.first_moment = Buffer::zeros(layout.len);
        }
        let family = family_of(state)?;
        if family == Some(Family::AdamW) {
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
                if let Some(value) = second.iter().find(|v| **v < 0.0) {
                    let name = &place.name;
                    let message = format!("second moments of `{name}` hold {value}, below 0");
                    return Err(Error::Invalid(message));
                }
                place.scatter(first, &mut adapter.first_moment)?;
                if family == Some(Family::AdamW) {
                    place.scatter(second, &mut adapter.second_moment)?;
                }
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
                let second = if self.second_moment.is_empty() {
                    Vec::new()
                } else {
                    place.gather(&self.second_moment)
                };
                let moments = (place.gather(&self.first_moment), second);
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
            step: 0,
            ..self.clone()
        }
    }

    /// Recomputes the turned copies from the weights.
    fn turn(&mut self) {
        let rank = self.layout.rank;
        for place in self.layout.places() {
            let n = place.modules.len() * rank;
            let (a, a_t) = (&self.weights[place.a..], &mut self.turned[place.a..]);
            transpose(n, place.inner, a, a_t);
            for module in &place.modules {
                let (b_t, b) = (&self.weights[module.b..], &mut self.turned[module.b..]);
                transpose(rank, module.out, b_t, b);
            }
        }
    }

    /// Elements of a gradient.
    pub(crate) fn gradient_len(&self) -> usize {
        self.layout.len
    }

    /// The modules of a group of block `layer`, if they are trained.
    pub(crate) fn group(&self, layer: usize, group: Group) -> Option<Lora<'_>> {
        self.layout.blocks[layer][group as usize]
            .as_ref()
            .map(|place| self.view(place))
    }

    /// The modules of a group of an expert of block `layer`, if they are trained.
    pub(crate) fn expert(&self, layer: usize, expert: usize, group: Group) -> Option<Lora<'_>> {
        let places = &self.layout.experts[layer][expert];
        let place = &places[usize::from(group == Group::Down)];
        place.as_ref().map(|place| self.view(place))
    }

    /// The module of the head, if it is trained.
    pub(crate) fn head(&self) -> Option<Lora<'_>> {
        self.layout.head.as_ref().map(|place| self.view(place))
    }

    fn view<'a>(&'a self, place: &'a Place) -> Lora<'a> {
        let rank = self.layout.rank;
        let n = place.modules.len() * rank;
        Lora {
            rank,
            scale: ALPHA / self.spec.rank as f32,
            a: &self.weights[place.a..][..n * place.inner],
            a_t: &self.turned[place.a..][..n * place.inner],
            weights: &self.weights,
            turned: &self.turned,
            place,
        }
    }

    /// Widest padded rank, to size scratch with.
    pub(crate) fn padded_rank(&self) -> usize {
        self.layout.rank
    }

    /// Checks an accumulated gradient, naming the tensor.
    pub(crate) fn check_gradient(&self, gradient: &[f32]) -> Result<()> {
        if elementwise::sum_of_squares(gradient).is_finite() {
            return Ok(());
        }
        let mut tensors = self.layout.tensors(self.spec.rank);
        let bad = tensors.find(|t| t.indices().any(|i| !gradient[i].is_finite()));
        let name = bad.map_or("the adapter".to_owned(), |t| format!("`{}`", t.name));
        Err(Error::NotFinite(format!(
            "the accumulated gradient of {name} is not finite: take an optimizer step before more"
        )))
    }
}

/// Writes the transpose of `source [rows, columns]` to `target`.
fn transpose(rows: usize, columns: usize, source: &[f32], target: &mut [f32]) {
    for (j, turned) in target.chunks_exact_mut(rows).take(columns).enumerate() {
        for (value, row) in turned
            .iter_mut()
            .zip(source.chunks_exact(columns).take(rows))
        {
            *value = row[j];
        }
    }
}

/// Checks that moments and the number of steps that made them fit.
fn check_step(state: &AdapterState) -> Result<()> {
    // Beyond it `f64`, in which moments are corrected, does not tell steps apart.
    const MOST: u64 = 1 << 53;
    let step = state.step;
    if step > MOST {
        let message = format!("optimizer step {step} is above {MOST}");
        return Err(Error::Invalid(message));
    }
    if (step > 0) == state.moments.is_empty() {
        let has = if step > 0 { "has no" } else { "has" };
        let message = format!("an adapter at optimizer step {step} {has} moments");
        return Err(Error::Invalid(message));
    }
    Ok(())
}

/// The optimizer that made the moments, if there are any.
fn family_of(state: &AdapterState) -> Result<Option<Family>> {
    let mut moments = state.moments.iter();
    let Some((_, (_, second))) = moments.next() else {
        return Ok(None);
    };
    let has_none = second.is_empty();
    if let Some((name, _)) = moments.find(|(_, (_, second))| second.is_empty() != has_none) {
        let message = format!("second moments of `{name}` and of other weights: some are missing");
        return Err(Error::Invalid(message));
    }
    Ok(Some(if has_none {
        Family::Dimuon
    } else {
        Family::AdamW
    }))
}

/// Checks that `names` are those of `places`, all of them and no others; or none at all.
fn check_names<'a, V: 'a>(
    places: &[TensorPlace],
    what: &str,
    named: &'a BTreeMap<String, V>,
    may_be_empty: bool,
) -> Result<()> {
    if may_be_empty && named.is_empty() {
        return Ok(());
    }
    if let Some(place) = places.iter().find(|place| !named.contains_key(&place.name)) {
        return Err(Error::Invalid(format!(
            "{what} of `{}` is missing",
            place.name
        )));
    }
    let known: BTreeSet<&str> = places.iter().map(|place| place.name.as_str()).collect();
    match named.keys().find(|name| !known.contains(name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let message = format!("{what} `{name}` is of no module that the adapter trains");
            Err(Error::Invalid(message))
        }
    }
}

/// The modules of one group: layer `i` adds `scale * B_i A_i x`. Layers of one module share its `A`,
/// and their `B` are rows of the module's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lora<'a> {
    /// Padded rank of each module.
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// `[modules * rank, in]`.
    pub(crate) a: &'a [f32],
    /// `[in, modules * rank]`.
    pub(crate) a_t: &'a [f32],
    weights: &'a [f32],
    turned: &'a [f32],
    place: &'a Place,
}

/// The part of a flat buffer that belongs to a layer's `B^T [rank, out]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BPlace {
    /// Start of its first row.
    start: usize,
    /// Distance of rows.
    pub(crate) stride: usize,
    /// From the start of the first row to the end of the last.
    len: usize,
    /// Outputs of the layer.
    pub(crate) out: usize,
}

impl BPlace {
    /// That part of a gradient.
    pub(crate) fn of(self, flat: &mut [f32]) -> &mut [f32] {
        &mut flat[self.start..][..self.len]
    }
}

impl<'a> Lora<'a> {
    /// Rank of all modules together: the width of `A x`.
    pub(crate) fn width(&self) -> usize {
        self.place.modules.len() * self.rank
    }

    /// Where layer `i` starts in a row of `A x`.
    pub(crate) fn column(&self, i: usize) -> usize {
        self.place.layers[i].module * self.rank
    }

    /// Whether layer `i` shares its `A` with the layer before it.
    pub(crate) fn joins(&self, i: usize) -> bool {
        self.place.layers[i].start > 0
    }

    /// Where `B^T` of layer `i` lies.
    pub(crate) fn b_place(&self, i: usize) -> BPlace {
        let layer = self.place.layers[i];
        let module = &self.place.modules[layer.module];
        BPlace {
            start: module.b + layer.start,
            stride: module.out,
            len: (self.rank - 1) * module.out + layer.out,
            out: layer.out,
        }
    }

    /// `B^T [rank, out]` of layer `i`, with rows as far apart as [`Lora::b_place`] says.
    pub(crate) fn b_t(&self, i: usize) -> &'a [f32] {
        let place = self.b_place(i);
        &self.weights[place.start..][..place.len]
    }

    /// `B [out, rank]` of layer `i`.
    pub(crate) fn b(&self, i: usize) -> &'a [f32] {
        let layer = self.place.layers[i];
        let start = self.place.modules[layer.module].b + layer.start * self.rank;
        &self.turned[start..][..layer.out * self.rank]
    }

    /// The part of a gradient that belongs to `A`.
    pub(crate) fn a_gradient<'g>(&self, flat: &'g mut [f32]) -> &'g mut [f32] {
        &mut flat[self.place.a..][..self.a.len()]
    }
}
