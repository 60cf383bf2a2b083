//! How much memory work takes, told before it begins: what does not fit can be refused instead of ending the
//! process. Estimates are of the large things, and a few per cent off.

use std::path::Path;

use crate::adapter::LoraSpec;
use crate::arch::Arch;
use crate::backend::{AdapterId, CpuOptions, Precision, Quantization};
use crate::error::Result;
use crate::load::Weights;

/// Outputs of a layer that are packed side by side.
const PANEL: usize = 32;

/// Work whose memory is asked for; see [`crate::Backend::memory_for`].
#[derive(Debug, Clone, Copy)]
pub enum Work<'a> {
    /// A new adapter that is trained: weights, gradient and moments.
    Adapter(&'a LoraSpec),
    /// An adapter that is loaded to be sampled from: its weights while they are read, and then.
    Weights(&'a LoraSpec),
    /// A training pass over `n` sequences, of which the longest has so many tokens. The gradient that it leaves
    /// is the adapter's.
    Pass {
        /// The adapter that is trained.
        adapter: AdapterId,
        /// Sequences.
        n: usize,
        /// Tokens of the longest of them.
        longest: usize,
    },
    /// A pass without gradient over `n` sequences, of which the longest has so many tokens.
    Forward {
        /// The adapter that is applied.
        adapter: AdapterId,
        /// Sequences.
        n: usize,
        /// Tokens of the longest of them.
        longest: usize,
    },
    /// Cached sequences, all at once.
    Slots {
        /// How many.
        n: usize,
        /// Tokens of each.
        capacity: usize,
    },
}

/// Bytes of the weights of an adapter of a model directory, as `f32`.
///
/// # Errors
/// If the architecture is not supported, or there can be no such adapter.
pub fn estimate_adapter(dir: &Path, spec: &LoraSpec) -> Result<u64> {
    let arch = Arch::load(dir)?;
    let shapes = crate::cpu::tensor_shapes(&arch, spec)?;
    let n_values = shapes.map(|(_, [rows, columns])| (rows * columns) as u64);
    Ok(n_values.sum::<u64>() * size_of::<f32>() as u64)
}

/// Bytes that a model directory takes once [`crate::load_cpu_with`] has loaded it for sampling, from its
/// configuration and the headers of its files.
///
/// # Errors
/// If a file is missing or the architecture is not supported.
pub fn estimate_load(dir: &Path, options: &CpuOptions) -> Result<u64> {
    let arch = Arch::load(dir)?;
    let weights = Weights::open(dir)?;
    // Tiles take bf16 as it is; vectors take what is widened.
    let holds_tiles = crate::cpu::holds_tiles(options);
    let rounds = options.precision == Precision::Bf16;
    let bytes_of = |(name, shape, is_bf16): (&str, &[usize], bool)| {
        // A matrix [out, in] is packed with its outputs rounded up to whole panels.
        let sides = shape.iter().enumerate().map(|(i, side)| match i {
            0 if shape.len() > 1 => side.next_multiple_of(PANEL) as u64,
            _ => *side as u64,
        });
        let n: u64 = sides.product();
        let is_embedding = name == "model.embed_tokens.weight";
        let is_layer =
            shape.len() > 1 && name.contains(".layers.") && !name.ends_with("mlp.gate.weight");
        match options.weights.filter(|_| is_layer) {
            Some(Quantization::Int8) => n + n / shape.last().map_or(1, |k| *k as u64).max(1) * 4,
            // Half a byte, and a scale for each 64.
            Some(Quantization::Nf4) => n / 2 + n / 16,
            // Rows that are looked up and not multiplied stay as they are.
            None if is_embedding && !arch.tied_head && is_bf16 => 2 * n,
            None if is_embedding && !arch.tied_head => 4 * n,
            None if holds_tiles && shape.len() > 1 && (is_bf16 || rounds) => 2 * n,
            None => 4 * n,
        }
    };
    Ok(weights.tensors().map(bytes_of).sum())
}
