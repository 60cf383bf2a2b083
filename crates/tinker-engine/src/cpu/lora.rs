//! Adapters in the layout of the kernels: every factor in both orientations, gradients flat.

pub(crate) mod layout;
#[cfg(feature = "cuda")]
mod numbers;
mod step;

use std::collections::{BTreeMap, BTreeSet};

pub(crate) use self::layout::{Group, tensor_shapes};
use self::layout::{Layout, Place, TensorPlace};
#[cfg(feature = "cuda")]
pub(crate) use self::numbers::Numbers;
use super::buffer::Buffer;
use super::elementwise;
use crate::adapter::{ALPHA, AdapterState, HostTensor, LoraSpec};
use crate::arch::Arch;
use crate::error::{Error, Result};
use crate::optim::Family;
use crate::rng;

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

    /// Floats of each buffer of an adapter.
    ///
    /// # Errors
    /// If there can be no such adapter.
    pub(crate) fn n_floats(arch: &Arch, spec: &LoraSpec) -> Result<usize> {
        Layout::new(arch, spec).map(|layout| layout.len)
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        let buffers = [
            &self.weights,
            &self.turned,
            &self.gradient,
            &self.first_moment,
            &self.second_moment,
        ];
        let floats: usize = buffers.iter().map(|buffer| buffer.len()).sum();
        floats * size_of::<f32>()
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
