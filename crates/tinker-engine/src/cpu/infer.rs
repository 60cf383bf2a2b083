//! Cached sequences: appending prompt chunks and single tokens, of several sequences at once.
//!
//! A prompt and a decoded token take the same path, as rows of a batch in which each row has its
//! sequence's adapter and attends to its sequence's cache.

use std::sync::Arc;

use super::attention::{self, Heads, KeysValues};
use super::block::{Activations, Angles, Block};
use super::buffer::{Buffer, round_up};
use super::elementwise;
use super::gemm::PANEL;
use super::head::{HeadScratch, Pass, chunk_rows};
use super::linear::{Batch, Forward, Output, Run, Site};
use super::lora::Adapter;
use super::model::Model;
use super::pool::{Pool, SharedMut};
use crate::arch::Arch;
use crate::error::Result;
use crate::held::Cached;
use crate::loss::{Loss, TrainSequence};
use crate::runs::{runs_of, widest};

/// Rows of a prompt that go through the model together; bounds the memory of activations.
const CHUNK: usize = 480;

/// Rows of an attention task.
const TASK_ROWS: usize = 48;

/// Multiply-adds of attention from which on sharing it among threads pays.
const SHARED_WORK: usize = 1 << 16;

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
            self.extend(&mut [Segment {
                slot,
                tokens: &tokens[start..start + rows],
            }]);
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
            self.extend(&mut [Segment { slot, tokens }]);
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
        self.extend(segments);
        let normed = self.scratch.normed[..segments.len() * self.model.arch.hidden_size].to_vec();
        self.logits(&normed, &runs(segments))
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
        let (width, vocab) = (self.model.arch.hidden_size, self.model.arch.vocab_size);
        let rows = hidden.len() / width;
        let rank = widest(runs, Adapter::padded_rank);
        self.scratch.u.reserve(rows * rank);
        let mut logits = vec![0.0; rows * vocab];
        let batch = Batch {
            rows,
            runs,
            rank,
            pool: Some(self.pool),
            trains: false,
        };
        let u = &mut self.scratch.u;
        let output = Output {
            linear: &self.model.head,
            y: &mut logits,
        };
        batch.forward(
            Forward {
                site: Site::Head,
                x: hidden,
                width,
                u,
            },
            &mut [output],
        );
        self.model.cap_logits(&mut logits);
        logits
    }

    /// Appends the tokens of each segment and leaves the final norm's output in `scratch.normed`.
    fn extend(&mut self, segments: &mut [Segment<'_>]) {
        let arch = &self.model.arch;
        let heads = Heads::of(arch);
        let scratch = &mut *self.scratch;
        let rows: usize = segments.iter().map(|s| s.tokens.len()).sum();
        for segment in segments.iter_mut() {
            segment.slot.grow(&heads, segment.tokens.len());
        }
        let tokens: Vec<u32> = segments.iter().flat_map(|s| s.tokens).copied().collect();
        let positions = segments
            .iter()
            .flat_map(|s| s.slot.len..s.slot.len + s.tokens.len());
        let angles = Angles::new(arch, positions);
        {
            let mut caches: Vec<(usize, usize, &mut [Cache])> = Vec::new();
            let mut owners: Vec<(usize, Option<&Adapter>)> = Vec::new();
            for segment in segments.iter_mut() {
                let Slot {
                    adapter,
                    len,
                    layers,
                    ..
                } = &mut *segment.slot;
                owners.push((segment.tokens.len(), adapter.as_deref()));
                caches.push((*len, segment.tokens.len(), layers));
            }
            let runs = runs_of(owners.iter().copied());
            let rank = widest(&runs, Adapter::padded_rank);
            scratch.reserve(arch, rows, rank);
            let batch = Batch {
                rows,
                runs: &runs,
                rank,
                pool: Some(self.pool),
                trains: false,
            };
            let [x, next] = &mut scratch.x;
            self.model.embed(&tokens, x);
            for layer in 0..arch.n_layers {
                let block = Block::of(self.model, layer);
                block.project(&batch, x, &angles, &mut scratch.acts);
                let heads = Heads::of_layer(arch, layer);
                attend(self.pool, &heads, layer, &mut caches, &mut scratch.acts);
                block.finish(&batch, x, next, &mut scratch.acts);
                std::mem::swap(x, next);
            }
        }
        let n = rows * arch.hidden_size;
        let inverse = &mut scratch.inverse[..rows];
        let norm = &self.model.final_norm;
        elementwise::rms_norm(
            &scratch.x[0][..n],
            norm,
            arch.rms_eps,
            &mut scratch.normed,
            inverse,
        );
        for segment in segments {
            segment.slot.len += segment.tokens.len();
        }
    }
}

/// Appends the new keys and values of each segment to its cache, and attends to it.
fn attend(
    pool: &Pool,
    heads: &Heads,
    layer: usize,
    caches: &mut [(usize, usize, &mut [Cache])],
    acts: &mut Activations,
) {
    let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
    let mut tasks = Vec::new();
    let mut work = 0;
    let mut row = 0;
    for (len, rows, layers) in caches.iter_mut() {
        let (len, rows) = (*len, *rows);
        let cache = &mut layers[layer];
        let new = row * kv_width..(row + rows) * kv_width;
        heads.pack_keys(&acts.k[new.clone()], len, &mut cache.keys);
        cache.values[len * kv_width..][..rows * kv_width].copy_from_slice(&acts.v[new]);
        for start in (0..rows).step_by(TASK_ROWS) {
            let n = TASK_ROWS.min(rows - start);
            tasks.push((row + start, n, len + start, &*cache));
            work += n * heads.reach(len + start, n) * q_width;
        }
        row += rows;
    }
    let q = &acts.q;
    let out = SharedMut::new(&mut acts.attended);
    let group = heads.n / heads.n_kv;
    let run = |i: usize| {
        let (row, n, first, cache): (usize, usize, usize, &Cache) = tasks[i / heads.n_kv];
        let kv = KeysValues {
            keys: &cache.keys,
            values: &cache.values,
        };
        let mut log = [0.0; TASK_ROWS];
        let (start, kv_head) = (row * q_width, i % heads.n_kv);
        for head in kv_head * group..(kv_head + 1) * group {
            let (q, log) = (&q[start..], &mut log[..n]);
            // SAFETY: tasks write different rows or heads of the output, which outlives them.
            unsafe { attention::forward(heads, head, first, q, kv, (&out, start), log) };
        }
    };
    let n_tasks = tasks.len() * heads.n_kv;
    if work < SHARED_WORK {
        (0..n_tasks).for_each(run);
    } else {
        pool.run(n_tasks, &run);
    }
}

fn runs<'a>(segments: &'a [Segment<'_>]) -> Vec<Run<'a>> {
    let owner = |s: &'a Segment<'_>| (s.tokens.len(), s.slot.adapter.as_deref());
    runs_of(segments.iter().map(owner))
}
