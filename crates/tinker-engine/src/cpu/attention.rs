//! Causal grouped-query attention in blocks of rows, forward and backward.
//!
//! Only one block of scores exists at a time. The sum over keys is one chain in order of position,
//! so a row has the same bits in a prompt, in a chunk of it and when decoded alone.

use std::cell::RefCell;

use super::buffer::{Buffer, round_up};
use super::elementwise::{self, ScoreBlock};
use super::gemm::{Cols, PANEL, Product, ROWS, Rounding, Rows, Store, matmul};
use super::pool::SharedMut;
use crate::arch::Arch;

/// Rows of a block of scores: short enough to skip most of the future, a multiple of a tile.
const BLOCK: usize = 4 * ROWS;

/// Sizes of the heads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) n: usize,
    pub(crate) n_kv: usize,
    pub(crate) size: usize,
    /// Factor on scores.
    scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    softcap: Option<f32>,
    /// Positions that one attends to, itself included; all before it if absent.
    window: Option<usize>,
}

impl Heads {
    pub(crate) fn of(arch: &Arch) -> Self {
        Self {
            n: arch.n_heads,
            n_kv: arch.n_kv_heads,
            size: arch.head_dim,
            scale: arch.attention_scale,
            softcap: arch.attention_softcap,
            window: None,
        }
    }

    /// As in block `layer`.
    pub(crate) fn of_layer(arch: &Arch, layer: usize) -> Self {
        Self {
            window: arch.layers[layer].window,
            ..Self::of(arch)
        }
    }

    /// Keys that `rows` rows at positions `first..` attend to, at most.
    pub(crate) fn reach(&self, first: usize, rows: usize) -> usize {
        first + rows - self.first_key(first)
    }

    /// The first key that a row at position `first` attends to, down to a whole panel.
    fn first_key(&self, first: usize) -> usize {
        let start = self
            .window
            .map_or(0, |window| (first + 1).saturating_sub(window));
        start / PANEL * PANEL
    }

    /// Width of a row of queries.
    pub(crate) fn q_width(&self) -> usize {
        self.n * self.size
    }

    /// Width of a row of keys or values.
    pub(crate) fn kv_width(&self) -> usize {
        self.n_kv * self.size
    }

    fn kv_of(&self, head: usize) -> usize {
        head / (self.n / self.n_kv)
    }

    /// Floats that the key panels of `n` positions take.
    pub(crate) fn panels_len(&self, n: usize) -> usize {
        round_up(n, PANEL) * self.kv_width()
    }

    /// Packs rows of keys, `[rows, kv_width]`, into panels `[position / 32][kv head][size][32]`.
    pub(crate) fn pack_keys(&self, rows: &[f32], first: usize, panels: &mut [f32]) {
        let width = self.kv_width();
        for (position, row) in (first..).zip(rows.chunks_exact(width)) {
            let block = &mut panels[position / PANEL * PANEL * width..][..PANEL * width];
            for (slot, value) in block[position % PANEL..].iter_mut().step_by(PANEL).zip(row) {
                *slot = *value;
            }
        }
    }
}

/// Keys and values of one sequence in one layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeysValues<'a> {
    /// Panels as [`Heads::pack_keys`] lays them out.
    pub(crate) keys: &'a [f32],
    /// `[positions, kv_width]`.
    pub(crate) values: &'a [f32],
}

impl<'a> KeysValues<'a> {
    /// `K^T [size, keys]` of a key head for a block.
    fn keys(&self, heads: &Heads, kv_head: usize, block: ScoreBlock) -> Cols<'a> {
        let width = heads.kv_width();
        let panels = &self.keys[block.from * width + kv_head * heads.size * PANEL..];
        Cols::panels(panels, heads.size, block.keys, PANEL * width)
    }

    /// `V [keys, size]` of a value head for a block.
    fn values(&self, heads: &Heads, kv_head: usize, block: ScoreBlock) -> Cols<'a> {
        let width = heads.kv_width();
        let values = &self.values[block.from * width + kv_head * heads.size..];
        Cols::row_major(values, block.keys, heads.size, width)
    }
}

/// What a thread needs for one block of rows.
#[derive(Debug)]
struct Scratch {
    scores: Buffer,
    d_scores: Buffer,
    values_t: Buffer,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        scores: Buffer::zeros(0),
        d_scores: Buffer::zeros(0),
        values_t: Buffer::zeros(0),
    });
}

/// Computes `softmax(scale Q K^T) V` of one head for rows at positions `first..`.
///
/// `q` is `[rows, q_width]`, and so is what lies from `start` in `out`; `log_normaliser` is `[rows]` of
/// this head.
///
/// # Safety
/// Nobody else touches these rows of this head in `out`, which outlives the call.
pub(crate) unsafe fn forward(
    heads: &Heads,
    head: usize,
    first: usize,
    q: &[f32],
    kv: KeysValues<'_>,
    (out, start): (&SharedMut<f32>, usize),
    log_normaliser: &mut [f32],
) {
    let width = heads.q_width();
    let kv_head = heads.kv_of(head);
    SCRATCH.with_borrow_mut(|scratch| {
        for (row, log) in (0..).step_by(BLOCK).zip(log_normaliser.chunks_mut(BLOCK)) {
            let block = score_block(heads, first + row, log.len());
            scratch.scores.reserve(block.rows * block.stride);
            let at = row * width + head * heads.size;
            scores(
                heads,
                kv.keys(heads, kv_head, block),
                &q[at..],
                block,
                Rounding(None),
                &mut scratch.scores,
            );
            elementwise::softmax(&mut scratch.scores, block, log);
            let right = kv.values(heads, kv_head, block);
            // SAFETY: passed on to the caller.
            let product = unsafe { Product::shared(right, out, start + at, width, Store::Replace) };
            let left = Rows::RowMajor {
                data: &scratch.scores,
                stride: block.stride,
            };
            matmul(block.rows, block.keys, left, &mut [product]);
        }
    });
}

fn score_block(heads: &Heads, first: usize, rows: usize) -> ScoreBlock {
    let (from, keys) = (heads.first_key(first), heads.reach(first, rows));
    ScoreBlock {
        stride: round_up(keys, 16),
        rows,
        first,
        from,
        keys,
        window: heads.window,
        scale: heads.scale,
        softcap: heads.softcap,
    }
}

/// `Q K^T` of one block.
fn scores(
    heads: &Heads,
    keys: Cols<'_>,
    q: &[f32],
    block: ScoreBlock,
    rounding: Rounding,
    out: &mut [f32],
) {
    let left = Rows::RowMajor {
        data: q,
        stride: heads.q_width(),
    };
    let (left, keys) = rounding.of(left, keys);
    let products = &mut [Product::new(keys, out, block.stride, Store::Replace)];
    matmul(block.rows, heads.size, left, products);
}

/// A whole sequence's attention in one layer, as the backward pass reads it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attended<'a> {
    pub(crate) rows: usize,
    /// `[rows, q_width]`.
    pub(crate) q: &'a [f32],
    /// `[rows, kv_width]`.
    pub(crate) k: &'a [f32],
    pub(crate) kv: KeysValues<'a>,
    /// `[rows, q_width]`.
    pub(crate) out: &'a [f32],
    /// `[heads, rows]`.
    pub(crate) log_normaliser: &'a [f32],
    /// How products with keys and values are computed.
    pub(crate) rounding: Rounding,
}

/// Gradients of queries, keys and values, in the shapes of [`Attended`]; keys and values are added to.
#[derive(Debug)]
pub(crate) struct Gradients<'a> {
    pub(crate) q: &'a mut [f32],
    pub(crate) k: &'a mut [f32],
    pub(crate) v: &'a mut [f32],
}

/// Backward of [`forward`] for all heads of a whole sequence; `d_out` is `[rows, q_width]`.
pub(crate) fn backward(
    heads: &Heads,
    attended: Attended<'_>,
    d_out: &[f32],
    gradients: &mut Gradients<'_>,
) {
    gradients.k.fill(0.0);
    gradients.v.fill(0.0);
    let group = heads.n / heads.n_kv;
    SCRATCH.with_borrow_mut(|scratch| {
        for kv_head in 0..heads.n_kv {
            pack_values(heads, &attended, kv_head, &mut scratch.values_t);
            for head in kv_head * group..(kv_head + 1) * group {
                for row in (0..attended.rows).step_by(BLOCK) {
                    let rows = BLOCK.min(attended.rows - row);
                    let block = score_block(heads, row, rows);
                    backward_block(heads, attended, d_out, gradients, head, block, scratch);
                }
            }
        }
    });
}

/// Packs `V^T [size, n]` of a value head into panels.
fn pack_values(heads: &Heads, attended: &Attended<'_>, kv_head: usize, panels: &mut Buffer) {
    panels.reserve(round_up(attended.rows, PANEL) * heads.size);
    let one = Heads {
        n: 1,
        n_kv: 1,
        ..*heads
    };
    let width = heads.kv_width();
    for (position, row) in attended
        .kv
        .values
        .chunks_exact(width)
        .take(attended.rows)
        .enumerate()
    {
        one.pack_keys(&row[kv_head * heads.size..][..heads.size], position, panels);
    }
}

fn backward_block(
    heads: &Heads,
    attended: Attended<'_>,
    d_out: &[f32],
    gradients: &mut Gradients<'_>,
    head: usize,
    block: ScoreBlock,
    scratch: &mut Scratch,
) {
    let (size, q_width, kv_width) = (heads.size, heads.q_width(), heads.kv_width());
    let kv_head = heads.kv_of(head);
    let q_at = block.first * q_width + head * size;
    let kv_at = block.from * kv_width + kv_head * size;
    let (rows, keys, stride) = (block.rows, block.keys, block.stride);
    scratch.scores.reserve(rows * stride);
    scratch.d_scores.reserve(rows * stride);
    let (p, dp) = (&mut scratch.scores, &mut scratch.d_scores);
    let (q, d_out_block) = (&attended.q[q_at..], &d_out[q_at..]);

    let (keys_t, rounding) = (attended.kv.keys(heads, kv_head, block), attended.rounding);
    scores(heads, keys_t, q, block, rounding, p);
    let values_t = &scratch.values_t[block.from * size..];
    let values_t = Cols::panels(values_t, size, keys, size * PANEL);
    scores(heads, values_t, d_out_block, block, rounding, dp);
    let mut d_dot_out = [0.0; BLOCK];
    for (i, dot) in d_dot_out[..rows].iter_mut().enumerate() {
        let at = q_at + i * q_width;
        *dot = elementwise::dot(&d_out[at..][..size], &attended.out[at..][..size]);
    }
    let log = &attended.log_normaliser[head * attended.rows + block.first..][..rows];
    elementwise::softmax_backward(p, dp, block, log, &d_dot_out);

    // dV += P^T dO; dK += dS^T Q; dQ = dS K
    let right = Cols::row_major(d_out_block, rows, size, q_width);
    let left = Rows::Transposed { data: p, stride };
    let products = &mut [Product::new(
        right,
        &mut gradients.v[kv_at..],
        kv_width,
        Store::Add,
    )];
    matmul(keys, rows, left, products);
    let right = Cols::row_major(q, rows, size, q_width);
    let left = Rows::Transposed { data: dp, stride };
    let products = &mut [Product::new(
        right,
        &mut gradients.k[kv_at..],
        kv_width,
        Store::Add,
    )];
    matmul(keys, rows, left, products);
    let right = Cols::row_major(&attended.k[kv_at..], keys, size, kv_width);
    let left = Rows::RowMajor { data: dp, stride };
    let (left, right) = rounding.of(left, right);
    let products = &mut [Product::new(
        right,
        &mut gradients.q[q_at..],
        q_width,
        Store::Replace,
    )];
    matmul(rows, keys, left, products);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(window: Option<usize>) -> Heads {
        Heads {
            n: 1,
            n_kv: 1,
            size: 16,
            scale: 0.25,
            softcap: None,
            window,
        }
    }

    #[test]
    fn a_window_bounds_the_keys_that_a_block_reads() {
        for window in [1, 31, 32, 33, 500] {
            let heads = heads(Some(window));
            for first in (0..4000).step_by(7) {
                let block = score_block(&heads, first, BLOCK);
                assert!(block.keys <= window + BLOCK + PANEL, "{window} {first}");
                assert!(block.from <= (first + 1).saturating_sub(window));
                assert_eq!(block.from + block.keys, first + BLOCK);
            }
        }
        assert_eq!(heads(None).reach(4000, BLOCK), 4000 + BLOCK);
    }

    /// Attention of one head over `rows` positions.
    fn attend(heads: &Heads, rows: usize) -> Vec<f32> {
        let n = rows * heads.size;
        let x: Vec<f32> = (0..n).map(|i| ((i * i % 97) as f32 * 0.7).sin()).collect();
        let mut keys = Buffer::zeros(heads.panels_len(rows));
        heads.pack_keys(&x, 0, &mut keys);
        let kv = KeysValues {
            keys: &keys,
            values: &x,
        };
        let (mut out, mut log) = (vec![0.0; n], vec![0.0; rows]);
        let shared = SharedMut::new(&mut out);
        // SAFETY: nobody else touches the output.
        #[expect(unsafe_code, reason = "as its callers do")]
        unsafe {
            forward(heads, 0, 0, &x, kv, (&shared, 0), &mut log);
        }
        out
    }

    #[test]
    fn a_window_as_long_as_the_sequence_changes_no_bit() {
        assert_eq!(attend(&heads(Some(300)), 300), attend(&heads(None), 300));
        assert_ne!(attend(&heads(Some(299)), 300), attend(&heads(None), 300));
    }
}
