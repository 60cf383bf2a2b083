//! The GPU backend: the passes of the CPU's over kernels of CUDA C, which are compiled for the device
//! when a model is loaded.
//!
//! Sampling and scoring go through own kernels, in which rows do not see each other; training also
//! through the device's library for products. Sums are in `f32`, weights in the numbers of the file.
#![expect(unsafe_code, reason = "memory and kernels of a device")]

mod adapter;
mod block;
mod call;
pub mod device;
mod driver;
mod head;
mod infer;
mod linear;
mod memory;
mod model;
mod ops;
mod tiles;
mod train;

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
use crate::backend::{AdapterId, Backend, BaseInfo, Prefill, SequenceOutput, SlotId};
use crate::error::{Error, Result};
use crate::held::{Held, check_scores};
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
    held: Held<Adapter, Slot>,
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
            model,
            ops: Ops::new(device),
            workspace: Workspace::new(device),
            scratch: Scratch::new(device),
            // As the kernels have it.
            tile: if head > 128 { 8 } else { 16 },
            memory,
            held: Held::new(&info),
            info,
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
}

impl Backend for Gpu {
    fn info(&self) -> &BaseInfo {
        &self.info
    }

    fn is_on_host(&self) -> bool {
        false
    }

    fn create_adapter(&mut self, spec: &LoraSpec) -> Result<AdapterId> {
        let new = |gpu: &mut Self| Adapter::new(&gpu.ops.device, &gpu.model.arch, spec);
        let adapter = self.with_room(new)?;
        Ok(self.held.add_adapter(adapter))
    }

    fn import_adapter(&mut self, state: &AdapterState) -> Result<AdapterId> {
        let import = |gpu: &mut Self| Adapter::import(&gpu.ops.device, &gpu.model.arch, state);
        let adapter = self.with_room(import)?;
        Ok(self.held.add_adapter(adapter))
    }

    fn export_adapter(&self, adapter: AdapterId) -> Result<AdapterState> {
        self.held.adapter(adapter)?.export(&self.model.arch)
    }

    fn snapshot_adapter(&mut self, adapter: AdapterId) -> Result<AdapterId> {
        let copy = self.with_room(|gpu| gpu.held.adapter(adapter)?.snapshot())?;
        Ok(self.held.add_adapter(copy))
    }

    fn adapter_bytes(&self, adapter: AdapterId) -> usize {
        self.held.adapter(adapter).map_or(0, |a| a.bytes())
    }

    fn drop_adapter(&mut self, adapter: AdapterId) {
        if self.held.drop_adapter(adapter) {
            self.workspace = Workspace::new(&self.ops.device);
        }
    }

    fn forward(
        &mut self,
        adapter: Option<AdapterId>,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        let adapter = self.held.optional_adapter(adapter)?;
        self.with_room(|gpu| gpu.training().forward(adapter.as_deref(), sequences))
    }

    fn forward_backward(
        &mut self,
        id: AdapterId,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        let adapter = Arc::clone(self.held.adapter(id)?);
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
        self.with_room(|gpu| gpu.held.adapter_mut(id, Adapter::copied).map(|_| ()))?;
        self.held.adapter_mut(id, Adapter::copied)?.gradient = gradient;
        Ok(outputs)
    }

    fn optim_step(&mut self, id: AdapterId, optimizer: &Optimizer) -> Result<OptimReport> {
        self.with_room(|gpu| {
            let adapter = gpu.held.adapter_mut(id, Adapter::copied)?;
            adapter.optim_step(&mut gpu.ops, &gpu.model.arch, optimizer)
        })
    }

    fn clear_gradient(&mut self, id: AdapterId) -> Result<()> {
        self.with_room(|gpu| {
            gpu.held.adapter_mut(id, Adapter::copied)?.gradient = None;
            Ok(())
        })
    }

    fn open_slot(&mut self, adapter: Option<AdapterId>, capacity: usize) -> Result<SlotId> {
        self.held.check_capacity(capacity)?;
        let adapter = self.held.optional_adapter(adapter)?;
        let slot = Slot::new(&self.ops.device, adapter, capacity);
        Ok(self.held.add_slot(slot))
    }

    fn fork_slot(&mut self, slot: SlotId) -> Result<SlotId> {
        let copy = self.with_room(|gpu| {
            let from = gpu.held.slot(slot)?;
            from.prefix(&gpu.ops.device, &gpu.model.arch, from.len, from.capacity)
        })?;
        Ok(self.held.add_slot(copy))
    }

    fn fork_prefix(&mut self, slot: SlotId, len: usize, capacity: usize) -> Result<SlotId> {
        let copy = self.with_room(|gpu| {
            let from = gpu.held.slot_to_fork(slot, len, capacity)?;
            from.prefix(&gpu.ops.device, &gpu.model.arch, len, capacity)
        })?;
        Ok(self.held.add_slot(copy))
    }

    fn slot_bytes(&self, slot: SlotId) -> usize {
        self.held.slot_bytes(slot)
    }

    fn close_slot(&mut self, slot: SlotId) {
        self.held.close_slot(slot);
    }

    fn prefill(&mut self, slot: SlotId, tokens: &[u32], prompt_logprobs: bool) -> Result<Prefill> {
        let mut held = self.held.take_slot(slot, tokens)?;
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
        self.held.put_back([(slot, held)]);
        outcome
    }

    fn prefill_logits(
        &mut self,
        slot: SlotId,
        tokens: &[u32],
        first: usize,
        show: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let mut held = self.held.take_slot(slot, tokens)?;
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
        self.held.put_back([(slot, held)]);
        outcome
    }

    fn decode_step(&mut self, rows: &[(SlotId, u32)]) -> Result<Vec<f32>> {
        let mut taken = self.held.take_slots(rows)?;
        if taken.is_empty() {
            return Ok(Vec::new());
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
        self.held.put_back(taken);
        outcome
    }
}
