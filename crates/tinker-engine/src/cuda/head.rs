//! The output head, fused with the loss and computed some rows at a time.
//!
//! The device finds log-probabilities and turns logits into gradients; the loss itself, a function of
//! log-probabilities alone, is evaluated on the host between the two.

use std::sync::Arc;

use super::adapter::{Adapter, Site};
use super::device::Device;
use super::linear::{Backward, Batch, Run};
use super::memory::{Buffer, Floats, Table};
use super::model::Model;
use super::ops::Ops;
use crate::error::Result;
use crate::loss::{TrainSequence, log_prob};

/// Floats that the logits of a chunk may take, as long as a chunk has a few rows.
const LOGITS: usize = 1 << 25;
const MIN_ROWS: usize = 64;
const MAX_ROWS: usize = 1024;

/// Rows of a chunk.
pub(super) fn chunk_rows(vocab: usize) -> usize {
    (LOGITS / vocab).clamp(MIN_ROWS, MAX_ROWS)
}

/// Logits and scratch of one chunk.
#[derive(Debug)]
pub(super) struct HeadScratch {
    pub(super) logits: Buffer,
    u: Buffer,
    du: Buffer,
    log_sum: Buffer,
    chosen: Buffer,
    targets: Table,
    coefficients: Table,
}

impl HeadScratch {
    pub(super) fn new(device: &Arc<dyn Device>) -> Self {
        let none = || Buffer::empty(device);
        Self {
            logits: none(),
            u: none(),
            du: none(),
            log_sum: none(),
            chosen: none(),
            targets: Table::empty(device),
            coefficients: Table::empty(device),
        }
    }

    /// Writes the logits of `hidden [rows, hidden]` to `self.logits`.
    pub(super) fn compute(
        &mut self,
        ops: &mut Ops,
        model: &Model,
        batch: &Batch<'_>,
        hidden: Floats,
    ) -> Result<()> {
        let (rows, vocab) = (batch.rows, model.arch.vocab_size);
        self.logits.reserve(rows * vocab)?;
        self.u.reserve(rows * batch.rank)?;
        let logits = self.logits.floats();
        let outputs = [(&model.head, logits)];
        batch.forward(ops, Site::Head, (hidden, self.u.floats(), None), &outputs)?;
        match model.arch.logit_softcap {
            Some(cap) => ops.softcap(cap, rows * vocab, logits),
            None => Ok(()),
        }
    }

    /// Log-probabilities of `targets [rows * k]` by the logits that were computed last.
    pub(super) fn score(
        &mut self,
        ops: &Ops,
        (rows, vocab, k): (usize, usize, usize),
        targets: &[u32],
    ) -> Result<Vec<f32>> {
        self.log_sum.reserve(rows)?;
        self.chosen.reserve(rows * k)?;
        let at = self.targets.set(targets)?;
        let (log_sum, chosen) = (self.log_sum.floats(), self.chosen.floats());
        ops.head_scores((rows, vocab, k), self.logits.floats(), at, log_sum, chosen)?;
        let chosen = chosen.range(0, rows * k).to_host(&ops.device)?;
        let log_sum = log_sum.range(0, rows).to_host(&ops.device)?;
        let of = |(i, logit): (usize, &f32)| log_prob(*logit, log_sum[i / k]);
        Ok(chosen.iter().enumerate().map(of).collect())
    }
}

/// Where the head's backward pass writes: the gradient of its input and of the adapter.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadGradients {
    /// `[rows, hidden]`.
    pub(super) d_hidden: Floats,
    pub(super) adapter: Floats,
}

/// What the head does with a sequence.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    pub(super) model: &'a Model,
    pub(super) adapter: Option<&'a Adapter>,
    /// Whether a backward pass follows.
    pub(super) trains: bool,
}

impl Pass<'_> {
    /// Computes the log-probability of each target, appended to `logprobs`, and returns the loss.
    ///
    /// `hidden` is `[rows, hidden]`. With `gradients`, goes back through the head as well.
    pub(super) fn run(
        &self,
        ops: &mut Ops,
        sequence: &TrainSequence,
        hidden: Floats,
        scratch: &mut HeadScratch,
        logprobs: &mut Vec<f32>,
        gradients: Option<HeadGradients>,
    ) -> Result<f64> {
        let (width, vocab) = (self.model.arch.hidden_size, self.model.arch.vocab_size);
        let (n_rows, k) = (sequence.tokens.len(), sequence.k);
        let chunk = chunk_rows(vocab);
        let mut loss = 0.0;
        for start in (0..n_rows).step_by(chunk) {
            let rows = chunk.min(n_rows - start);
            let run = [Run {
                rows: 0..rows,
                adapter: self.adapter,
            }];
            let batch = Batch {
                rows,
                runs: &run,
                rank: self.adapter.map_or(0, Adapter::padded_rank),
                trains: self.trains,
            };
            let hidden = hidden.range(start * width, rows * width);
            scratch.compute(ops, self.model, &batch, hidden)?;
            let targets = &sequence.targets[start * k..(start + rows) * k];
            let scores = scratch.score(ops, (rows, vocab, k), targets)?;
            let mut coefficients = Vec::with_capacity(scores.len());
            for (i, logprob) in (start * k..).zip(&scores) {
                let (value, coefficient) = sequence.loss.term(i, *logprob);
                loss += value;
                coefficients.push(coefficient);
            }
            logprobs.extend(scores);
            if let Some(gradients) = gradients {
                let into = HeadGradients {
                    d_hidden: gradients.d_hidden.range(start * width, rows * width),
                    ..gradients
                };
                self.backward(ops, &batch, (hidden, k), scratch, &coefficients, into)?;
            }
        }
        Ok(loss)
    }

    /// Goes back through the head for the chunk that was scored last.
    fn backward(
        &self,
        ops: &mut Ops,
        batch: &Batch<'_>,
        (hidden, k): (Floats, usize),
        scratch: &mut HeadScratch,
        coefficients: &[f32],
        into: HeadGradients,
    ) -> Result<()> {
        if coefficients.iter().all(|c| *c == 0.0) {
            return into.d_hidden.clear(&ops.device);
        }
        let (rows, arch) = (batch.rows, &self.model.arch);
        scratch.du.reserve(rows * batch.rank)?;
        let tables = (
            scratch.targets.address(),
            scratch.coefficients.set(coefficients)?,
        );
        let (logits, log_sum) = (scratch.logits.floats(), scratch.log_sum.floats());
        let sizes = (rows, arch.vocab_size, k);
        ops.head_gradient(sizes, logits, tables, log_sum, arch.logit_softcap)?;
        let backward = Backward {
            lora: self.adapter.and_then(|adapter| adapter.lora(Site::Head)),
            x: hidden,
            u: scratch.u.floats(),
            layers: &[(&self.model.head, logits)],
        };
        let (du, d_hidden) = (scratch.du.floats(), Some(into.d_hidden));
        backward.run(ops, rows, d_hidden, into.adapter, du)
    }
}
