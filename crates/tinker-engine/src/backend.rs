//! The seam between the engine and whatever runs it: one [`Backend`] holds one base model.
//!
//! The calls are coarse and speak tokens, log-probabilities and slots; there is no tensor algebra
//! in this interface. Seeds, temperature, top-k, top-p, stop conditions, text and scheduling sit
//! above it and are shared by all backends.

use std::fmt;
use std::path::Path;

use crate::adapter::{AdapterState, LoraSpec};
use crate::error::{Error, Result};
use crate::loss::TrainSequence;
use crate::memory::Work;
use crate::optim::{OptimReport, Optimizer};

/// An adapter (LoRA weights, gradient, optimizer moments) that lives in a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u64);

/// A sequence with its keys and values cached in a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u64);

/// What a backend runs and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseInfo {
    /// Tokens in the vocabulary; valid token ids are `0..vocab_size`.
    pub vocab_size: usize,
    /// Longest sequence in tokens, prompt and continuation together.
    pub max_context: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder blocks.
    pub n_layers: usize,
    /// Parameters of the base model.
    pub n_parameters: u64,
    /// Architecture as in `config.json`, such as `Qwen3ForCausalLM`.
    pub architecture: String,
    /// Name of device, instruction set and precision, such as `cpu avx512 f32`; part of a run's record.
    pub precision: String,
}

/// Result of one sequence of a forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceOutput {
    /// `[tokens * k]`, natural log, at most 0: the log-probability of each target.
    pub logprobs: Vec<f32>,
    /// The loss summed over the sequence (sum, not mean).
    pub loss: f64,
}

/// Log-probabilities of a prompt, with the distribution that follows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Prefill {
    /// `[tokens - 1]`: entry `i` is the natural-log probability of token `i + 1` given `0..=i`.
    /// Empty unless asked for.
    pub prompt_logprobs: Vec<f32>,
    /// `[vocab]`: logits of the next token.
    pub next_logits: Vec<f32>,
}

/// One device holding one base model and any number of adapters and cached sequences.
///
/// Results depend only on the arguments and the adapter: never on thread count, timing, batch mates
/// or other adapters. All calls are blocking and meant for the engine's own thread.
pub trait Backend: Send + fmt::Debug {
    /// Describes the base model and the device.
    fn info(&self) -> &BaseInfo;

    /// About how many bytes more than now some work takes at most; 0 where a device does not know.
    fn memory_for(&self, work: Work<'_>) -> u64 {
        let _ = work;
        0
    }

    /// Whether what it holds is memory of the host.
    fn is_on_host(&self) -> bool {
        true
    }

    /// Bytes that [`Backend::free_kept`] frees.
    fn kept_bytes(&self) -> usize {
        0
    }

    /// Frees what only saves time in later calls.
    fn free_kept(&mut self) {}

    /// Creates an adapter: `A` drawn from `spec.seed`, `B` zero, no gradient, step 0.
    ///
    /// # Errors
    /// If the rank is 0 or above the hidden size, or no module is to be trained.
    fn create_adapter(&mut self, spec: &LoraSpec) -> Result<AdapterId>;

    /// Creates an adapter from a saved state, checking every shape against the base model.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape than the base model asks for, or is not finite; if a
    /// second moment is below 0, or moments and step do not fit together.
    fn import_adapter(&mut self, state: &AdapterState) -> Result<AdapterId>;

    /// Copies an adapter to the host: weights, moments, step and accumulated gradient.
    ///
    /// # Errors
    /// If the adapter is unknown.
    fn export_adapter(&self, adapter: AdapterId) -> Result<AdapterState>;

    /// Makes an independent, weights-only copy, as a sampler needs it.
    ///
    /// # Errors
    /// If the adapter is unknown.
    fn snapshot_adapter(&mut self, adapter: AdapterId) -> Result<AdapterId>;

    /// Bytes of memory that an adapter takes; 0 for unknown ids.
    fn adapter_bytes(&self, adapter: AdapterId) -> usize;

    /// Frees an adapter; unknown ids are ignored.
    fn drop_adapter(&mut self, adapter: AdapterId);

    /// Runs forward without touching gradients; `None` is the base model alone.
    ///
    /// One output per sequence, in input order.
    ///
    /// # Errors
    /// If a token is outside the vocabulary, a sequence is empty, too long, or its arrays disagree;
    /// and if a loss or a log-probability is not finite, naming the sequence.
    fn forward(
        &mut self,
        adapter: Option<AdapterId>,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>>;

    /// Runs forward and backward and adds to the adapter's gradient.
    ///
    /// Either the whole batch is added or, on an error, the gradient is unchanged. A loss that is no sum
    /// over targets costs a second pass of the output head. Where the processor
    /// has a matrix unit, log-probabilities differ from those of [`Backend::forward`], which have the
    /// bits of sampling, by about 1e-7 relative: sums are in another order.
    ///
    /// # Errors
    /// As [`Backend::forward`]; and if a gradient is not finite, naming the sequence, or the sum of
    /// all gradients is not, naming the tensor.
    fn forward_backward(
        &mut self,
        adapter: AdapterId,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>>;

    /// Takes one step with the accumulated gradient (zero if there is none) and clears it.
    ///
    /// # Errors
    /// If a hyper-parameter is out of range, the adapter is unknown or has taken steps of another
    /// optimizer, or a weight or moment would not be finite, naming its tensor; the adapter is
    /// unchanged.
    fn optim_step(&mut self, adapter: AdapterId, optimizer: &Optimizer) -> Result<OptimReport>;

    /// Throws the accumulated gradient away.
    ///
    /// # Errors
    /// If the adapter is unknown.
    fn clear_gradient(&mut self, adapter: AdapterId) -> Result<()>;

    /// Opens an empty cached sequence of at most `capacity` tokens.
    ///
    /// # Errors
    /// If the capacity is 0 or above [`BaseInfo::max_context`], or the adapter is unknown.
    fn open_slot(&mut self, adapter: Option<AdapterId>, capacity: usize) -> Result<SlotId>;

    /// Copies a cached sequence, so that several continuations share the work of one prompt.
    ///
    /// # Errors
    /// If the slot is unknown.
    fn fork_slot(&mut self, slot: SlotId) -> Result<SlotId>;

    /// Copies the first `len` tokens of a cached sequence into a new one of at most `capacity` tokens,
    /// with the bits that computing them anew would give.
    ///
    /// # Errors
    /// If the slot is unknown, `len` is 0 or above what it holds, or the capacity is below `len` or
    /// above [`BaseInfo::max_context`].
    fn fork_prefix(&mut self, slot: SlotId, len: usize, capacity: usize) -> Result<SlotId>;

    /// Bytes of memory that a cached sequence takes; 0 for unknown ids.
    fn slot_bytes(&self, slot: SlotId) -> usize;

    /// Frees a cached sequence; unknown ids are ignored.
    fn close_slot(&mut self, slot: SlotId);

    /// Appends `tokens` to a slot.
    ///
    /// # Errors
    /// If `tokens` is empty, outside the vocabulary, or does not fit the slot; or if a log-probability
    /// is not finite. The slot is unchanged.
    fn prefill(&mut self, slot: SlotId, tokens: &[u32], prompt_logprobs: bool) -> Result<Prefill>;

    /// Appends `tokens` to a slot, and shows the logits `[vocab]` that follow each of them from number
    /// `first` on, in order and with its number; returns those that follow the last, which is not
    /// shown. They have the bits of [`Backend::decode_step`].
    ///
    /// Unless a device does better, tokens from `first` on go through one by one.
    ///
    /// # Errors
    /// As [`Backend::prefill`], and what `show` returns; the slot can only be closed then.
    fn prefill_logits(
        &mut self,
        slot: SlotId,
        tokens: &[u32],
        first: usize,
        show: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let n_before = first.min(tokens.len().saturating_sub(1));
        let (before, rest) = tokens.split_at(n_before);
        if !before.is_empty() || rest.is_empty() {
            self.prefill(slot, before, false)?;
        }
        let mut logits = Vec::new();
        for (i, token) in (n_before..).zip(rest) {
            logits = self.decode_step(&[(slot, *token)])?;
            if i >= first && i + 1 < tokens.len() {
                show(i, &logits)?;
            }
        }
        Ok(logits)
    }

    /// Appends one token to each slot; returns `[rows, vocab]` logits, row by row.
    ///
    /// # Errors
    /// If a slot is unknown, named twice or full, or a token is outside the vocabulary.
    fn decode_step(&mut self, rows: &[(SlotId, u32)]) -> Result<Vec<f32>>;
}

/// Checks the lengths that [`Backend::fork_prefix`] takes.
pub(crate) fn check_prefix(
    len: usize,
    held: usize,
    capacity: usize,
    max_context: usize,
) -> Result<()> {
    let message = if len == 0 || len > held {
        format!("a beginning of {len} tokens is not in 1..={held}")
    } else if capacity < len || capacity > max_context {
        format!("slot capacity {capacity} is not in {len}..={max_context}")
    } else {
        return Ok(());
    };
    Err(Error::Invalid(message))
}

/// Loads a Hugging Face model directory (`config.json`, safetensors) onto the CPU.
///
/// `threads` of 0 means one per core.
///
/// # Errors
/// If a file is missing, the architecture is not supported, a tensor is missing, has another shape
/// than the configuration asks for, or holds values that are not finite.
pub fn load_cpu(dir: &Path, threads: usize) -> Result<Box<dyn Backend>> {
    let options = CpuOptions {
        threads,
        ..CpuOptions::default()
    };
    load_cpu_with(dir, &options)
}

/// Fewer bits for the weights of a model's blocks. Embedding, head and norms keep theirs, and so do
/// adapters, activations and sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// 8 bits, with a scale for each output of a layer: its largest weight is 127.
    Int8,
    /// 4 bits, `NF4` (Dettmers et al. 2023): 16 values that a normal distribution has equally often, with a
    /// float32 scale for each 64 inputs of an output, the largest weight of these. The scales are not
    /// quantized again.
    Nf4,
}

impl Quantization {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Int8, Self::Nf4];

    /// Its name in settings and records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Nf4 => "nf4",
        }
    }
}

/// What the factors of products are. Sums, norms, softmax, losses, adapters with their moments and
/// optimizer, and attention forward are float32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Numbers of 24 bits, to the accuracy of float32.
    #[default]
    F32,
    /// Numbers of 8 bits (bf16), as PyTorch has them in a bf16 model: weights are rounded when they are
    /// loaded, what a layer reads (and the gradient of what it gives) when it is multiplied with them.
    /// Where the processor multiplies bf16, so are the factors of other products of the backward pass.
    /// Log-probabilities are then off by about 0.3 % and gradients by some percent, less than PyTorch's but
    /// for one mixture of experts, up to three times; training is up to 1.6 times faster where the processor
    /// has a matrix unit.
    Bf16,
}

impl Precision {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::F32, Self::Bf16];

    /// Its name in settings and records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// How the CPU computes with a model. Results do not depend on threads and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuOptions {
    /// Threads; 0 means one per core.
    pub threads: usize,
    /// Bytes that training may take for activations that its backward passes read, of all threads
    /// together. `None` means half of what the weights take, and 192 MiB for each thread at least.
    ///
    /// What does not fit is computed again, which takes up to half as much time again. The inputs of all
    /// blocks and the activations of one are kept in any case.
    pub training_memory: Option<usize>,
    /// What to turn the weights into; `None` keeps those of the file.
    pub weights: Option<Quantization>,
    /// What the weights are multiplied with, and as what.
    pub precision: Precision,
    /// Whether to leave the processor's matrix unit alone. Then log-probabilities of
    /// [`Backend::forward_backward`], too, have the bits of sampling.
    pub vectors_only: bool,
}

/// As [`load_cpu`], with all there is to choose.
///
/// # Errors
/// As [`load_cpu`].
pub fn load_cpu_with(dir: &Path, options: &CpuOptions) -> Result<Box<dyn Backend>> {
    crate::cpu::load(dir, options)
}

/// Keeps this process to 256-bit vectors (AVX2), as on a processor without wider ones, if it is called
/// before the first model is loaded. Returns whether it did. For benchmarks.
#[must_use]
pub fn limit_to_avx2() -> bool {
    crate::cpu::limit_to_avx2()
}

/// As [`load_cpu`], on vectors alone even where the processor has a matrix unit.
///
/// See [`CpuOptions::vectors_only`].
///
/// # Errors
/// As [`load_cpu`].
pub fn load_cpu_on_vectors(dir: &Path, threads: usize) -> Result<Box<dyn Backend>> {
    let options = CpuOptions {
        threads,
        vectors_only: true,
        ..CpuOptions::default()
    };
    load_cpu_with(dir, &options)
}
