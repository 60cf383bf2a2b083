//! The output head, fused with the loss and computed a few rows at a time.
//!
//! Logits become log-probabilities, the loss, its coefficients and the gradient of the hidden state
//! chunk by chunk; there is never a tensor of all logits.

use super::buffer::Buffer;
use super::elementwise;
use super::linear::{Backward, Batch, Forward, Output, Run, Site};
use super::lora::Adapter;
use super::model::Model;
use super::pool::Pool;
use crate::loss::{TrainSequence, log_prob};

/// Floats that the logits of a chunk may take, 4 MiB, as long as a chunk has [`MIN_ROWS`] rows.
const LOGITS: usize = 1 << 20;

/// Fewest and most rows of a chunk: the head's weights are read once per chunk, and more rows make that
/// no faster.
const MIN_ROWS: usize = 96;
const MAX_ROWS: usize = 128;

/// Rows of a chunk.
pub(crate) fn chunk_rows(vocab: usize) -> usize {
    (LOGITS / vocab).clamp(MIN_ROWS, MAX_ROWS) / 32 * 32
}

/// Logits and scratch of one chunk.
#[derive(Debug)]
pub(crate) struct HeadScratch {
    logits: Buffer,
    /// Capped logits of one row; only with a cap.
    capped: Buffer,
    u: Buffer,
    du: Buffer,
}

/// What the head does with a sequence.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    pub(crate) model: &'a Model,
    pub(crate) adapter: Option<&'a Adapter>,
    pub(crate) pool: Option<&'a Pool>,
}

/// Where the head's backward pass writes: the gradient of its input and of the adapter.
#[derive(Debug)]
pub(crate) struct HeadGradients<'a> {
    /// `[rows, hidden]`.
    pub(crate) d_hidden: &'a mut [f32],
    pub(crate) adapter: &'a mut [f32],
}

impl HeadScratch {
    pub(crate) fn new() -> Self {
        Self {
            logits: Buffer::zeros(0),
            capped: Buffer::zeros(0),
            u: Buffer::zeros(0),
            du: Buffer::zeros(0),
        }
    }

    fn reserve(&mut self, rows: usize, vocab: usize, rank: usize) {
        self.logits.reserve(rows * vocab);
        self.u.reserve(rows * rank);
        self.du.reserve(rows * rank);
    }
}

impl Pass<'_> {
    /// Writes the logits of `hidden [rows, hidden]` to `logits [rows, vocab]`; `trains` if their
    /// gradient follows.
    fn logits(&self, hidden: &[f32], trains: bool, logits: &mut [f32], u: &mut [f32]) {
        let width = self.model.arch.hidden_size;
        let rows = hidden.len() / width;
        let run = [Run {
            rows: 0..rows,
            adapter: self.adapter,
        }];
        let rank = self.adapter.map_or(0, Adapter::padded_rank);
        let batch = Batch {
            rows,
            runs: &run,
            rank,
            pool: self.pool,
            trains,
        };
        let output = Output {
            linear: &self.model.head,
            y: logits,
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
        self.model.cap_logits(logits);
    }

    /// Computes the log-probability of each target, appended to `logprobs`, and returns the loss.
    ///
    /// `hidden` is `[rows, hidden]`. With `gradients`, goes back through the head as well.
    pub(crate) fn run(
        &self,
        sequence: &TrainSequence,
        hidden: &[f32],
        scratch: &mut HeadScratch,
        logprobs: &mut Vec<f32>,
        mut gradients: Option<HeadGradients<'_>>,
    ) -> f64 {
        let (width, vocab) = (self.model.arch.hidden_size, self.model.arch.vocab_size);
        let chunk = chunk_rows(vocab).min(hidden.len() / width).max(1);
        let rank = self.adapter.map_or(0, Adapter::padded_rank);
        scratch.reserve(chunk, vocab, rank);
        let mut loss = 0.0;
        for (i, hidden) in hidden.chunks(chunk * width).enumerate() {
            let rows = hidden.len() / width;
            let logits = &mut scratch.logits[..rows * vocab];
            self.logits(hidden, gradients.is_some(), logits, &mut scratch.u);
            let mut any = false;
            for (row, logits) in logits.chunks_exact_mut(vocab).enumerate() {
                let row = i * chunk + row;
                if gradients.is_some() {
                    let cap = self.model.arch.logit_softcap;
                    if cap.is_some() {
                        scratch.capped.reserve(vocab);
                        scratch.capped[..vocab].copy_from_slice(logits);
                    }
                    any |= row_backward(sequence, row, logits, logprobs, &mut loss);
                    if let Some(cap) = cap {
                        elementwise::softcap_backward(&scratch.capped[..vocab], cap, logits);
                    }
                } else {
                    row_forward(sequence, row, logits, logprobs, &mut loss);
                }
            }
            if let Some(gradients) = &mut gradients {
                let d_hidden = &mut gradients.d_hidden[i * chunk * width..][..rows * width];
                if any {
                    let backward = Backward {
                        lora: self.adapter.and_then(Adapter::head),
                        x: hidden,
                        u: &scratch.u,
                        layers: &[(&self.model.head, &scratch.logits)],
                    };
                    backward.run(rows, Some(d_hidden), gradients.adapter, &mut scratch.du);
                } else {
                    d_hidden.fill(0.0);
                }
            }
        }
        loss
    }
}

fn row_forward(
    sequence: &TrainSequence,
    row: usize,
    logits: &[f32],
    logprobs: &mut Vec<f32>,
    loss: &mut f64,
) {
    let log_sum = elementwise::log_sum_exp(logits);
    for i in row * sequence.k..(row + 1) * sequence.k {
        let logprob = log_prob(logits[sequence.targets[i] as usize], log_sum);
        *loss += sequence.loss.term(i, logprob).0;
        logprobs.push(logprob);
    }
}

/// As [`row_forward`], and turns the logits into the gradient of the loss for them; returns whether
/// it is other than zero.
///
/// With `c_t = dL/dl_t`, that is `sum_t c_t onehot(t) - (sum_t c_t) softmax`.
fn row_backward(
    sequence: &TrainSequence,
    row: usize,
    logits: &mut [f32],
    logprobs: &mut Vec<f32>,
    loss: &mut f64,
) -> bool {
    let range = row * sequence.k..(row + 1) * sequence.k;
    let first = logprobs.len();
    logprobs.extend(
        sequence.targets[range.clone()]
            .iter()
            .map(|t| logits[*t as usize]),
    );
    let (log_sum, total) = elementwise::exp_and_log_sum(logits);
    let mut sum = 0.0;
    for (i, logprob) in range.clone().zip(&mut logprobs[first..]) {
        *logprob = log_prob(*logprob, log_sum);
        let (value, coefficient) = sequence.loss.term(i, *logprob);
        *loss += value;
        sum += coefficient;
    }
    elementwise::scale(-sum / total, logits);
    let mut any = sum != 0.0;
    for (i, logprob) in range.zip(&logprobs[first..]) {
        let coefficient = sequence.loss.term(i, *logprob).1;
        any |= coefficient != 0.0;
        logits[sequence.targets[i] as usize] += coefficient;
    }
    any
}
