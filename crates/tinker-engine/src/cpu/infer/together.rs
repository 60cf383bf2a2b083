//! A few rows through all blocks as one chain of steps, with the bits of [`Block::project`] and
//! [`Block::finish`].

use super::attend::{Attention, History};
use crate::cpu::block::{Activations, Angles, Block};
use crate::cpu::elementwise;
use crate::cpu::linear::{Batch, Forward, Layers, Output, Site};
use crate::cpu::model::{Mlp, Model};
use crate::cpu::steps::{Chain, Step};

/// What comes next.
#[derive(Debug, Clone, Copy)]
enum Stage {
    /// The attention norm, queries, keys and values of block `layer`.
    Project,
    /// Attention.
    Attend,
    /// The output projection of attention.
    Output,
    /// The MLP's norm, its gate and up projections.
    GateUp,
    /// The down projection.
    Down,
    /// The end of the block, and of the last one the final norm and the head.
    Add,
    /// The end of the head.
    Cap,
}

/// Rows on their way.
pub(super) struct Rows<'a> {
    pub(super) model: &'a Model,
    pub(super) batch: &'a Batch<'a>,
    pub(super) angles: &'a Angles,
    pub(super) histories: Vec<History<'a>>,
    pub(super) acts: &'a mut Activations,
    /// Residual stream before and after a block.
    pub(super) x: [&'a mut [f32]; 2],
    /// Output of the final norm.
    pub(super) normed: &'a mut [f32],
    pub(super) inverse: &'a mut [f32],
    /// Scratch and logits of the head, `[rows, vocab]`, if they are wanted.
    pub(super) head: Option<(&'a mut [f32], &'a mut [f32])>,
}

/// [`Rows`] and where they are.
pub(super) struct Together<'a> {
    rows: Rows<'a>,
    layer: usize,
    stage: Stage,
}

/// What the threads share.
#[expect(
    clippy::large_enum_variant,
    reason = "one lives at a time, and a box would be an allocation in each step"
)]
pub(super) enum Shared<'a> {
    Layers(Layers<'a>),
    Attention(Attention<'a>),
}

impl Step for Shared<'_> {
    unsafe fn run(&self, part: usize, parts: usize) {
        // SAFETY: passed on to the caller.
        unsafe {
            match self {
                Self::Layers(layers) => layers.run(part, parts),
                Self::Attention(attention) => attention.run(part, parts),
            }
        }
    }
}

impl Shared<'_> {
    fn is_worth_sharing(&self) -> bool {
        match self {
            Self::Layers(layers) => layers.is_worth_sharing(),
            Self::Attention(attention) => attention.is_worth_sharing(),
        }
    }
}

impl<'a> Together<'a> {
    /// Whether a model's blocks can be taken so.
    pub(super) fn can(model: &Model) -> bool {
        model.arch.moe.is_none()
    }

    pub(super) fn new(rows: Rows<'a>) -> Self {
        Self {
            rows,
            layer: 0,
            stage: Stage::Project,
        }
    }
}

impl<'a> Chain for Together<'a> {
    type Step = Shared<'a>;

    fn next(&mut self) -> Option<Shared<'a>> {
        loop {
            let step = self.step()?;
            if step.is_worth_sharing() {
                // SAFETY: the step borrows from this chain, which outlives it and is not touched before
                // the step is dropped, as `Chain::next` says.
                return Some(unsafe { std::mem::transmute::<Shared<'_>, Shared<'a>>(step) });
            }
            // SAFETY: it is the only part.
            unsafe { step.run(0, 1) };
        }
    }
}

impl Together<'_> {
    /// Finishes what lies before the next step, and prepares that.
    fn step(&mut self) -> Option<Shared<'_>> {
        let Rows {
            model,
            batch,
            angles,
            histories,
            acts,
            x: [x, next],
            normed,
            inverse,
            head,
        } = &mut self.rows;
        let (model, batch, n) = (*model, *batch, batch.rows);
        if matches!(self.stage, Stage::Cap) {
            let (_, logits) = head.as_mut()?;
            model.cap_logits(logits);
            return None;
        }
        if matches!(self.stage, Stage::Add) {
            Block::of(model, self.layer).add_mlp(n, next, acts);
            std::mem::swap(x, next);
            self.layer += 1;
            if self.layer == model.arch.n_layers {
                self.stage = Stage::Cap;
                let x = &x[..n * model.arch.hidden_size];
                elementwise::rms_norm(x, &model.final_norm, model.arch.rms_eps, normed, inverse);
                let (u, logits) = head.as_mut()?;
                return Some(Shared::Layers(of_head(model, batch, normed, u, logits)));
            }
            self.stage = Stage::Project;
        }
        let block = Block::of(model, self.layer);
        let Mlp::Dense(gated) = &block.layer.mlp else {
            return None;
        };
        let (stage, step) = match self.stage {
            Stage::Project => {
                block.norm_attention(n, x, acts);
                let (of, outputs) = block.qkv(n, acts);
                (Stage::Attend, Layers::new(batch, of, outputs))
            }
            Stage::Attend => {
                block.turn_heads(n, angles, acts);
                self.stage = Stage::Output;
                let attention = Attention::new(&model.arch, self.layer, histories, acts);
                return Some(Shared::Attention(attention));
            }
            Stage::Output => {
                let (of, output) = block.o(n, acts);
                (Stage::GateUp, Layers::new(batch, of, [output]))
            }
            Stage::GateUp => {
                block.add_attention(n, x, acts);
                block.norm_mlp(n, acts);
                let (of, outputs) = block.gate_and_up(n, gated, acts);
                (Stage::Down, Layers::new(batch, of, outputs))
            }
            Stage::Down => {
                block.activate(n * model.arch.intermediate_size, acts);
                let output = Output {
                    linear: &gated.down,
                    y: &mut next[..n * model.arch.hidden_size],
                };
                (Stage::Add, Layers::new(batch, block.down(acts), [output]))
            }
            Stage::Add | Stage::Cap => return None,
        };
        self.stage = stage;
        Some(Shared::Layers(step))
    }
}

/// The head on the output of the final norm.
fn of_head<'f>(
    model: &'f Model,
    batch: &'f Batch<'f>,
    normed: &'f [f32],
    u: &'f mut [f32],
    logits: &'f mut [f32],
) -> Layers<'f> {
    let width = model.arch.hidden_size;
    let of = Forward {
        site: Site::Head,
        x: &normed[..batch.rows * width],
        width,
        u,
    };
    let output = Output {
        linear: &model.head,
        y: logits,
    };
    Layers::new(batch, of, [output])
}
