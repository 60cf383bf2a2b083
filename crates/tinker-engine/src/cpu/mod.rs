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

use std::path::Path;

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
use crate::backend::{AdapterId, Backend, BaseInfo, CpuOptions, Prefill, SequenceOutput, SlotId};
use crate::error::Result;
use crate::held::{Held, check_scores};
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
    held: Held<Adapter, Slot>,
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
            memory: (model.bytes() / 2).max(MIN_MEMORY * pool.threads()),
            angles: Angles::none(&model.arch),
            model,
            workspaces: (0..pool.threads()).map(|_| Workspace::new()).collect(),
            pool,
            spare: Vec::new(),
            scratch: Scratch::new(),
            held: Held::new(&info),
            info,
        }
    }

    /// Keeps the buffers that the next pass takes: two for each thread, and one for the sum.
    fn tidy_spare(&mut self) {
        self.spare.retain(|buffer| !buffer.is_empty());
        self.spare.truncate(2 * self.pool.threads() + 1);
    }
}

fn copied(adapter: &Adapter) -> Result<Adapter> {
    Ok(adapter.clone())
}

impl Backend for Cpu {
    fn info(&self) -> &BaseInfo {
        &self.info
    }

    fn memory_for(&self, work: Work<'_>) -> u64 {
        self.memory_of(work) as u64
    }

    fn kept_bytes(&self) -> usize {
        let floats: usize = self.spare.iter().map(|spare| spare.len()).sum();
        floats * size_of::<f32>()
    }

    fn free_kept(&mut self) {
        self.spare = Vec::new();
    }

    fn create_adapter(&mut self, spec: &LoraSpec) -> Result<AdapterId> {
        let adapter = Adapter::new(&self.model.arch, spec)?;
        Ok(self.held.add_adapter(adapter))
    }

    fn import_adapter(&mut self, state: &AdapterState) -> Result<AdapterId> {
        let adapter = Adapter::import(&self.model.arch, state)?;
        Ok(self.held.add_adapter(adapter))
    }

    fn export_adapter(&self, adapter: AdapterId) -> Result<AdapterState> {
        Ok(self.held.adapter(adapter)?.export())
    }

    fn snapshot_adapter(&mut self, adapter: AdapterId) -> Result<AdapterId> {
        let copy = self.held.adapter(adapter)?.snapshot();
        Ok(self.held.add_adapter(copy))
    }

    fn adapter_bytes(&self, adapter: AdapterId) -> usize {
        self.held.adapter(adapter).map_or(0, |a| a.bytes())
    }

    fn drop_adapter(&mut self, adapter: AdapterId) {
        if self.held.drop_adapter(adapter) {
            self.spare.clear();
        }
    }

    fn forward(
        &mut self,
        adapter: Option<AdapterId>,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        let adapter = self.held.optional_adapter(adapter)?;
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
        let adapter = self.held.adapter_mut(adapter, copied)?;
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
        let adapter = self.held.adapter_mut(id, copied)?;
        let report = adapter.optim_step(optimizer, &self.pool, &mut self.spare);
        self.tidy_spare();
        report
    }

    fn clear_gradient(&mut self, id: AdapterId) -> Result<()> {
        self.held.adapter_mut(id, copied)?.clear_gradient();
        Ok(())
    }

    fn open_slot(&mut self, adapter: Option<AdapterId>, capacity: usize) -> Result<SlotId> {
        self.held.check_capacity(capacity)?;
        let adapter = self.held.optional_adapter(adapter)?;
        let slot = Slot::new(&self.model.arch, adapter, capacity);
        Ok(self.held.add_slot(slot))
    }

    fn fork_slot(&mut self, slot: SlotId) -> Result<SlotId> {
        let copy = self.held.slot(slot)?.clone();
        Ok(self.held.add_slot(copy))
    }

    fn fork_prefix(&mut self, slot: SlotId, len: usize, capacity: usize) -> Result<SlotId> {
        let from = self.held.slot_to_fork(slot, len, capacity)?;
        let copy = from.prefix(&self.model.arch, len, capacity);
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
        let mut inference = Inference {
            model: &self.model,
            pool: &self.pool,
            scratch: &mut self.scratch,
        };
        let before = held.len;
        let (prompt_logprobs, next_logits) = inference.prefill(&mut held, tokens, prompt_logprobs);
        let outcome = check_scores(slot, before, &prompt_logprobs);
        if outcome.is_err() {
            held.len = before;
        }
        self.held.put_back([(slot, held)]);
        outcome.map(|()| Prefill {
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
        let mut held = self.held.take_slot(slot, tokens)?;
        let mut inference = Inference {
            model: &self.model,
            pool: &self.pool,
            scratch: &mut self.scratch,
        };
        let outcome = inference.prefill_logits(&mut held, tokens, first, show);
        self.held.put_back([(slot, held)]);
        outcome
    }

    fn decode_step(&mut self, rows: &[(SlotId, u32)]) -> Result<Vec<f32>> {
        let mut taken = self.held.take_slots(rows)?;
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
        self.held.put_back(taken);
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
