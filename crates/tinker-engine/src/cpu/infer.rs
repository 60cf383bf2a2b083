//! Cached sequences: appending prompt chunks and single tokens, of several sequences at once.
//!
//! A prompt and a decoded token take the same path, as rows of a batch in which each row has its
//! sequence's adapter and attends to its sequence's cache.

mod attend;
mod together;

use std::sync::Arc;

use self::attend::{Attention, History};
use self::together::{Rows, Together};
use super::attention::Heads;
use super::block::{Activations, Angles, Block};
use super::buffer::{Buffer, round_up};
use super::elementwise;
use super::gemm::{PANEL, is_tall};
use super::head::{HeadScratch, Pass, chunk_rows};
use super::linear::{Batch, Forward, Output, Run, Site};
use super::lora::Adapter;
use super::model::Model;
use super::pool::Pool;
use super::steps;
use crate::arch::Arch;
use crate::error::Result;
use crate::held::Cached;
use crate::loss::{Loss, TrainSequence};
use crate::runs::{runs_of, widest};

/// Rows of a prompt that go through the model together; bounds the memory of activations.
const CHUNK: usize = 480;

/// A sequence with its keys and values.
#[derive(Debug, Clone)]
pub(crate) struct Slot {
    /// The adapter as it was when the slot was opened.
    pub(crate) adapter: Option<Arc<Adapter>>,
    /// Most tokens it may hold.
    pub(crate) capacity: usize,
    /// Tokens it holds.
    pub(crate) len: usize,
    layers: Vec<Cache>,
}

/// Keys (in panels) and values of one layer.
#[derive(Debug, Clone)]
struct Cache {
    keys: Buffer,
    values: Buffer,
}

impl Slot {
    pub(crate) fn new(arch: &Arch, adapter: Option<Arc<Adapter>>, capacity: usize) -> Self {
        let cache = || Cache {
            keys: Buffer::zeros(0),
            values: Buffer::zeros(0),
        };
        let layers = (0..arch.n_layers).map(|_| cache()).collect();
        Self {
            adapter,
            capacity,
            len: 0,
            layers,
        }
    }

    /// A copy of its first `len` tokens, with room for `capacity`.
    pub(crate) fn prefix(&self, arch: &Arch, len: usize, capacity: usize) -> Self {
        let width = Heads::of(arch).kv_width();
        let whole = round_up(len, PANEL) * width;
        let copy = |cache: &Cache| {
            let mut keys = Buffer::from_slice(&cache.keys[..whole]);
            let mut values = Buffer::from_slice(&cache.values[..whole]);
            // What came after is not to be seen, not even as something that is masked.
            values[len * width..].fill(0.0);
            if !len.is_multiple_of(PANEL) {
                for lanes in keys[whole - PANEL * width..].chunks_exact_mut(PANEL) {
                    lanes[len % PANEL..].fill(0.0);
                }
            }
            Cache { keys, values }
        };
        Self {
            adapter: self.adapter.clone(),
            capacity,
            len,
            layers: self.layers.iter().map(copy).collect(),
        }
    }

    /// Makes room for `n` more tokens in steps of panels, doubling so that growth stays cheap.
    fn grow(&mut self, heads: &Heads, n: usize) {
        let width = heads.kv_width();
        let needed = round_up(self.len + n, PANEL);
        let held = self.layers.first().map_or(0, |c| c.values.len() / width);
        if needed <= held {
            return;
        }
        let positions = needed.max(2 * held).min(round_up(self.capacity, PANEL));
        for cache in &mut self.layers {
            cache.keys.resize(positions * width);
            cache.values.resize(positions * width);
        }
    }
}

impl Cached for Slot {
    fn len(&self) -> usize {
        self.len
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn bytes(&self) -> usize {
        let floats = |cache: &Cache| cache.keys.len() + cache.values.len();
        self.layers.iter().map(floats).sum::<usize>() * size_of::<f32>()
    }
}

/// Activations of the rows that are under way.
#[derive(Debug)]
pub(crate) struct Scratch {
    acts: Activations,
    head: HeadScratch,
    /// Residual stream before and after a block.
    x: [Buffer; 2],
    normed: Buffer,
    inverse: Buffer,
    u: Buffer,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        let none = || Buffer::zeros(0);
        Self {
            acts: Activations::new(),
            head: HeadScratch::new(),
            x: [none(), none()],
            normed: none(),
            inverse: none(),
            u: none(),
        }
    }

    fn reserve(&mut self, arch: &Arch, rows: usize, rank: usize) {
        self.acts.reserve(arch, rows, rank);
        self.acts.derived.reserve(arch, rows);
        let n = rows * arch.hidden_size;
        self.x.iter_mut().for_each(|x| x.reserve(n));
        self.normed.reserve(n);
        self.inverse.reserve(rows);
        self.u.reserve(rows * rank);
    }
}

/// Tokens to append to a slot.
#[derive(Debug)]
pub(crate) struct Segment<'a> {
    pub(crate) slot: &'a mut Slot,
    pub(crate) tokens: &'a [u32],
}

/// The device for one call.
#[derive(Debug)]
pub(crate) struct Inference<'a> {
    pub(crate) model: &'a Model,
    pub(crate) pool: &'a Pool,
    pub(crate) scratch: &'a mut Scratch,
}

impl Inference<'_> {
    /// Appends `tokens` to a slot; returns the logits that follow and, if asked for, the
    /// log-probability of each token but the first.
    pub(crate) fn prefill(
        &mut self,
        slot: &mut Slot,
        tokens: &[u32],
        wants_logprobs: bool,
    ) -> (Vec<f32>, Vec<f32>) {
        let width = self.model.arch.hidden_size;
        let mut logprobs = Vec::new();
        let mut last = vec![0.0; width];
        for start in (0..tokens.len()).step_by(CHUNK) {
            let rows = CHUNK.min(tokens.len() - start);
            let segment = Segment {
                slot,
                tokens: &tokens[start..start + rows],
            };
            self.extend(&mut [segment], None);
            last.copy_from_slice(&self.scratch.normed[(rows - 1) * width..][..width]);
            if wants_logprobs {
                let targets = &tokens[start + 1..tokens.len().min(start + rows + 1)];
                self.score(slot.adapter.as_deref(), targets, &mut logprobs);
            }
        }
        let run = [Run {
            rows: 0..1,
            adapter: slot.adapter.as_deref(),
        }];
        (logprobs, self.logits(&last, &run))
    }

    /// Appends `tokens` to a slot, shows the logits after each from number `first` on but the last, and
    /// returns those after the last.
    pub(crate) fn prefill_logits(
        &mut self,
        slot: &mut Slot,
        tokens: &[u32],
        first: usize,
        show: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let (width, vocab) = (self.model.arch.hidden_size, self.model.arch.vocab_size);
        let last = tokens.len() - 1;
        let mut after_last = Vec::new();
        for start in (0..tokens.len()).step_by(CHUNK) {
            let end = tokens.len().min(start + CHUNK);
            let tokens = &tokens[start..end];
            self.extend(&mut [Segment { slot, tokens }], None);
            let mut from = first.min(last).max(start);
            while from < end {
                let to = end.min(from + chunk_rows(vocab));
                let hidden = &self.scratch.normed[(from - start) * width..(to - start) * width];
                let hidden = hidden.to_vec();
                let run = [Run {
                    rows: 0..to - from,
                    adapter: slot.adapter.as_deref(),
                }];
                let logits = self.logits(&hidden, &run);
                for (i, logits) in (from..to).zip(logits.chunks_exact(vocab)) {
                    if i == last {
                        after_last = logits.to_vec();
                    } else {
                        show(i, logits)?;
                    }
                }
                from = to;
            }
        }
        Ok(after_last)
    }

    /// Appends one token to each slot; returns the logits, `[slots, vocab]`.
    pub(crate) fn decode(&mut self, segments: &mut [Segment<'_>]) -> Vec<f32> {
        let mut logits = vec![0.0; segments.len() * self.model.arch.vocab_size];
        self.extend(segments, Some(&mut logits));
        logits
    }

    /// Log-probabilities of `targets` after the rows that went through last.
    fn score(&mut self, adapter: Option<&Adapter>, targets: &[u32], logprobs: &mut Vec<f32>) {
        let n = targets.len();
        let sequence = TrainSequence {
            tokens: Vec::new(),
            targets: targets.to_vec(),
            k: 1,
            loss: Loss::CrossEntropy {
                weights: vec![0.0; n],
            },
        };
        let hidden = &self.scratch.normed[..n * self.model.arch.hidden_size];
        let pass = Pass {
            model: self.model,
            adapter,
            pool: Some(self.pool),
        };
        pass.run(&sequence, hidden, &mut self.scratch.head, logprobs, None);
    }

    /// Runs the head on rows of normed hidden states.
    fn logits(&mut self, hidden: &[f32], runs: &[Run<'_>]) -> Vec<f32> {
        let rows = hidden.len() / self.model.arch.hidden_size;
        let batch = Batch {
            rows,
            runs,
            rank: widest(runs, Adapter::padded_rank),
            pool: Some(self.pool),
            trains: false,
        };
        self.scratch.u.reserve(rows * batch.rank);
        let mut logits = vec![0.0; rows * self.model.arch.vocab_size];
        run_head(self.model, &batch, hidden, &mut self.scratch.u, &mut logits);
        logits
    }

    /// Appends the tokens of each segment and leaves the final norm's output in `scratch.normed`; of that
    /// come the logits `[rows, vocab]`, if they are wanted.
    fn extend(&mut self, segments: &mut [Segment<'_>], logits: Option<&mut [f32]>) {
        let arch = &self.model.arch;
        let heads = Heads::of(arch);
        for segment in segments.iter_mut() {
            segment.slot.grow(&heads, segment.tokens.len());
        }
        let tokens: Vec<u32> = segments.iter().flat_map(|s| s.tokens).copied().collect();
        let positions = segments
            .iter()
            .flat_map(|s| s.slot.len..s.slot.len + s.tokens.len());
        let angles = Angles::new(arch, positions);
        let (mut histories, mut owners) = (Vec::new(), Vec::new());
        for segment in segments.iter_mut() {
            let Slot {
                adapter,
                len,
                layers,
                ..
            } = &mut *segment.slot;
            let rows = segment.tokens.len();
            owners.push((rows, adapter.as_deref()));
            histories.push(History {
                len: *len,
                rows,
                layers,
            });
        }
        let runs = runs_of(owners);
        let batch = Batch {
            rows: tokens.len(),
            runs: &runs,
            rank: widest(&runs, Adapter::padded_rank),
            pool: Some(self.pool),
            trains: false,
        };
        self.scratch.reserve(arch, batch.rows, batch.rank);
        self.model.embed(&tokens, &mut self.scratch.x[0]);
        if is_tall(batch.rows, self.pool) || !Together::can(self.model) {
            self.extend_by_blocks(&batch, &angles, &mut histories);
            if let Some(logits) = logits {
                let hidden = &self.scratch.normed[..batch.rows * arch.hidden_size];
                run_head(self.model, &batch, hidden, &mut self.scratch.u, logits);
            }
        } else {
            self.extend_together(&batch, &angles, histories, logits);
        }
        for segment in segments {
            segment.slot.len += segment.tokens.len();
        }
    }

    /// Takes rows through the blocks, product by product.
    fn extend_by_blocks(
        &mut self,
        batch: &Batch<'_>,
        angles: &Angles,
        histories: &mut [History<'_>],
    ) {
        let (arch, scratch) = (&self.model.arch, &mut *self.scratch);
        let [x, next] = &mut scratch.x;
        for layer in 0..arch.n_layers {
            let block = Block::of(self.model, layer);
            block.project(batch, x, angles, &mut scratch.acts);
            Attention::new(arch, layer, histories, &mut scratch.acts).run_on(self.pool);
            block.finish(batch, x, next, &mut scratch.acts);
            std::mem::swap(x, next);
        }
        let x = &x[..batch.rows * arch.hidden_size];
        let (norm, inverse) = (&self.model.final_norm, &mut scratch.inverse[..batch.rows]);
        elementwise::rms_norm(x, norm, arch.rms_eps, &mut scratch.normed, inverse);
    }

    /// As [`Inference::extend_by_blocks`] for a few rows, with the same bits, and the head.
    fn extend_together(
        &mut self,
        batch: &Batch<'_>,
        angles: &Angles,
        histories: Vec<History<'_>>,
        logits: Option<&mut [f32]>,
    ) {
        let scratch = &mut *self.scratch;
        let [x, next] = &mut scratch.x;
        let u = &mut scratch.u[..];
        let rows = Rows {
            model: self.model,
            batch,
            angles,
            histories,
            acts: &mut scratch.acts,
            x: [x, next],
            normed: &mut scratch.normed,
            inverse: &mut scratch.inverse[..batch.rows],
            head: logits.map(|logits| (u, logits)),
        };
        steps::run(self.pool, Together::new(rows));
    }
}

/// Logits of rows of normed hidden states.
fn run_head(model: &Model, batch: &Batch<'_>, hidden: &[f32], u: &mut [f32], logits: &mut [f32]) {
    let of = Forward {
        site: Site::Head,
        x: hidden,
        width: model.arch.hidden_size,
        u,
    };
    let output = Output {
        linear: &model.head,
        y: &mut *logits,
    };
    batch.forward(of, &mut [output]);
    model.cap_logits(logits);
}
