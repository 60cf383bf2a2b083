//! Training and scoring of whole sequences: one worker takes one sequence through the model alone.
//!
//! There are no barriers between workers, and the activations of one sequence per worker are all
//! that is alive. Gradients of sequences are added in the order of the batch, whoever finishes first.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::block::{Activations, Angles, BackwardPass, Block, Deltas, Derived};
use super::buffer::Buffer;
use super::elementwise;
use super::head::{HeadGradients, HeadScratch, Pass};
use super::keeping::Keeping;
use super::linear::{Batch, Run};
use super::lora::Adapter;
use super::model::Model;
use super::pool::{Pool, SharedMut};
use crate::arch::Arch;
use crate::backend::SequenceOutput;
use crate::error::{Error, Result};
use crate::loss::TrainSequence;

/// What one worker needs for one sequence.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// Residual stream before each block and after the last; two by turns without a backward pass.
    xs: Vec<Buffer>,
    acts: Vec<Activations>,
    /// What blocks that share it have derived, in the place of their own while they are at work.
    derived: Derived,
    /// What the last backward pass left room for.
    keeping: Keeping,
    deltas: Deltas,
    head: HeadScratch,
    normed: Buffer,
    inverse: Buffer,
}

impl Workspace {
    pub(crate) fn new() -> Self {
        Self {
            xs: Vec::new(),
            acts: Vec::new(),
            derived: Derived::new(),
            keeping: Keeping::ALL,
            deltas: Deltas::new(),
            head: HeadScratch::new(),
            normed: Buffer::zeros(0),
            inverse: Buffer::zeros(0),
        }
    }

    /// Floats it holds for the rows of a sequence.
    pub(crate) fn len(&self) -> usize {
        let streams = self.xs.iter().map(|x| x.len());
        let acts = self.acts.iter().map(|a| a.len() + a.derived.len());
        streams.chain(acts).sum::<usize>() + self.derived.len()
    }

    /// Of these, the floats that a pass without gradient uses.
    pub(crate) fn len_forward(&self) -> usize {
        let streams = self.xs.iter().take(2).map(|x| x.len());
        let acts = self.acts.first().map_or(0, |a| a.len());
        let own = self.acts.first().map_or(0, |a| a.derived.len());
        streams.sum::<usize>() + acts + own.max(self.derived.len())
    }

    /// Changes what is kept for backward passes.
    fn keep(&mut self, keeping: Keeping) {
        if self.keeping != keeping {
            // What sets were large enough for is what others now need.
            self.acts.clear();
            self.derived = Derived::new();
            self.keeping = keeping;
        }
    }

    /// Whether blocks share what they derive.
    fn shares_derived(&self, trains: bool) -> bool {
        !trains || self.keeping.shares_derived
    }

    /// Makes room for `rows` rows; without a backward pass all blocks share one set of activations.
    fn reserve(&mut self, model: &Model, rows: usize, rank: usize, trains: bool) {
        let arch = &model.arch;
        let (sets, streams) = if trains {
            (self.keeping.sets(arch.n_layers), arch.n_layers + 1)
        } else {
            (1, 2)
        };
        while self.acts.len() < sets {
            self.acts.push(Activations::new());
        }
        while self.xs.len() < streams {
            self.xs.push(Buffer::zeros(0));
        }
        let n = rows * arch.hidden_size;
        let shares_derived = self.shares_derived(trains);
        for acts in &mut self.acts[..sets] {
            acts.reserve(arch, rows, rank);
            if !shares_derived {
                acts.derived.reserve(arch, rows);
            }
        }
        if shares_derived {
            self.derived.reserve(arch, rows);
        }
        self.xs[..streams].iter_mut().for_each(|x| x.reserve(n));
        if trains {
            self.deltas.reserve(arch, rows, rank);
        }
        self.normed.reserve(n);
        self.inverse.reserve(rows);
    }

    /// Runs one sequence; with `gradient` (flat, zero) also backward into it. The error is a message.
    fn run(
        &mut self,
        model: &Model,
        adapter: Option<&Adapter>,
        angles: &Angles,
        sequence: &TrainSequence,
        gradient: Option<&mut [f32]>,
    ) -> Result<SequenceOutput, String> {
        let rows = sequence.tokens.len();
        let rank = adapter.map_or(0, Adapter::padded_rank);
        let trains = gradient.is_some();
        self.reserve(model, rows, rank, trains);
        let run = [Run {
            rows: 0..rows,
            adapter,
        }];
        let batch = Batch {
            rows,
            runs: &run,
            rank,
            pool: None,
            trains,
        };
        self.forward(model, &batch, angles, &sequence.tokens);
        let n = rows * model.arch.hidden_size;
        let x = &self.xs[if trains { model.arch.n_layers } else { 0 }][..n];
        let (eps, inverse) = (model.arch.rms_eps, &mut self.inverse[..rows]);
        elementwise::rms_norm(x, &model.final_norm, eps, &mut self.normed, inverse);
        let pass = Pass {
            model,
            adapter,
            pool: None,
        };
        let mut logprobs = Vec::with_capacity(sequence.targets.len());
        let normed = &self.normed[..n];
        // A loss of the whole sequence needs all log-probabilities before any derivative: the head
        // runs for them first, then with the linear loss that has this derivative.
        let whole = if sequence.loss.is_per_target() {
            None
        } else {
            pass.run(sequence, normed, &mut self.head, &mut logprobs, None);
            Some(sequence.loss.evaluate(&logprobs)?)
        };
        let loss = match (gradient, adapter) {
            (Some(gradient), Some(adapter)) => {
                let d_hidden = &mut self.deltas.normed;
                let head = Some(HeadGradients {
                    d_hidden,
                    adapter: &mut *gradient,
                });
                let loss = match &whole {
                    None => pass.run(sequence, normed, &mut self.head, &mut logprobs, head),
                    Some(whole) => {
                        let linear = sequence.linear(&whole.gradient);
                        pass.run(&linear, normed, &mut self.head, &mut Vec::new(), head)
                    }
                };
                self.backward(model, &batch, adapter, angles, gradient);
                loss
            }
            _ if whole.is_some() => 0.0,
            _ => pass.run(sequence, normed, &mut self.head, &mut logprobs, None),
        };
        let loss = whole.map_or(loss, |whole| whole.total);
        Ok(SequenceOutput { logprobs, loss })
    }

    /// All blocks: from tokens to the residual stream after the last, in the last of `xs`, or in the
    /// first without a backward pass.
    fn forward(&mut self, model: &Model, batch: &Batch<'_>, angles: &Angles, tokens: &[u32]) {
        let shares_derived = self.shares_derived(batch.trains);
        model.embed(tokens, &mut self.xs[0]);
        for layer in 0..model.arch.n_layers {
            let block = Block::of(model, layer);
            let (set, i) = if batch.trains {
                (self.keeping.set(layer), layer)
            } else {
                (0, 0)
            };
            let (acts, (before, after)) = (&mut self.acts[set], self.xs.split_at_mut(i + 1));
            let (x, out) = (&mut before[i], &mut after[0]);
            if shares_derived {
                std::mem::swap(&mut acts.derived, &mut self.derived);
            }
            block.project(batch, x, angles, acts);
            block.attend_sequence(batch.rows, acts);
            block.finish(batch, x, out, acts);
            if shares_derived {
                std::mem::swap(&mut acts.derived, &mut self.derived);
            }
            if !batch.trains {
                std::mem::swap(x, out);
            }
        }
    }

    /// From the gradient of the final norm's output, in `deltas.normed`, to the adapter's.
    fn backward(
        &mut self,
        model: &Model,
        batch: &Batch<'_>,
        adapter: &Adapter,
        angles: &Angles,
        gradient: &mut [f32],
    ) {
        let rows = batch.rows;
        let (n, n_layers) = (rows * model.arch.hidden_size, model.arch.n_layers);
        let Deltas { x: dx, normed, .. } = &mut self.deltas;
        let (x, inverse) = (&self.xs[n_layers][..n], &self.inverse[..rows]);
        dx[..n].fill(0.0);
        elementwise::rms_norm_backward(x, &model.final_norm, inverse, &normed[..n], &mut dx[..n]);
        let deltas = &mut self.deltas;
        let mut pass = BackwardPass {
            rows,
            adapter,
            angles,
            deltas,
            gradient,
        };
        for layer in (0..n_layers).rev() {
            let (block, x) = (Block::of(model, layer), &self.xs[layer]);
            let acts = &mut self.acts[self.keeping.set(layer)];
            let shares_derived = self.keeping.shares_derived;
            if shares_derived {
                std::mem::swap(&mut acts.derived, &mut self.derived);
            }
            if layer < self.keeping.again {
                block.again(batch, x, angles, &mut pass.deltas.normed, acts);
            } else if shares_derived && layer + 1 < n_layers {
                block.derive(rows, x, acts);
            }
            block.backward(&mut pass, x, acts);
            if shares_derived {
                std::mem::swap(&mut acts.derived, &mut self.derived);
            }
        }
    }
}

/// A pass over a batch of sequences.
#[derive(Debug)]
pub(crate) struct Training<'a> {
    pub(crate) model: &'a Model,
    pub(crate) pool: &'a Pool,
    /// Of positions from 0 on, as many as the longest sequence has at least.
    pub(crate) angles: &'a Angles,
    pub(crate) sequences: &'a [TrainSequence],
}

/// Checks a batch against a model.
pub(crate) fn check(arch: &Arch, sequences: &[TrainSequence]) -> Result<()> {
    for (i, sequence) in sequences.iter().enumerate() {
        let outcome = sequence.check(arch.vocab_size, arch.max_context);
        outcome.map_err(|message| Error::Invalid(format!("sequence {i}: {message}")))?;
    }
    Ok(())
}

/// Rows of the longest of the sequences.
pub(crate) fn longest(sequences: &[TrainSequence]) -> usize {
    let rows = sequences.iter().map(|s| s.tokens.len());
    rows.max().unwrap_or(0)
}

impl Training<'_> {
    /// What fits `bytes` of each sequence: the same of all, as of the longest.
    pub(crate) fn keeping(&self, adapter: &Adapter, bytes: usize) -> Keeping {
        let rank = adapter.padded_rank();
        Keeping::within(bytes, &self.model.arch, longest(self.sequences), rank)
    }

    /// Log-probabilities and losses, in the order of the batch.
    pub(crate) fn forward(
        &self,
        adapter: Option<&Adapter>,
        workspaces: &mut [Workspace],
    ) -> Result<Vec<SequenceOutput>> {
        let outputs = Slots::new(self.sequences.len());
        self.each_sequence(workspaces, &|workspace, i| {
            let sequence = &self.sequences[i];
            outputs.set(
                i,
                workspace.run(self.model, adapter, self.angles, sequence, None),
            );
            true
        });
        outputs.into_results(|i, output| check_output(i, self.sequences[i].k, output))
    }

    /// As [`Training::forward`], and adds to `gradient`, which is left as it was on an error.
    pub(crate) fn forward_backward(
        &self,
        adapter: &Adapter,
        keeping: Keeping,
        workspaces: &mut [Workspace],
        gradient: &mut Buffer,
        spare: &mut Vec<Buffer>,
    ) -> Result<Vec<SequenceOutput>> {
        let outputs = Slots::new(self.sequences.len());
        let len = adapter.gradient_len();
        // Those of an adapter of another size would only be in the way.
        spare.retain(|buffer| buffer.len() == len);
        let mut total = spare.pop().unwrap_or_else(|| Buffer::zeros(len));
        if gradient.is_empty() {
            total.fill(0.0);
        } else {
            total.copy_from_slice(gradient);
        }
        let sum = OrderedSum::new(total, std::mem::take(spare), 2 * workspaces.len());
        self.each_sequence(workspaces, &|workspace, i| {
            let _guard = AbortOnUnwind(&sum);
            let Some(mut own) = sum.buffer(i) else {
                return false;
            };
            own.fill(0.0);
            workspace.keep(keeping);
            let sequence = &self.sequences[i];
            let output = workspace.run(
                self.model,
                Some(adapter),
                self.angles,
                sequence,
                Some(&mut own),
            );
            let outcome = check_output(i, sequence.k, output)
                .and_then(|output| check_gradient(i, &own).map(|()| output));
            let failed = outcome.is_err();
            outputs.set(i, outcome);
            sum.add(i, own);
            !failed
        });
        let total = sum.into_total(spare);
        let outputs = outputs.into_results(|_, output| output)?;
        adapter.check_gradient(&total)?;
        spare.push(std::mem::replace(gradient, total));
        Ok(outputs)
    }

    /// Hands out the sequences in order; `work` returns whether to go on.
    fn each_sequence(
        &self,
        workspaces: &mut [Workspace],
        work: &(dyn Fn(&mut Workspace, usize) -> bool + Sync),
    ) {
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let shared = SharedMut::new(workspaces);
        self.pool
            .run(workspaces.len().min(self.sequences.len()), &|worker| {
                // SAFETY: each task uses the workspace of its own number.
                let workspace = unsafe { &mut shared.slice(worker, 1)[0] };
                while !stop.load(Ordering::Acquire) {
                    let i = next.fetch_add(1, Ordering::AcqRel);
                    if i >= self.sequences.len() {
                        break;
                    }
                    if !work(workspace, i) {
                        stop.store(true, Ordering::Release);
                    }
                }
            });
    }
}

/// Refuses what is no result. No finite logits give a target the probability 0, so a log-probability of
/// minus infinity is none, not even where its weight is 0.
fn check_output(
    i: usize,
    k: usize,
    output: Result<SequenceOutput, String>,
) -> Result<SequenceOutput> {
    let output = output.map_err(|message| Error::Invalid(format!("sequence {i}: {message}")))?;
    if let Some(at) = output.logprobs.iter().position(|l| !l.is_finite()) {
        let (position, logprob) = (at / k.max(1), output.logprobs[at]);
        return Err(Error::NotFinite(format!(
            "sequence {i}: the log-probability at position {position} is {logprob}"
        )));
    }
    if output.loss.is_finite() {
        return Ok(output);
    }
    Err(Error::NotFinite(format!(
        "sequence {i}: the loss is {}",
        output.loss
    )))
}

fn check_gradient(i: usize, gradient: &[f32]) -> Result<()> {
    if elementwise::sum_of_squares(gradient).is_finite() {
        return Ok(());
    }
    Err(Error::NotFinite(format!(
        "sequence {i}: its gradient is not finite"
    )))
}

/// Results that workers leave by index.
struct Slots<T>(Mutex<Vec<Option<T>>>);

impl<T> Slots<T> {
    fn new(n: usize) -> Self {
        Self(Mutex::new((0..n).map(|_| None).collect()))
    }

    fn set(&self, i: usize, value: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[i] = Some(value);
    }

    /// The results in order, or the first error.
    fn into_results<U>(self, mut finish: impl FnMut(usize, T) -> Result<U>) -> Result<Vec<U>> {
        let slots = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let done = slots.into_iter().enumerate();
        done.filter_map(|(i, slot)| slot.map(|value| finish(i, value)))
            .collect()
    }
}

/// Adds the gradients of sequences in the order of their indices, whatever order they come in.
struct OrderedSum {
    state: Mutex<SumState>,
    changed: Condvar,
}

struct SumState {
    total: Buffer,
    /// Index of the sequence to add next.
    next: usize,
    waiting: BTreeMap<usize, Buffer>,
    free: Vec<Buffer>,
    /// Buffers that may still be made.
    allowance: usize,
    /// Whether a sequence will never be added.
    aborted: bool,
}

/// Aborts a sum if its thread panics, so that nobody waits for the sequence it was at.
struct AbortOnUnwind<'a>(&'a OrderedSum);

impl Drop for AbortOnUnwind<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().aborted = true;
            self.0.changed.notify_all();
        }
    }
}

impl OrderedSum {
    fn new(total: Buffer, free: Vec<Buffer>, n_buffers: usize) -> Self {
        let allowance = n_buffers.saturating_sub(free.len());
        let state = SumState {
            total,
            next: 0,
            waiting: BTreeMap::new(),
            free,
            allowance,
            aborted: false,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// A buffer for sequence `i`. Waits if too many are in use, except for the sequence that all
    /// others wait for, so that somebody always moves on. `None` once the sum is aborted.
    fn buffer(&self, i: usize) -> Option<Buffer> {
        let mut state = self.lock();
        loop {
            if state.aborted {
                return None;
            }
            if let Some(buffer) = state.free.pop() {
                return Some(buffer);
            }
            if state.allowance > 0 || i == state.next {
                state.allowance = state.allowance.saturating_sub(1);
                return Some(Buffer::zeros(state.total.len()));
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn add(&self, i: usize, gradient: Buffer) {
        let mut state = self.lock();
        state.waiting.insert(i, gradient);
        loop {
            let next = state.next;
            let Some(gradient) = state.waiting.remove(&next) else {
                break;
            };
            elementwise::add(&gradient, &mut state.total);
            state.next += 1;
            state.free.push(gradient);
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, SumState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sum; the buffers go to `spare`.
    fn into_total(self, spare: &mut Vec<Buffer>) -> Buffer {
        let state = self
            .state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        spare.extend(state.free);
        state.total
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::Path;

    use super::super::model::{Form, Units};
    use super::*;
    use crate::adapter::LoraSpec;
    use crate::backend::Precision;
    use crate::loss::Loss;
    use crate::optim::{AdamW, Optimizer};

    #[test]
    fn a_panic_in_one_sequence_ends_the_whole_batch() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let model = Model::load_as(
            &root.join("../../fixtures/numerics/llama"),
            Form::of_file(Units::best(Precision::F32)),
        )
        .unwrap();
        let spec = LoraSpec {
            rank: 2,
            seed: 1,
            train_attn: true,
            train_mlp: true,
            train_unembed: true,
        };
        let adapter = Adapter::new(&model.arch, &spec).unwrap();
        let sequence = |target| TrainSequence {
            tokens: vec![1; 20],
            targets: vec![target; 20],
            k: 1,
            loss: Loss::CrossEntropy {
                weights: vec![1.0; 20],
            },
        };
        // Without the check, a target outside the vocabulary panics.
        let targets = [9999, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
        let training = Training {
            model: &model,
            pool: &Pool::new(2),
            angles: &Angles::new(&model.arch, 0..20),
            sequences: &targets.map(sequence),
        };
        let mut workspaces = [Workspace::new(), Workspace::new()];
        let mut gradient = Buffer::zeros(0);

        let outcome = catch_unwind(AssertUnwindSafe(|| {
            training.forward_backward(
                &adapter,
                Keeping::ALL,
                &mut workspaces,
                &mut gradient,
                &mut Vec::new(),
            )
        }));

        assert!(outcome.is_err());
        assert!(gradient.is_empty());
    }

    /// Log-probabilities and gradient of two sequences with what `keeping` leaves of them.
    fn gradient(model: &Model, keeping: Keeping, workspaces: &mut [Workspace]) -> Vec<Vec<f32>> {
        let spec = LoraSpec {
            rank: 3,
            seed: 5,
            train_attn: true,
            train_mlp: true,
            train_unembed: true,
        };
        let mut adapter = Adapter::new(&model.arch, &spec).unwrap();
        // One step, so that `B` is not zero.
        let optimizer = Optimizer::AdamW(AdamW {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.0,
            grad_clip_norm: 0.0,
        });
        let pool = Pool::new(workspaces.len());
        let sequence = |n: usize| TrainSequence {
            tokens: (0..n as u32).map(|i| i * 7 % 50).collect(),
            targets: (0..n as u32).map(|i| i * 11 % 50).collect(),
            k: 1,
            loss: Loss::CrossEntropy {
                weights: vec![1.0; n],
            },
        };
        let training = Training {
            model,
            pool: &pool,
            angles: &Angles::new(&model.arch, 0..45),
            sequences: &[45, 20, 33].map(sequence),
        };
        let mut results = Vec::new();
        for _ in 0..2 {
            let (gradient, spare) = (&mut Buffer::zeros(0), &mut Vec::new());
            let outputs = training.forward_backward(&adapter, keeping, workspaces, gradient, spare);
            results.extend(outputs.unwrap().into_iter().map(|o| o.logprobs));
            results.push(gradient.to_vec());
            adapter.gradient = gradient.clone();
            adapter.optim_step(&optimizer, &pool, spare).unwrap();
        }
        results
    }

    #[test]
    fn what_is_computed_again_has_the_same_bits() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/numerics");
        let models = [
            "llama",
            "qwen2",
            "qwen3",
            "gemma2",
            "gemma3",
            "phi3",
            "smollm3",
            "qwen3_moe",
            "qwen3_moe_mixed",
        ];
        for (name, units) in models
            .iter()
            .flat_map(|name| [(name, Units::best(Precision::F32)), (name, Units::Vectors)])
        {
            let model = Model::load_as(&root.join(name), Form::of_file(units)).unwrap();
            let mut workspaces = [Workspace::new(), Workspace::new()];
            let wanted = gradient(&model, Keeping::ALL, &mut workspaces);
            for again in 0..model.arch.n_layers {
                for shares_derived in [false, true] {
                    let keeping = Keeping {
                        again,
                        shares_derived,
                    };
                    let found = gradient(&model, keeping, &mut workspaces);
                    assert!(found == wanted, "{name} {units:?} {keeping:?}");
                }
            }
        }
    }

    #[test]
    fn workspaces_hold_what_is_kept_and_no_more() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let dir = root.join("../../fixtures/numerics/gemma2");
        let model = Model::load_as(&dir, Form::of_file(Units::best(Precision::F32))).unwrap();
        let mut workspaces = [Workspace::new()];
        let floats = |workspace: &Workspace| -> usize {
            let sets = workspace.acts.iter().map(|a| a.len() + a.derived.len());
            sets.sum::<usize>() + workspace.derived.len()
        };
        let mut held = Vec::new();
        for (again, shares_derived) in [(0, false), (0, true), (1, true), (2, true), (0, false)] {
            let keeping = Keeping {
                again,
                shares_derived,
            };
            gradient(&model, keeping, &mut workspaces);
            assert_eq!(workspaces[0].acts.len(), 3 - again);
            held.push(floats(&workspaces[0]));
        }

        assert!(held[..4].is_sorted_by(|a, b| a > b), "{held:?}");
        assert_eq!(held[4], held[0]);
    }
}
