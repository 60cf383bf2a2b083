//! Training and scoring of whole sequences, one after the other.
//!
//! The sizes of every product depend on the own sequence alone, and gradients are added in the order
//! of the batch: so neither depends on batch mates.

use std::sync::Arc;

use super::adapter::Adapter;
use super::block::{Activations, BackwardPass, Block, Deltas};
use super::call::Call;
use super::device::Device;
use super::head::{HeadGradients, HeadScratch, Pass};
use super::linear::{Batch, Run};
use super::memory::{Buffer, Carver, Floats, Table};
use super::model::Model;
use super::ops::Ops;
use super::tiles::{Rows, Tiles};
use crate::arch::Arch;
use crate::backend::SequenceOutput;
use crate::error::{Error, Result};
use crate::loss::TrainSequence;

/// Memory that a pass over a sequence needs, kept between calls.
#[derive(Debug)]
pub(super) struct Workspace {
    /// What a backward pass reads of the blocks, all of it counted by the budget.
    kept: Buffer,
    /// What else there is for each row.
    passing: Buffer,
    head: HeadScratch,
    call: Table,
    gradient: Buffer,
}

/// What lies where in the workspace, for one sequence.
#[derive(Debug)]
struct Room {
    /// Residual stream before each block and after the last; two by turns without a backward pass.
    xs: Vec<Floats>,
    /// Sets of activations: of the last blocks, and before them one that the others share.
    acts: Vec<Activations>,
    /// Without room where there is no backward pass.
    deltas: Deltas,
    normed: Floats,
    inverse: Floats,
}

/// A pass over a batch of sequences.
#[derive(Debug)]
pub(super) struct Training<'a> {
    pub(super) model: &'a Model,
    pub(super) ops: &'a mut Ops,
    pub(super) workspace: &'a mut Workspace,
    /// Rows of a tile of attention.
    pub(super) tile: usize,
    /// Bytes for activations that a backward pass reads.
    pub(super) memory: usize,
}

impl Workspace {
    pub(super) fn new(device: &Arc<dyn Device>) -> Self {
        Self {
            kept: Buffer::empty(device),
            passing: Buffer::empty(device),
            head: HeadScratch::new(device),
            call: Table::empty(device),
            gradient: Buffer::empty(device),
        }
    }

    /// Makes room for a sequence. With a backward pass, as many sets of activations are kept as `memory`
    /// bytes have room for beside the inputs of all blocks, but one at least.
    fn reserve(
        &mut self,
        arch: &Arch,
        (rows, rank): (usize, usize),
        trains: bool,
        memory: usize,
    ) -> Result<Room> {
        let n = rows * arch.hidden_size;
        let streams = |carver: &mut Carver| -> Vec<Floats> {
            let streams = if trains { arch.n_layers + 1 } else { 2 };
            (0..streams).map(|_| carver.take(n)).collect()
        };
        let passing = |carver: &mut Carver| {
            let (normed, inverse) = (carver.take(n), carver.take(rows));
            let rows = if trains { rows } else { 0 };
            (Deltas::carve(carver, arch, rows, rank), normed, inverse)
        };
        let sets = {
            let [mut inputs, mut set] = [Carver::counting(), Carver::counting()];
            streams(&mut inputs);
            Activations::carve(&mut set, arch, rows, rank);
            let most = if trains { arch.n_layers } else { 1 };
            let left = (memory / size_of::<f32>()).saturating_sub(inputs.taken());
            let sets = (left / set.taken().max(1)).clamp(1, most);
            self.kept.reserve(inputs.taken() + sets * set.taken())?;
            sets
        };
        let mut counting = Carver::counting();
        passing(&mut counting);
        self.passing.reserve(counting.taken())?;
        let mut kept = self.kept.floats().carve();
        let (deltas, normed, inverse) = passing(&mut self.passing.floats().carve());
        Ok(Room {
            xs: streams(&mut kept),
            acts: (0..sets)
                .map(|_| Activations::carve(&mut kept, arch, rows, rank))
                .collect(),
            deltas,
            normed,
            inverse,
        })
    }
}

impl Room {
    /// Where the activations of a block are.
    fn acts_of(&self, layer: usize, n_layers: usize) -> &Activations {
        &self.acts[layer.saturating_sub(n_layers - self.acts.len())]
    }
}

impl Training<'_> {
    /// Log-probabilities and losses, in the order of the batch.
    pub(super) fn forward(
        &mut self,
        adapter: Option<&Adapter>,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        self.check(sequences)?;
        let outputs = sequences.iter().enumerate();
        outputs
            .map(|(i, sequence)| self.run(i, adapter, sequence, None))
            .collect()
    }

    /// As [`Training::forward`], and returns the sum of `before` and the gradients of all.
    pub(super) fn forward_backward(
        &mut self,
        adapter: &Adapter,
        sequences: &[TrainSequence],
    ) -> Result<(Vec<SequenceOutput>, Buffer)> {
        self.check(sequences)?;
        let len = adapter.gradient_len();
        let device = Arc::clone(&self.ops.device);
        let total = match &adapter.gradient {
            Some(gradient) => gradient.copied()?,
            None => Buffer::zeros(&device, len)?,
        };
        self.workspace.gradient.reserve(len)?;
        let own = self.workspace.gradient.floats().range(0, len);
        let mut outputs = Vec::with_capacity(sequences.len());
        for (i, sequence) in sequences.iter().enumerate() {
            own.clear(&device)?;
            outputs.push(self.run(i, Some(adapter), sequence, Some(own))?);
            if !self.ops.sum_of_squares(len, own)?.is_finite() {
                return Err(Error::NotFinite(format!(
                    "sequence {i}: its gradient is not finite"
                )));
            }
            self.ops.add(len, own, total.floats())?;
        }
        if !self.ops.sum_of_squares(len, total.floats())?.is_finite() {
            adapter.check_gradient(&self.model.arch, &total)?;
        }
        Ok((outputs, total))
    }

    /// Checks the batch against the model.
    fn check(&self, sequences: &[TrainSequence]) -> Result<()> {
        let arch = &self.model.arch;
        for (i, sequence) in sequences.iter().enumerate() {
            let outcome = sequence.check(arch.vocab_size, arch.max_context);
            outcome.map_err(|message| Error::Invalid(format!("sequence {i}: {message}")))?;
        }
        Ok(())
    }

    /// Runs one sequence; with `gradient` (flat, zero) also backward into it.
    fn run(
        &mut self,
        i: usize,
        adapter: Option<&Adapter>,
        sequence: &TrainSequence,
        gradient: Option<Floats>,
    ) -> Result<SequenceOutput> {
        let (arch, rows) = (&self.model.arch, sequence.tokens.len());
        let rank = adapter.map_or(0, Adapter::padded_rank);
        let trains = gradient.is_some();
        let sizes = (rows, rank);
        let room = self.workspace.reserve(arch, sizes, trains, self.memory)?;
        let run = [Run {
            rows: 0..rows,
            adapter,
        }];
        let batch = Batch {
            rows,
            runs: &run,
            rank,
            trains,
        };
        let itself = self.whole(&sequence.tokens)?;
        let x = self.blocks(&batch, &room, &itself)?;
        let norm = self.model.final_norm.floats();
        let sizes = (rows, arch.rms_eps);
        self.ops
            .rms_norm(sizes, x, norm, room.normed, room.inverse)?;
        let mut logprobs = Vec::with_capacity(sequence.targets.len());
        let head = (adapter, trains, room.normed);
        let of_sequence = |message| Error::Invalid(format!("sequence {i}: {message}"));
        // A loss of the whole sequence needs all log-probabilities before any derivative: the head
        // runs for them first, then with the linear loss that has this derivative.
        let whole = if sequence.loss.is_per_target() {
            None
        } else {
            self.head(head, sequence, &mut logprobs, None)?;
            Some(sequence.loss.evaluate(&logprobs).map_err(of_sequence)?)
        };
        let d_hidden = room.deltas.normed;
        let into = gradient.map(|adapter| HeadGradients { d_hidden, adapter });
        let loss = match &whole {
            None => self.head(head, sequence, &mut logprobs, into)?,
            Some(_) if !trains => 0.0,
            Some(whole) => {
                let linear = sequence.linear(&whole.gradient);
                self.head(head, &linear, &mut Vec::new(), into)?
            }
        };
        let output = SequenceOutput {
            logprobs,
            loss: whole.map_or(loss, |whole| whole.total),
        };
        check_output(i, sequence.k, &output)?;
        if let (Some(gradient), Some(adapter)) = (gradient, adapter) {
            self.backward(&batch, adapter, gradient, (&room, &itself))?;
        }
        Ok(output)
    }

    /// Uploads what every block needs to know of a sequence.
    fn whole(&mut self, tokens: &[u32]) -> Result<Whole> {
        let n = tokens.len();
        let rows = Rows {
            keys: 0,
            values: 0,
            stride: 0,
            n,
            before: 0,
        };
        let tiles = Tiles::of(std::iter::once(rows), &self.model.heads(0), self.tile);
        let (table, arch) = (&mut self.workspace.call, &self.model.arch);
        let call = Call::upload(table, arch, tokens, 0..n, (&[], &tiles))?;
        Ok(Whole { tiles, call })
    }

    fn head(
        &mut self,
        (adapter, trains, hidden): (Option<&Adapter>, bool, Floats),
        sequence: &TrainSequence,
        logprobs: &mut Vec<f32>,
        gradients: Option<HeadGradients>,
    ) -> Result<f64> {
        let pass = Pass {
            model: self.model,
            adapter,
            trains,
        };
        let scratch = &mut self.workspace.head;
        pass.run(self.ops, sequence, hidden, scratch, logprobs, gradients)
    }

    /// All blocks: from tokens to the residual stream after the last, which is returned.
    fn blocks(&mut self, batch: &Batch<'_>, room: &Room, whole: &Whole) -> Result<Floats> {
        let arch = &self.model.arch;
        let tokens = (whole.call.tokens, batch.rows);
        let table = self.model.embedding();
        self.ops
            .embed(table, tokens, arch.embedding_scale, room.xs[0])?;
        let stream = |layer: usize| room.xs[if batch.trains { layer } else { layer % 2 }];
        for layer in 0..arch.n_layers {
            let (x, out) = (stream(layer), stream(layer + 1));
            let acts = room.acts_of(layer, arch.n_layers);
            let block = Block::of(self.model, layer);
            block.project(self.ops, batch, x, acts)?;
            block.turn(self.ops, batch.rows, &whole.call.angles, acts)?;
            whole.attend(self.ops, &block, batch.rows, acts)?;
            block.finish(self.ops, batch, x, out, acts)?;
        }
        Ok(stream(arch.n_layers))
    }

    /// From the gradient of the final norm's output, in `deltas.normed`, to the adapter's.
    fn backward(
        &mut self,
        batch: &Batch<'_>,
        adapter: &Adapter,
        gradient: Floats,
        (room, whole): (&Room, &Whole),
    ) -> Result<()> {
        let (rows, n_layers) = (batch.rows, self.model.arch.n_layers);
        let deltas = &room.deltas;
        self.ops.rms_norm_backward(
            (rows, false),
            room.xs[n_layers],
            self.model.final_norm.floats(),
            room.inverse,
            deltas.normed,
            deltas.x,
        )?;
        let pass = BackwardPass {
            rows,
            adapter,
            angles: &whole.call.angles,
            deltas,
            gradient,
            tile: self.tile,
        };
        // Blocks below this one share its activations.
        let shared = n_layers - room.acts.len();
        for layer in (0..n_layers).rev() {
            let (block, x) = (Block::of(self.model, layer), room.xs[layer]);
            let acts = room.acts_of(layer, n_layers);
            if layer < shared {
                block.project(self.ops, batch, x, acts)?;
                block.turn(self.ops, rows, &whole.call.angles, acts)?;
                whole.attend(self.ops, &block, rows, acts)?;
                block.finish(self.ops, batch, x, deltas.normed, acts)?;
            }
            block.backward(self.ops, &pass, x, acts)?;
        }
        Ok(())
    }
}

/// A whole sequence, as its blocks need to know it.
#[derive(Debug)]
struct Whole {
    tiles: Tiles,
    call: Call,
}

impl Whole {
    /// Attention of the sequence to itself.
    fn attend(
        &self,
        ops: &mut Ops,
        block: &Block<'_>,
        rows: usize,
        acts: &Activations,
    ) -> Result<()> {
        let bases = [acts.k, acts.v].map(Floats::address);
        let floats = [acts.q, acts.attended, acts.logs];
        let tiles = (&self.tiles, self.call.tiles);
        ops.attention(&block.heads, floats, tiles, bases, (0, rows))
    }
}

/// Refuses what is no result, as the CPU does.
fn check_output(i: usize, k: usize, output: &SequenceOutput) -> Result<()> {
    if let Some(at) = output.logprobs.iter().position(|l| !l.is_finite()) {
        let (position, logprob) = (at / k.max(1), output.logprobs[at]);
        return Err(Error::NotFinite(format!(
            "sequence {i}: the log-probability at position {position} is {logprob}"
        )));
    }
    if output.loss.is_finite() {
        return Ok(());
    }
    let loss = output.loss;
    Err(Error::NotFinite(format!(
        "sequence {i}: the loss is {loss}"
    )))
}
