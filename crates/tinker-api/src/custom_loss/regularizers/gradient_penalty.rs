//! Gradients of a wanted size.

use std::fmt;
use std::sync::Arc;

use tinker_types::Datum;

use super::{ReferenceLogprobs, Regularizer, Result};
use crate::custom_loss::tape::{Tape, Var};

type Function = dyn for<'t> Fn(&'t Tape, &[Datum], &[Var<'t>]) -> Result<Var<'t>> + Send + Sync;

/// Where the gradient is taken.
#[derive(Debug, Clone)]
pub enum PenaltyPoint {
    /// At the model's log-probabilities.
    Model,
    /// Between them and a reference: `mix * model + (1 - mix) * reference`.
    Between {
        /// The other end.
        reference: ReferenceLogprobs,
        /// Part of the model, `0..=1`.
        mix: f64,
    },
}

/// `(|gradient of a function| - target_norm)^2` (Gulrajani et al. 2017, eq. 3), differentiated
/// through the gradient.
///
/// The norm is that of the gradients of all data together.
#[derive(Clone)]
pub struct GradientPenalty {
    function: Arc<Function>,
    /// Default: at the model's log-probabilities.
    pub at: PenaltyPoint,
    /// Default 1.
    pub target_norm: f64,
}

impl GradientPenalty {
    /// Of a function of the log-probabilities that returns a single number.
    pub fn of<F>(function: F) -> Self
    where
        F: for<'t> Fn(&'t Tape, &[Datum], &[Var<'t>]) -> Result<Var<'t>> + Send + Sync + 'static,
    {
        Self {
            function: Arc::new(function),
            at: PenaltyPoint::Model,
            target_norm: 1.0,
        }
    }

    fn points<'t>(
        &self,
        tape: &'t Tape,
        data: &[Datum],
        logprobs: &[Var<'t>],
    ) -> Result<Vec<Var<'t>>> {
        let PenaltyPoint::Between { reference, mix } = &self.at else {
            return Ok(logprobs.to_vec());
        };
        if !(0.0..=1.0).contains(mix) {
            return Err(format!("mix {mix}: it must be in 0..=1").into());
        }
        let references = reference.of(tape, data, logprobs)?;
        let pairs = logprobs.iter().zip(references);
        Ok(pairs.map(|(l, r)| *l * *mix + r * (1.0 - mix)).collect())
    }
}

impl Regularizer for GradientPenalty {
    fn penalty<'t>(&self, tape: &'t Tape, data: &[Datum], logprobs: &[Var<'t>]) -> Result<Var<'t>> {
        let points = self.points(tape, data, logprobs)?;
        let value = (self.function)(tape, data, &points)?;
        let gradients = tape.gradients(value, &points).into_iter().flatten();
        let gradients: Vec<_> = gradients.collect();
        if gradients.is_empty() && !tape.is_faulty() {
            return Err("the function does not depend on the log-probabilities".into());
        }
        let norm = tape.concat(gradients).norm();
        Ok((norm - self.target_norm).square())
    }
}

impl fmt::Debug for GradientPenalty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GradientPenalty")
            .field("at", &self.at)
            .field("target_norm", &self.target_norm)
            .finish_non_exhaustive()
    }
}
