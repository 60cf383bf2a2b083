//! The CPU backend: hand-written forward and backward passes over a small set of kernels.
#![expect(
    unsafe_code,
    reason = "vector instructions and memory shared between workers"
)]

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod block;
mod buffer;
mod elementwise;
mod gemm;
mod head;
mod infer;
mod keeping;
mod linear;
pub(crate) mod lora;
mod memory;
mod model;
pub(crate) mod pool;
mod quant;
mod simd;
mod steps;
mod tile;
mod train;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use self::block::Angles;
use self::buffer::Buffer;
pub(crate) use self::elementwise::{arg_max, exp_differences, log_sum_exp};
use self::infer::{Inference, Scratch, Segment, Slot};
use self::lora::Adapter;
pub(crate) use self::lora::tensor_shapes;
use self::model::{Form, Model, Units};
use self::pool::Pool;
use self::simd::Isa;
use self::train::{Training, Workspace};
use crate::adapter::{AdapterState, LoraSpec};
use crate::backend::{
    AdapterId, Backend, BaseInfo, CpuOptions, Prefill, SequenceOutput, SlotId, check_prefix,
};
use crate::error::{Error, Result};
use crate::loss::TrainSequence;
use crate::memory::Work;
use crate::optim::{OptimReport, Optimizer};

/// Loads a model directory onto the CPU.
pub(crate) fn load(dir: &Path, options: &CpuOptions) -> Result<Box<dyn Backend>> {
    let form = Form {
        units: units(options),
        quantization: options.weights,
        precision: options.precision,
    };
    let model = Model::load_as(dir, form)?;
    let mut cpu = Cpu::new(model, options.threads, form);
    if let Some(memory) = options.training_memory {
        cpu.memory = memory;
    }
    Ok(Box::new(cpu))
}

/// See [`Isa::limit_to_avx2`].
pub(crate) fn limit_to_avx2() -> bool {
    Isa::limit_to_avx2()
}

/// Whether a model with such options is held in tiles of bf16 where its numbers allow it.
pub(crate) fn holds_tiles(options: &CpuOptions) -> bool {
    units(options) != Units::Vectors
}

/// What multiplies the weights of a model with such options.
fn units(options: &CpuOptions) -> Units {
    if options.vectors_only {
        Units::Vectors
    } else {
        Units::best(options.precision)
    }
}

/// Bytes for activations that each thread may have, however small the model is.
const MIN_MEMORY: usize = 192 << 20;

/// What [`BaseInfo::precision`] says.
fn precision(form: Form) -> String {
    let unit = match form.units {
        Units::Matrix => "amx+",
        Units::Dots => "bf16+",
        Units::Vectors => "",
    };
    let weights = form.quantization.map(|w| format!(", weights {}", w.name()));
    format!(
        "cpu {unit}{} {}{}",
        Isa::best().name(),
        form.precision.name(),
        weights.unwrap_or_default()
    )
}

/// A base model on the CPU, with its adapters and cached sequences.
#[derive(Debug)]
struct Cpu {
    info: BaseInfo,
    model: Model,
    pool: Pool,
    workspaces: Vec<Workspace>,
    /// Bytes that workspaces may take for activations that backward passes read.
    memory: usize,
    /// Angles of the positions that passes over sequences have reached.
    angles: Angles,
    /// Buffers for gradients, kept between calls.
    spare: Vec<Buffer>,
    scratch: Scratch,
    adapters: BTreeMap<AdapterId, Arc<Adapter>>,
    slots: HashMap<SlotId, Slot>,
    next_id: u64,
}

impl Cpu {
    fn new(model: Model, threads: usize, form: Form) -> Self {
        let arch = &model.arch;
        let info = BaseInfo {
            vocab_size: arch.vocab_size,
            max_context: arch.max_context,
            hidden_size: arch.hidden_size,
            n_layers: arch.n_layers,
            n_parameters: model.n_parameters(),
            architecture: arch.name.clone(),
            precision: precision(form),
        };
        let pool = Pool::new(threads);
        Self {
            info,
            memory: (model.bytes() / 2).max(MIN_MEMORY * pool.threads()),
            angles: Angles::none(&model.arch),
            model,
            workspaces: (0..pool.threads()).map(|_| Workspace::new()).collect(),
            pool,
            spare: Vec::new(),
            scratch: Scratch::new(),
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

    /// Keeps the buffers that the next pass takes: two for each thread, and one for the sum.
    fn tidy_spare(&mut self) {
        self.spare.retain(|buffer| !buffer.is_empty());
        self.spare.truncate(2 * self.pool.threads() + 1);
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

/// A slot that `tokens`, of which there is one at least, can be appended to.
fn slot_with_room<'a>(
    slots: &'a mut HashMap<SlotId, Slot>,
    id: SlotId,
    tokens: &[u32],
) -> Result<&'a mut Slot> {
    if tokens.is_empty() {
        return Err(Error::Invalid("there are no tokens to append".into()));
    }
    let slot = slots.get_mut(&id).ok_or_else(|| unknown_slot(id))?;
    check_room(slot, tokens.len())?;
    Ok(slot)
}

impl Backend for Cpu {
    fn info(&self) -> &BaseInfo {
        &self.info
    }

    fn memory_for(&self, work: Work<'_>) -> u64 {
        self.memory_of(work) as u64
    }

    fn create_adapter(&mut self, spec: &LoraSpec) -> Result<AdapterId> {
        let adapter = Adapter::new(&self.model.arch, spec)?;
        Ok(self.add_adapter(adapter))
    }

    fn import_adapter(&mut self, state: &AdapterState) -> Result<AdapterId> {
        let adapter = Adapter::import(&self.model.arch, state)?;
        Ok(self.add_adapter(adapter))
    }

    fn export_adapter(&self, adapter: AdapterId) -> Result<AdapterState> {
        Ok(self.adapter(adapter)?.export())
    }

    fn snapshot_adapter(&mut self, adapter: AdapterId) -> Result<AdapterId> {
        let copy = self.adapter(adapter)?.snapshot();
        Ok(self.add_adapter(copy))
    }

    fn adapter_bytes(&self, adapter: AdapterId) -> usize {
        self.adapters.get(&adapter).map_or(0, |a| a.bytes())
    }

    fn drop_adapter(&mut self, adapter: AdapterId) {
        self.adapters.remove(&adapter);
        if self.adapters.is_empty() {
            self.spare.clear();
        }
    }

    fn forward(
        &mut self,
        adapter: Option<AdapterId>,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        let adapter = self.optional_adapter(adapter)?;
        train::check(&self.model.arch, sequences)?;
        self.angles
            .reach(&self.model.arch, train::longest(sequences));
        let training = Training {
            model: &self.model,
            pool: &self.pool,
            angles: &self.angles,
            sequences,
        };
        training.forward(adapter.as_deref(), &mut self.workspaces)
    }

    fn forward_backward(
        &mut self,
        adapter: AdapterId,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        let known = self.adapters.get_mut(&adapter);
        let adapter = Arc::make_mut(known.ok_or_else(|| unknown_adapter(adapter))?);
        train::check(&self.model.arch, sequences)?;
        self.angles
            .reach(&self.model.arch, train::longest(sequences));
        let training = Training {
            model: &self.model,
            pool: &self.pool,
            angles: &self.angles,
            sequences,
        };
        let mut gradient = std::mem::replace(&mut adapter.gradient, Buffer::zeros(0));
        let keeping = training.keeping(adapter, self.memory / self.workspaces.len());
        let outputs = training.forward_backward(
            adapter,
            keeping,
            &mut self.workspaces,
            &mut gradient,
            &mut self.spare,
        );
        adapter.gradient = gradient;
        self.tidy_spare();
        outputs
    }

    fn optim_step(&mut self, id: AdapterId, optimizer: &Optimizer) -> Result<OptimReport> {
        let adapter = self.adapters.get_mut(&id);
        let adapter = Arc::make_mut(adapter.ok_or_else(|| unknown_adapter(id))?);
        let report = adapter.optim_step(optimizer, &self.pool, &mut self.spare);
        self.tidy_spare();
        report
    }

    fn clear_gradient(&mut self, id: AdapterId) -> Result<()> {
        let adapter = self.adapters.get_mut(&id);
        Arc::make_mut(adapter.ok_or_else(|| unknown_adapter(id))?).clear_gradient();
        Ok(())
    }

    fn open_slot(&mut self, adapter: Option<AdapterId>, capacity: usize) -> Result<SlotId> {
        let max = self.info.max_context;
        if capacity == 0 || capacity > max {
            return Err(Error::Invalid(format!(
                "slot capacity {capacity} is not in 1..={max}"
            )));
        }
        let adapter = self.optional_adapter(adapter)?;
        let slot = Slot::new(&self.model.arch, adapter, capacity);
        Ok(self.add_slot(slot))
    }

    fn fork_slot(&mut self, slot: SlotId) -> Result<SlotId> {
        let copy = self
            .slots
            .get(&slot)
            .ok_or_else(|| unknown_slot(slot))?
            .clone();
        Ok(self.add_slot(copy))
    }

    fn fork_prefix(&mut self, slot: SlotId, len: usize, capacity: usize) -> Result<SlotId> {
        let from = self.slots.get(&slot).ok_or_else(|| unknown_slot(slot))?;
        check_prefix(len, from.len, capacity, self.info.max_context)?;
        let copy = from.prefix(&self.model.arch, len, capacity);
        Ok(self.add_slot(copy))
    }

    fn slot_bytes(&self, slot: SlotId) -> usize {
        self.slots.get(&slot).map_or(0, Slot::bytes)
    }

    fn close_slot(&mut self, slot: SlotId) {
        self.slots.remove(&slot);
    }

    fn prefill(&mut self, slot: SlotId, tokens: &[u32], prompt_logprobs: bool) -> Result<Prefill> {
        self.check_tokens(tokens.iter().copied())?;
        let held = slot_with_room(&mut self.slots, slot, tokens)?;
        let mut inference = Inference {
            model: &self.model,
            pool: &self.pool,
            scratch: &mut self.scratch,
        };
        let before = held.len;
        let (prompt_logprobs, next_logits) = inference.prefill(held, tokens, prompt_logprobs);
        if let Some(i) = prompt_logprobs.iter().position(|l| !l.is_finite()) {
            held.len = before;
            let (slot, position, logprob) = (slot.0, before + i + 1, prompt_logprobs[i]);
            return Err(Error::NotFinite(format!(
                "slot {slot}: the log-probability of the token at position {position} is {logprob}"
            )));
        }
        Ok(Prefill {
            prompt_logprobs,
            next_logits,
        })
    }

    fn prefill_logits(
        &mut self,
        slot: SlotId,
        tokens: &[u32],
        first: usize,
        show: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<Vec<f32>> {
        self.check_tokens(tokens.iter().copied())?;
        let held = slot_with_room(&mut self.slots, slot, tokens)?;
        let mut inference = Inference {
            model: &self.model,
            pool: &self.pool,
            scratch: &mut self.scratch,
        };
        inference.prefill_logits(held, tokens, first, show)
    }

    fn decode_step(&mut self, rows: &[(SlotId, u32)]) -> Result<Vec<f32>> {
        self.check_tokens(rows.iter().map(|(_, token)| *token))?;
        let mut named = HashSet::new();
        for (id, _) in rows {
            check_room(self.slots.get(id).ok_or_else(|| unknown_slot(*id))?, 1)?;
            if !named.insert(*id) {
                return Err(Error::Invalid(format!("slot {} is named twice", id.0)));
            }
        }
        // The slots leave the map while they are worked on, so that each can be borrowed alone.
        let mut taken: Vec<(SlotId, Slot)> = Vec::with_capacity(rows.len());
        for (id, _) in rows {
            taken.extend(self.slots.remove_entry(id));
        }
        let mut segments: Vec<Segment<'_>> = taken
            .iter_mut()
            .zip(rows)
            .map(|((_, slot), (_, token))| Segment {
                slot,
                tokens: std::slice::from_ref(token),
            })
            .collect();
        let mut inference = Inference {
            model: &self.model,
            pool: &self.pool,
            scratch: &mut self.scratch,
        };
        let logits = if segments.is_empty() {
            Vec::new()
        } else {
            inference.decode(&mut segments)
        };
        self.slots.extend(taken);
        Ok(logits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Precision;
    use crate::loss::Loss;

    #[test]
    fn gradients_are_kept_for_reuse_as_many_as_a_pass_takes_and_while_there_are_adapters() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let dir = root.join("../../fixtures/numerics/llama");
        let form = Form::of_file(Units::best(Precision::F32));
        let mut cpu = Cpu::new(Model::load_as(&dir, form).unwrap(), 2, form);
        let spec = LoraSpec {
            rank: 2,
            seed: 1,
            train_attn: true,
            train_mlp: true,
            train_unembed: false,
        };
        let adapters = [(); 2].map(|()| cpu.create_adapter(&spec).unwrap());
        // A long sequence first, so that gradients of later ones wait for it.
        let sequence = |n: usize| TrainSequence {
            tokens: vec![1; n],
            targets: vec![2; n],
            k: 1,
            loss: Loss::CrossEntropy {
                weights: vec![1.0; n],
            },
        };
        let batch = [200, 1, 1, 1, 1, 1, 1, 1].map(sequence);
        for adapter in [adapters[0], adapters[1], adapters[0]] {
            cpu.forward_backward(adapter, &batch).unwrap();
            assert!((1..=5).contains(&cpu.spare.len()), "{}", cpu.spare.len());
        }

        cpu.drop_adapter(adapters[0]);
        assert!(!cpu.spare.is_empty());
        cpu.drop_adapter(adapters[1]);
        assert!(cpu.spare.is_empty());
    }
}
