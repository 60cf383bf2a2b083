//! How far the model has moved from a reference.

use tinker_types::Datum;

use super::{Reduction, ReferenceLogprobs, Regularizer, Result, normalized_rows, with_gradient_of};
use crate::custom_loss::tape::{Tape, Var};

/// Which distribution the expectation is taken under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KlDirection {
    /// `KL(model || reference)`: avoid what the reference would not say.
    #[default]
    ModelToReference,
    /// `KL(reference || model)`: keep everything that the reference would say.
    ReferenceToModel,
    /// The mean of both.
    Symmetric,
}

/// Kullback-Leibler divergence of the next token, per position.
///
/// With `[tokens, k]` targets it is that of the `k` listed tokens, whose probabilities are made to
/// add up to 1 on both sides. With one target per position, the targets count as samples of the
/// model, and each is an unbiased estimate of the value and of the gradient; with `d = reference -
/// model`:
///
/// | | value | gradient of |
/// |---|---|---|
/// | `ModelToReference` | `e^d - 1 - d` | `d^2 / 2` |
/// | `ReferenceToModel` | `e^d d - (e^d - 1)` | `e^d - 1 - d` |
///
/// The value is "k3" of Schulman, Approximating KL Divergence (2020); its own gradient is that of
/// the other direction, which is why it is not used.
#[derive(Debug, Clone)]
pub struct KlDivergence {
    /// What to stay near.
    pub reference: ReferenceLogprobs,
    /// Default: of the model to the reference.
    pub direction: KlDirection,
    /// Default: mean over positions.
    pub reduction: Reduction,
    /// A loss input of one weight per position.
    pub mask: Option<String>,
}

impl KlDivergence {
    /// From the model to a reference, averaged over positions.
    #[must_use]
    pub fn to(reference: ReferenceLogprobs) -> Self {
        Self {
            reference,
            direction: KlDirection::default(),
            reduction: Reduction::Mean,
            mask: None,
        }
    }
}

impl Regularizer for KlDivergence {
    fn penalty<'t>(&self, tape: &'t Tape, data: &[Datum], logprobs: &[Var<'t>]) -> Result<Var<'t>> {
        let references = self.reference.of(tape, data, logprobs)?;
        let pairs = logprobs.iter().zip(&references);
        let values: Vec<_> = pairs.map(|(l, r)| self.direction.of(*l, *r)).collect();
        let mask = self.mask.as_deref();
        self.reduction.reduce(tape, data, &values, mask)
    }
}

impl KlDirection {
    /// The divergence at each position.
    pub(super) fn of<'t>(self, model: Var<'t>, reference: Var<'t>) -> Var<'t> {
        if self == Self::Symmetric {
            let there = Self::ModelToReference.of(model, reference);
            let back = Self::ReferenceToModel.of(model, reference);
            return (there + back) * 0.5;
        }
        if model.shape().len() == 2 {
            let (p, q) = (normalized_rows(model), normalized_rows(reference));
            return match self {
                Self::ReferenceToModel => (q.exp() * (q - p)).sum_axis(1),
                _ => (p.exp() * (p - q)).sum_axis(1),
            };
        }
        let d = reference - model;
        let k3 = d.exp_m1() - d;
        match self {
            Self::ReferenceToModel => with_gradient_of(d.exp() * d - d.exp_m1(), k3),
            _ => with_gradient_of(k3, d.square() * 0.5),
        }
    }
}
