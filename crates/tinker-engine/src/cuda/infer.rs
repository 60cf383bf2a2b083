//! Cached sequences: prompts, and many sequences that each get one token, through kernels whose rows
//! do not see each other.

use std::sync::Arc;

use super::adapter::Adapter;
use super::block::{Activations, Block};
use super::call::Call;
use super::device::Device;
use super::head::{HeadScratch, chunk_rows};
use super::linear::{Batch, Run};
use super::memory::{Buffer, Carver, Floats, Table};
use super::model::Model;
use super::ops::Ops;
use super::tiles::{Rows, Tiles};
use crate::arch::Arch;
use crate::error::Result;
use crate::held::Cached;
use crate::runs::{runs_of, widest};

/// Rows of a prompt that go through the model together; bounds the memory of activations.
const CHUNK: usize = 512;

/// Caches grow by multiples of this many positions.
const GROWTH: usize = 64;

/// A sequence with its keys and values.
#[derive(Debug)]
pub(super) struct Slot {
    /// The adapter as it was when the slot was opened.
    pub(super) adapter: Option<Arc<Adapter>>,
    /// Most tokens it may hold.
    pub(super) capacity: usize,
    /// Tokens it holds.
    pub(super) len: usize,
    /// `[2, layers, positions, kv_width]`: keys, then values.
    cache: Buffer,
    positions: usize,
}

impl Slot {
    pub(super) fn new(
        device: &Arc<dyn Device>,
        adapter: Option<Arc<Adapter>>,
        capacity: usize,
    ) -> Self {
        Self {
            adapter,
            capacity,
            len: 0,
            cache: Buffer::empty(device),
            positions: 0,
        }
    }

    /// A copy of its first `len` tokens, with room for `capacity`.
    pub(super) fn prefix(
        &self,
        device: &Arc<dyn Device>,
        arch: &Arch,
        len: usize,
        capacity: usize,
    ) -> Result<Self> {
        let mut copy = Self::new(device, self.adapter.clone(), capacity);
        if len > 0 {
            copy.take(device, arch, self, len, len)?;
        }
        Ok(copy)
    }

    /// Makes room for `n` more tokens, doubling so that growth stays cheap.
    fn grow(&mut self, device: &Arc<dyn Device>, arch: &Arch, n: usize) -> Result<()> {
        let needed = self.len + n;
        if needed <= self.positions {
            return Ok(());
        }
        let mut grown = Self::new(device, self.adapter.clone(), self.capacity);
        let room = needed.max(2 * self.positions);
        grown.take(device, arch, self, self.len, room)?;
        *self = grown;
        Ok(())
    }

    /// Becomes the first `len` tokens of another, with room for `room` positions.
    fn take(
        &mut self,
        device: &Arc<dyn Device>,
        arch: &Arch,
        from: &Self,
        len: usize,
        room: usize,
    ) -> Result<()> {
        let width = arch.n_kv_heads * arch.head_dim;
        let positions = room.next_multiple_of(GROWTH).min(self.capacity.max(len));
        let sides = 2 * arch.n_layers;
        self.cache = Buffer::with_len(device, sides * positions * width)?;
        self.positions = positions;
        self.len = len;
        for side in 0..if len > 0 { sides } else { 0 } {
            let source = from.cache.floats();
            let source = source.range(side * from.positions * width, len * width);
            let target = self.cache.floats();
            let target = target.range(side * positions * width, len * width);
            target.copy_from(device, source)?;
        }
        Ok(())
    }

    /// Where keys and values begin, and how far blocks of the model are apart in each.
    fn place(&self, arch: &Arch) -> (u64, u64, usize) {
        let stride = self.positions * arch.n_kv_heads * arch.head_dim;
        let cache = self.cache.floats();
        let values = cache.from(arch.n_layers * stride);
        (cache.address(), values.address(), stride)
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
        self.cache.bytes()
    }
}

/// Activations of the rows that are under way.
#[derive(Debug)]
pub(super) struct Scratch {
    rows: Buffer,
    /// Output of the final norm of the rows that went through last.
    normed: Floats,
    head: HeadScratch,
    call: Table,
}

impl Scratch {
    pub(super) fn new(device: &Arc<dyn Device>) -> Self {
        let rows = Buffer::empty(device);
        Self {
            normed: rows.floats(),
            rows,
            head: HeadScratch::new(device),
            call: Table::empty(device),
        }
    }

    fn reserve(&mut self, arch: &Arch, rows: usize, rank: usize) -> Result<Room> {
        let mut counting = Carver::counting();
        Room::carve(&mut counting, arch, rows, rank);
        self.rows.reserve(counting.taken())?;
        Ok(Room::carve(
            &mut self.rows.floats().carve(),
            arch,
            rows,
            rank,
        ))
    }
}

/// What lies where in the scratch, for the rows that are under way.
#[derive(Debug)]
struct Room {
    acts: Activations,
    /// Residual stream before and after a block.
    xs: [Floats; 2],
    normed: Floats,
    inverse: Floats,
}

impl Room {
    fn carve(carver: &mut Carver, arch: &Arch, rows: usize, rank: usize) -> Self {
        let n = rows * arch.hidden_size;
        Self {
            xs: [carver.take(n), carver.take(n)],
            normed: carver.take(n),
            inverse: carver.take(rows),
            acts: Activations::carve(carver, arch, rows, rank),
        }
    }
}

/// Tokens to append to a slot.
#[derive(Debug)]
pub(super) struct Segment<'a> {
    pub(super) slot: &'a mut Slot,
    pub(super) tokens: &'a [u32],
}

/// The device for one call.
#[derive(Debug)]
pub(super) struct Inference<'a> {
    pub(super) model: &'a Model,
    pub(super) ops: &'a mut Ops,
    pub(super) scratch: &'a mut Scratch,
    /// Rows of a tile of attention.
    pub(super) tile: usize,
}

impl Inference<'_> {
    /// Appends `tokens` to a slot; returns the log-probability of each token but the first, if asked
    /// for, and the logits that follow.
    pub(super) fn prefill(
        &mut self,
        slot: &mut Slot,
        tokens: &[u32],
        wants_logprobs: bool,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let mut logprobs = Vec::new();
        let mut logits = Vec::new();
        for start in (0..tokens.len()).step_by(CHUNK) {
            let rows = CHUNK.min(tokens.len() - start);
            self.extend(&mut [Segment {
                slot,
                tokens: &tokens[start..start + rows],
            }])?;
            if wants_logprobs {
                let targets = &tokens[start + 1..tokens.len().min(start + rows + 1)];
                self.score(slot.adapter.as_deref(), targets, &mut logprobs)?;
            }
            if start + rows == tokens.len() {
                logits = self.logits_of(slot.adapter.as_deref(), rows - 1..rows)?;
            }
        }
        Ok((logprobs, logits))
    }

    /// Appends `tokens` to a slot, shows the logits after each from number `first` on but the last, and
    /// returns those after the last.
    pub(super) fn prefill_logits(
        &mut self,
        slot: &mut Slot,
        tokens: &[u32],
        first: usize,
        show: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let vocab = self.model.arch.vocab_size;
        let last = tokens.len() - 1;
        let mut after_last = Vec::new();
        for start in (0..tokens.len()).step_by(CHUNK) {
            let end = tokens.len().min(start + CHUNK);
            let tokens = &tokens[start..end];
            self.extend(&mut [Segment { slot, tokens }])?;
            let mut from = first.min(last).max(start);
            while from < end {
                let to = end.min(from + chunk_rows(vocab));
                let rows = from - start..to - start;
                let logits = self.logits_of(slot.adapter.as_deref(), rows)?;
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
    pub(super) fn decode(&mut self, segments: &mut [Segment<'_>]) -> Result<Vec<f32>> {
        self.extend(segments)?;
        let owners = segments.iter().map(|s| (1, s.slot.adapter.as_deref()));
        let hidden = self.scratch.normed;
        self.logits(hidden, &runs_of(owners))
    }

    /// Log-probabilities of `targets` after the rows that went through last.
    fn score(
        &mut self,
        adapter: Option<&Adapter>,
        targets: &[u32],
        logprobs: &mut Vec<f32>,
    ) -> Result<()> {
        let (width, vocab) = (self.model.arch.hidden_size, self.model.arch.vocab_size);
        let chunk = chunk_rows(vocab);
        for (i, targets) in targets.chunks(chunk).enumerate() {
            let rows = targets.len();
            let hidden = self.scratch.normed;
            let hidden = hidden.range(i * chunk * width, rows * width);
            let run = [Run {
                rows: 0..rows,
                adapter,
            }];
            self.compute_logits(hidden, &run, rows)?;
            let sizes = (rows, vocab, 1);
            logprobs.extend(self.scratch.head.score(self.ops, sizes, targets)?);
        }
        Ok(())
    }

    /// Logits after some of the rows that went through last.
    fn logits_of(
        &mut self,
        adapter: Option<&Adapter>,
        rows: std::ops::Range<usize>,
    ) -> Result<Vec<f32>> {
        let width = self.model.arch.hidden_size;
        let hidden = self.scratch.normed;
        let hidden = hidden.range(rows.start * width, rows.len() * width);
        let run = [Run {
            rows: 0..rows.len(),
            adapter,
        }];
        self.logits(hidden, &run)
    }

    /// Runs the head on rows of normed hidden states.
    fn logits(&mut self, hidden: Floats, runs: &[Run<'_>]) -> Result<Vec<f32>> {
        let rows = runs.last().map_or(0, |run| run.rows.end);
        self.compute_logits(hidden, runs, rows)?;
        let n = rows * self.model.arch.vocab_size;
        let logits = self.scratch.head.logits.floats().range(0, n);
        logits.to_host(&self.ops.device)
    }

    fn compute_logits(&mut self, hidden: Floats, runs: &[Run<'_>], rows: usize) -> Result<()> {
        let batch = Batch {
            rows,
            runs,
            rank: widest(runs, Adapter::padded_rank),
            trains: false,
        };
        let head = &mut self.scratch.head;
        head.compute(self.ops, self.model, &batch, hidden)
    }

    /// Appends the tokens of each segment and leaves the final norm's output in `scratch.normed`.
    fn extend(&mut self, segments: &mut [Segment<'_>]) -> Result<()> {
        let (model, arch) = (self.model, &self.model.arch);
        let device = Arc::clone(&self.ops.device);
        let rows: usize = segments.iter().map(|s| s.tokens.len()).sum();
        for segment in segments.iter_mut() {
            segment.slot.grow(&device, arch, segment.tokens.len())?;
        }
        let tokens: Vec<u32> = segments.iter().flat_map(|s| s.tokens).copied().collect();
        let positions = segments
            .iter()
            .flat_map(|s| s.slot.len..s.slot.len + s.tokens.len());
        let sequences = segments.iter().map(|segment| segment.rows(arch));
        let places: Vec<u64> = sequences.clone().flat_map(places).collect();
        let tiles = Tiles::of(sequences, &model.heads(0), self.tile);
        let scratch = &mut *self.scratch;
        let owners = segments
            .iter()
            .map(|s| (s.tokens.len(), s.slot.adapter.as_deref()));
        let runs = runs_of(owners);
        let batch = Batch {
            rows,
            runs: &runs,
            rank: widest(&runs, Adapter::padded_rank),
            trains: false,
        };
        let room = scratch.reserve(arch, rows, batch.rank)?;
        let given = (&places[..], &tiles);
        let call = Call::upload(&mut scratch.call, arch, &tokens, positions, given)?;
        let tiles = (&tiles, call.tiles);
        let [mut x, mut next] = room.xs;
        let acts = &room.acts;
        self.ops.embed(
            model.embedding(),
            (call.tokens, rows),
            arch.embedding_scale,
            x,
        )?;
        for layer in 0..arch.n_layers {
            let block = Block::of(model, layer);
            block.project(self.ops, &batch, x, acts)?;
            block.place(self.ops, (rows, call.places), &call.angles, acts)?;
            let floats = [acts.q, acts.attended, acts.logs];
            self.ops
                .attention(&block.heads, floats, tiles, [0, 0], (layer, rows))?;
            block.finish(self.ops, &batch, x, next, acts)?;
            std::mem::swap(&mut x, &mut next);
        }
        let (norm, sizes) = (model.final_norm.floats(), (rows, arch.rms_eps));
        self.ops
            .rms_norm(sizes, x, norm, room.normed, room.inverse)?;
        scratch.normed = room.normed;
        drop(runs);
        for segment in segments {
            segment.slot.len += segment.tokens.len();
        }
        Ok(())
    }
}

impl Segment<'_> {
    /// Its rows, and where the slot's keys and values are.
    fn rows(&self, arch: &Arch) -> Rows {
        let (keys, values, stride) = self.slot.place(arch);
        Rows {
            keys,
            values,
            stride,
            n: self.tokens.len(),
            before: self.slot.len,
        }
    }
}

/// Where the key and value of each row go, as the kernel reads it.
fn places(rows: Rows) -> impl Iterator<Item = u64> {
    let positions = rows.before..rows.before + rows.n;
    positions
        .flat_map(move |position| [rows.keys, rows.values, rows.stride as u64, position as u64])
}
