//! How undecided the model is.

use tinker_types::Datum;

use super::{Reduction, Regularizer, Result, normalized_rows};
use crate::custom_loss::tape::{Tape, Var};

/// Whether entropy is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EntropyGoal {
    /// Reward it: the penalty is the negative entropy.
    #[default]
    Maximize,
    /// Punish it: the penalty is the entropy.
    Minimize,
}

/// Entropy of the model's next token, per position.
///
/// With `[tokens, k]` targets it is that of the `k` listed tokens, whose probabilities are made to
/// add up to 1: `-sum q ln q`, `q = softmax(logprobs / temperature)`. With one target per position,
/// the targets count as samples of the model: each estimates the entropy as `-logprob`, with the
/// score-function gradient, which is right on average if the targets were sampled from these
/// weights (Williams 1992, REINFORCE).
#[derive(Debug, Clone, PartialEq)]
pub struct Entropy {
    /// Default: maximize.
    pub goal: EntropyGoal,
    /// Default: mean over positions.
    pub reduction: Reduction,
    /// Divide by `ln k`, so that an even choice has entropy 1. Needs `k` of 2 or more.
    pub normalize: bool,
    /// Divides log-probabilities; above 0. Default 1. Needs `k` of 2 or more.
    pub temperature: f64,
    /// A loss input of one weight per position.
    pub mask: Option<String>,
}

impl Default for Entropy {
    fn default() -> Self {
        Self {
            goal: EntropyGoal::Maximize,
            reduction: Reduction::Mean,
            normalize: false,
            temperature: 1.0,
            mask: None,
        }
    }
}

impl Entropy {
    fn of<'t>(&self, logprobs: Var<'t>) -> Result<Var<'t>> {
        let shape = logprobs.shape();
        match *shape {
            [_, k] if k > 1 => {
                let q = normalized_rows(logprobs / self.temperature);
                let entropy = -(q.exp() * q).sum_axis(1);
                Ok(match self.normalize {
                    true => entropy / (k as f64).ln(),
                    false => entropy,
                })
            }
            [_] if !self.normalize && self.temperature == 1.0 => {
                // d/dθ E[-l] = E[-l dl/dθ], as E[dl/dθ] = 0.
                Ok(super::with_gradient_of(-logprobs, logprobs.square() * -0.5))
            }
            _ => Err(format!(
                "entropy of log-probabilities of shape {shape:?} with temperature {} and \
                 normalize {}: temperature and normalize need [tokens, k] with k of 2 or more",
                self.temperature, self.normalize
            )
            .into()),
        }
    }
}

impl Regularizer for Entropy {
    fn penalty<'t>(&self, tape: &'t Tape, data: &[Datum], logprobs: &[Var<'t>]) -> Result<Var<'t>> {
        let temperature = self.temperature;
        if !(temperature.is_finite() && temperature > 0.0) {
            return Err(format!("temperature {temperature}: it must be above 0").into());
        }
        let entropies: Vec<_> = logprobs
            .iter()
            .map(|l| self.of(*l))
            .collect::<Result<_>>()?;
        let mask = self.mask.as_deref();
        let entropy = self.reduction.reduce(tape, data, &entropies, mask)?;
        Ok(match self.goal {
            EntropyGoal::Maximize => -entropy,
            EntropyGoal::Minimize => entropy,
        })
    }
}
