//! Losses that clients upload as traced graphs: kept by session, checked, computed and differentiated.
//!
//! A graph is data. It is rebuilt from a list of operations (`ops`) and computed in double precision on
//! a tape; nothing of it is executed as code.

mod args;
mod ops;
mod program;
mod store;
mod tape;
#[cfg(test)]
mod tests;
mod value;

use std::sync::Arc;

use tinker_engine::{Computed, Evaluation, Loss, SequenceLoss};

pub(crate) use program::{Input, Program};
pub(crate) use store::{CustomLosses, loss_id};

/// A loss with the inputs of one datum.
#[derive(Debug)]
struct OfDatum {
    program: Arc<Program>,
    /// That of the targets.
    shape: Vec<usize>,
    inputs: Vec<Input>,
}

impl SequenceLoss for OfDatum {
    fn evaluate(&self, logprobs: &[f32]) -> Result<Evaluation, String> {
        self.program.evaluate(logprobs, &self.shape, &self.inputs)
    }
}

/// The engine's loss of a datum whose targets have this shape.
pub(crate) fn loss_of(program: &Arc<Program>, shape: &[usize], inputs: Vec<Input>) -> Loss {
    Loss::Computed(Computed(Arc::new(OfDatum {
        program: Arc::clone(program),
        shape: shape.to_vec(),
        inputs,
    })))
}
