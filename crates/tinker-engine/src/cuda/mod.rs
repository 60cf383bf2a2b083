//! The GPU backend: the passes of the CPU's over kernels of CUDA C, which are compiled for the device
//! when a model is loaded.
//!
//! Sampling and scoring go through own kernels, in which rows do not see each other; training also
//! through the device's library for products. Sums are in `f32`, weights in the numbers of the file.
#![expect(unsafe_code, reason = "memory and kernels of a device")]

mod adapter;
mod block;
pub mod device;
mod driver;
mod head;
mod infer;
mod linear;
mod memory;
mod model;
mod ops;
mod train;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

pub use self::driver::{compile, is_available, open};

use self::adapter::Adapter;
use self::device::{Device, Open};
use self::infer::{Inference, Scratch, Segment, Slot};
use self::model::Model;
use self::ops::Ops;
use self::train::{Training, Workspace};
use crate::adapter::{AdapterState, LoraSpec};
use crate::arch::Arch;
use crate::backend::{AdapterId, Backend, BaseInfo, Prefill, SequenceOutput, SlotId, check_prefix};
use crate::error::{Error, Result};
use crate::loss::TrainSequence;
use crate::optim::{OptimReport, Optimizer};

/// Whether the GPU computes the architecture of a model directory; its memory is not looked at.
///
/// # Errors
/// If it does not, or the configuration cannot be read.
pub fn takes(dir: &Path) -> Result<()> {
    model::check(&Arch::load(dir)?, dir).map(drop)
}

/// Loads a Hugging Face model directory onto the first NVIDIA GPU of this machine.
///
/// `training_memory` is in bytes, for activations that backward passes read; without it half of what the
/// weights leave. What does not fit is computed again.
///
/// # Errors
/// As [`crate::load_cpu`]; if the architecture has experts or very wide heads; and if there is no GPU,
/// a library of CUDA is missing, or the weights do not fit.
pub fn load_cuda(dir: &Path, training_memory: Option<usize>) -> Result<Box<dyn Backend>> {
    load_on(&open, dir, training_memory)
}

/// As [`load_cuda`], on another device.
///
/// # Errors
/// As [`load_cuda`], and those of `open`.
pub fn load_on(
    open: &Open,
    dir: &Path,
    training_memory: Option<usize>,
) -> Result<Box<dyn Backend>> {
    let arch = Arch::load(dir)?;
    let head = model::check(&arch, dir)?;
    let device = open(head)?;
    let model = Model::load(&device, dir, arch)?;
    let memory = match training_memory {
        Some(memory) => memory,
        None => device.free_memory()? / 2,
    };
    Ok(Box::new(Gpu::new(&device, model, head, memory)))
}

/// A base model on a device, with its adapters and cached sequences.
#[derive(Debug)]
struct Gpu {
    info: BaseInfo,
    model: Model,
    ops: Ops,
    workspace: Workspace,
    scratch: Scratch,
    /// Rows of a tile of attention.
    tile: usize,
    /// Bytes for activations that a backward pass reads.
    memory: usize,
    adapters: BTreeMap<AdapterId, Arc<Adapter>>,
    slots: HashMap<SlotId, Slot>,
    next_id: u64,
}

impl Gpu {
    fn new(device: &Arc<dyn Device>, model: Model, head: usize, memory: usize) -> Self {
        let arch = &model.arch;
        let info = BaseInfo {
            vocab_size: arch.vocab_size,
            max_context: arch.max_context,
            hidden_size: arch.hidden_size,
            n_layers: arch.n_layers,
            n_parameters: model.n_parameters(),
            architecture: arch.name.clone(),
            precision: format!("{} f32", device.name()),
        };
        Self {
            info,
            model,
            ops: Ops::new(device),
            workspace: Workspace::new(device),
            scratch: Scratch::new(device),
            // As the kernels have it.
            tile: if head > 128 { 8 } else { 16 },
            memory,
            adapters: BTreeMap::new(),
            slots: HashMap::new(),
            next_id: 0,
        }
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn add_adapter(&mut self, adapter: Adapter) -> AdapterId {
        let id = AdapterId(self.next_id());
        self.adapters.insert(id, Arc::new(adapter));
        id
    }

    fn add_slot(&mut self, slot: Slot) -> SlotId {
        let id = SlotId(self.next_id());
        self.slots.insert(id, slot);
        id
    }

    fn adapter(&self, id: AdapterId) -> Result<&Arc<Adapter>> {
        self.adapters.get(&id).ok_or_else(|| unknown_adapter(id))
    }

    fn optional_adapter(&self, id: Option<AdapterId>) -> Result<Option<Arc<Adapter>>> {
        id.map(|id| self.adapter(id).cloned()).transpose()
    }

    fn slot(&self, id: SlotId) -> Result<&Slot> {
        self.slots.get(&id).ok_or_else(|| unknown_slot(id))
    }

    /// A slot that is to get `tokens`, taken out of the map so that it can be borrowed alone.
    fn take_slot(&mut self, id: SlotId, tokens: &[u32]) -> Result<Slot> {
        self.check_tokens(tokens.iter().copied())?;
        if tokens.is_empty() {
            return Err(Error::Invalid("there are no tokens to append".into()));
        }
        check_room(self.slot(id)?, tokens.len())?;
        self.slots.remove(&id).ok_or_else(|| unknown_slot(id))
    }

    fn check_tokens(&self, tokens: impl IntoIterator<Item = u32>) -> Result<()> {
        let vocab = self.info.vocab_size;
        match tokens.into_iter().find(|t| *t as usize >= vocab) {
            None => Ok(()),
            Some(token) => {
                let message = format!("token {token} is not below the vocabulary size {vocab}");
                Err(Error::Invalid(message))
            }
        }
    }

    fn training(&mut self) -> Training<'_> {
        Training {
            model: &self.model,
            ops: &mut self.ops,
            workspace: &mut self.workspace,
            tile: self.tile,
            memory: self.memory,
        }
    }

    fn inference(&mut self) -> Inference<'_> {
        Inference {
            model: &self.model,
            ops: &mut self.ops,
            scratch: &mut self.scratch,
            tile: self.tile,
        }
    }

    /// Runs `work`. Where the device fails, once more without what earlier passes keep: it may have taken the
    /// memory that this needs, and the same work gives the same bits.
    fn with_room<T>(&mut self, mut work: impl FnMut(&mut Self) -> Result<T>) -> Result<T> {
        match work(self) {
            Err(Error::Device(_)) => {
                self.workspace = Workspace::new(&self.ops.device);
                self.scratch = Scratch::new(&self.ops.device);
                work(self)
            }
            outcome => outcome,
        }
    }

    /// The adapter for a change: its own copy of the weights if a slot still reads them.
    fn adapter_mut(&mut self, id: AdapterId) -> Result<&mut Adapter> {
        let shared = self.adapters.get_mut(&id);
        let shared = shared.ok_or_else(|| unknown_adapter(id))?;
        if Arc::get_mut(shared).is_none() {
            *shared = Arc::new(shared.copied()?);
        }
        Arc::get_mut(shared).ok_or_else(|| unknown_adapter(id))
    }
}

fn unknown_adapter(id: AdapterId) -> Error {
    Error::Unknown {
        kind: "adapter",
        id: id.0,
    }
}

fn unknown_slot(id: SlotId) -> Error {
    Error::Unknown {
        kind: "slot",
        id: id.0,
    }
}

fn check_room(slot: &Slot, n: usize) -> Result<()> {
    if n > slot.capacity - slot.len {
        let (len, capacity) = (slot.len, slot.capacity);
        let message = format!("{n} more tokens do not fit a slot that holds {len} of {capacity}");
        return Err(Error::Invalid(message));
    }
    Ok(())
}

impl Backend for Gpu {
    fn info(&self) -> &BaseInfo {
        &self.info
    }

    fn create_adapter(&mut self, spec: &LoraSpec) -> Result<AdapterId> {
        let new = |gpu: &mut Self| Adapter::new(&gpu.ops.device, &gpu.model.arch, spec);
        let adapter = self.with_room(new)?;
        Ok(self.add_adapter(adapter))
    }

    fn import_adapter(&mut self, state: &AdapterState) -> Result<AdapterId> {
        let import = |gpu: &mut Self| Adapter::import(&gpu.ops.device, &gpu.model.arch, state);
        let adapter = self.with_room(import)?;
        Ok(self.add_adapter(adapter))
    }

    fn export_adapter(&self, adapter: AdapterId) -> Result<AdapterState> {
        self.adapter(adapter)?.export(&self.model.arch)
    }

    fn snapshot_adapter(&mut self, adapter: AdapterId) -> Result<AdapterId> {
        let copy = self.with_room(|gpu| gpu.adapter(adapter)?.snapshot())?;
        Ok(self.add_adapter(copy))
    }

    fn adapter_bytes(&self, adapter: AdapterId) -> usize {
        self.adapters.get(&adapter).map_or(0, |a| a.bytes())
    }

    fn drop_adapter(&mut self, adapter: AdapterId) {
        self.adapters.remove(&adapter);
        if self.adapters.is_empty() {
            self.workspace = Workspace::new(&self.ops.device);
        }
    }

    fn forward(
        &mut self,
        adapter: Option<AdapterId>,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        let adapter = self.optional_adapter(adapter)?;
        self.with_room(|gpu| gpu.training().forward(adapter.as_deref(), sequences))
    }

    fn forward_backward(
        &mut self,
        id: AdapterId,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        let adapter = Arc::clone(self.adapter(id)?);
        // Where memory is short, with as few activations as possible.
        let mut memory = self.memory;
        let (outputs, gradient) = self.with_room(|gpu| {
            let mut training = Training {
                memory: std::mem::take(&mut memory),
                ..gpu.training()
            };
            training.forward_backward(&adapter, sequences)
        })?;
        drop(adapter);
        let gradient = Some(gradient);
        self.with_room(|gpu| gpu.adapter_mut(id).map(|_| ()))?;
        self.adapter_mut(id)?.gradient = gradient;
        Ok(outputs)
    }

    fn optim_step(&mut self, id: AdapterId, optimizer: &Optimizer) -> Result<OptimReport> {
        self.with_room(|gpu| {
            gpu.adapter_mut(id)?;
            let (arch, ops) = (&gpu.model.arch, &mut gpu.ops);
            let adapter = gpu.adapters.get_mut(&id).and_then(Arc::get_mut);
            let adapter = adapter.ok_or_else(|| unknown_adapter(id))?;
            adapter.optim_step(ops, arch, optimizer)
        })
    }

    fn clear_gradient(&mut self, id: AdapterId) -> Result<()> {
        self.with_room(|gpu| {
            gpu.adapter_mut(id)?.gradient = None;
            Ok(())
        })
    }

    fn open_slot(&mut self, adapter: Option<AdapterId>, capacity: usize) -> Result<SlotId> {
        let max = self.info.max_context;
        if capacity == 0 || capacity > max {
            return Err(Error::Invalid(format!(
                "slot capacity {capacity} is not in 1..={max}"
            )));
        }
        let adapter = self.optional_adapter(adapter)?;
        let slot = Slot::new(&self.ops.device, adapter, capacity);
        Ok(self.add_slot(slot))
    }

    fn fork_slot(&mut self, slot: SlotId) -> Result<SlotId> {
        let copy = self.with_room(|gpu| {
            let from = gpu.slot(slot)?;
            from.prefix(&gpu.ops.device, &gpu.model.arch, from.len, from.capacity)
        })?;
        Ok(self.add_slot(copy))
    }

    fn fork_prefix(&mut self, slot: SlotId, len: usize, capacity: usize) -> Result<SlotId> {
        let from = self.slot(slot)?;
        check_prefix(len, from.len, capacity, self.info.max_context)?;
        let copy = self.with_room(|gpu| {
            let from = gpu.slot(slot)?;
            from.prefix(&gpu.ops.device, &gpu.model.arch, len, capacity)
        })?;
        Ok(self.add_slot(copy))
    }

    fn slot_bytes(&self, slot: SlotId) -> usize {
        self.slots.get(&slot).map_or(0, Slot::bytes)
    }

    fn close_slot(&mut self, slot: SlotId) {
        self.slots.remove(&slot);
    }

    fn prefill(&mut self, slot: SlotId, tokens: &[u32], prompt_logprobs: bool) -> Result<Prefill> {
        let mut held = self.take_slot(slot, tokens)?;
        let before = held.len;
        let outcome = self
            .with_room(|gpu| {
                held.len = before;
                gpu.inference().prefill(&mut held, tokens, prompt_logprobs)
            })
            .and_then(|(prompt_logprobs, next_logits)| {
                check_scores(slot, before, &prompt_logprobs)?;
                Ok(Prefill {
                    prompt_logprobs,
                    next_logits,
                })
            });
        if outcome.is_err() {
            held.len = before;
        }
        self.slots.insert(slot, held);
        outcome
    }

    fn prefill_logits(
        &mut self,
        slot: SlotId,
        tokens: &[u32],
        first: usize,
        show: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let mut held = self.take_slot(slot, tokens)?;
        let (before, mut n_shown) = (held.len, 0);
        let outcome = self.with_room(|gpu| {
            held.len = before;
            let mut show = |i: usize, logits: &[f32]| {
                if i < n_shown {
                    return Ok(());
                }
                n_shown = i + 1;
                show(i, logits)
            };
            let mut inference = gpu.inference();
            inference.prefill_logits(&mut held, tokens, first, &mut show)
        });
        self.slots.insert(slot, held);
        outcome
    }

    fn decode_step(&mut self, rows: &[(SlotId, u32)]) -> Result<Vec<f32>> {
        self.check_tokens(rows.iter().map(|(_, token)| *token))?;
        let mut named = HashSet::new();
        for (id, _) in rows {
            check_room(self.slot(*id)?, 1)?;
            if !named.insert(*id) {
                return Err(Error::Invalid(format!("slot {} is named twice", id.0)));
            }
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let mut taken: Vec<(SlotId, Slot)> = Vec::with_capacity(rows.len());
        for (id, _) in rows {
            taken.extend(self.slots.remove_entry(id));
        }
        let before: Vec<usize> = taken.iter().map(|(_, slot)| slot.len).collect();
        let outcome = self.with_room(|gpu| {
            let segments = taken.iter_mut().zip(rows).zip(&before);
            let mut segments: Vec<Segment<'_>> = segments
                .map(|(((_, slot), (_, token)), len)| {
                    slot.len = *len;
                    Segment {
                        slot,
                        tokens: std::slice::from_ref(token),
                    }
                })
                .collect();
            gpu.inference().decode(&mut segments)
        });
        if outcome.is_err() {
            for ((_, slot), len) in taken.iter_mut().zip(before) {
                slot.len = len;
            }
        }
        self.slots.extend(taken);
        outcome
    }
}

fn check_scores(slot: SlotId, before: usize, logprobs: &[f32]) -> Result<()> {
    let Some(i) = logprobs.iter().position(|l| !l.is_finite()) else {
        return Ok(());
    };
    let (slot, position, logprob) = (slot.0, before + i + 1, logprobs[i]);
    Err(Error::NotFinite(format!(
        "slot {slot}: the log-probability of the token at position {position} is {logprob}"
    )))
}
