//! Training sequences and the losses over their log-probabilities.

mod checks;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

/// The loss of a sequence, with its per-target inputs.
///
/// Every loss is a sum over targets. `l` is the log-probability of a target under the adapter,
/// `q` the one supplied, `A` the advantage, `r = exp(l - q)`.
#[derive(Debug, Clone, PartialEq)]
pub enum Loss {
    /// `-sum w l`; `weights` is `[tokens * k]`.
    CrossEntropy {
        /// Weight of each target.
        weights: Vec<f32>,
    },
    /// `-sum r A`.
    ImportanceSampling {
        /// `q`, `[tokens]`.
        logprobs: Vec<f32>,
        /// `A`, `[tokens]`.
        advantages: Vec<f32>,
    },
    /// `-sum min(r A, clip(r, low, high) A)` (Schulman et al. 2017, eq. 7).
    Ppo {
        /// `q`, `[tokens]`.
        logprobs: Vec<f32>,
        /// `A`, `[tokens]`.
        advantages: Vec<f32>,
        /// Bounds of the ratio.
        clip: Clip,
    },
    /// `-sum stop_gradient(clip(r, low, high)) l A` (Chen et al. 2025).
    Cispo {
        /// `q`, `[tokens]`.
        logprobs: Vec<f32>,
        /// `A`, `[tokens]`.
        advantages: Vec<f32>,
        /// Bounds of the ratio.
        clip: Clip,
    },
    /// `-sum (l A - beta/2 (l - q)^2)` (Richemond et al. 2024).
    Dro {
        /// `q`, `[tokens]`.
        logprobs: Vec<f32>,
        /// `A`, `[tokens]`.
        advantages: Vec<f32>,
        /// Strength of the quadratic penalty.
        beta: f32,
    },
    /// As PPO, with the ratio of the sequence in the place of each target's: `s = exp(mean (l - q))`
    /// over the targets in the ratio, of which each target has the value and `s dl` as differential
    /// (GSPO-token, Zheng et al. 2025, eq. 13 and 14).
    Gspo {
        /// `q`, `[tokens]`.
        logprobs: Vec<f32>,
        /// `A`, `[tokens]`.
        advantages: Vec<f32>,
        /// Which targets the mean is over, `[tokens]`; at least one.
        in_ratio: Vec<bool>,
        /// Bounds of the ratio.
        clip: Clip,
    },
    /// Whatever a function says.
    Computed(Computed),
}

/// Bounds of a ratio: at every target `low <= high`.
#[derive(Debug, Clone, PartialEq)]
pub struct Clip {
    /// Lower bound.
    pub low: Bound,
    /// Upper bound.
    pub high: Bound,
}

impl Clip {
    /// The same bounds for all targets.
    #[must_use]
    pub const fn between(low: f32, high: f32) -> Self {
        Self {
            low: Bound::All(low),
            high: Bound::All(high),
        }
    }

    /// Lower and upper bound of target `i`.
    fn at(&self, i: usize) -> (f64, f64) {
        (self.low.at(i).into(), self.high.at(i).into())
    }
}

/// A bound of the ratio.
#[derive(Debug, Clone, PartialEq)]
pub enum Bound {
    /// For all targets.
    All(f32),
    /// For each target, `[tokens]`.
    Each(Vec<f32>),
}

impl Bound {
    fn at(&self, i: usize) -> f32 {
        match self {
            Self::All(bound) => *bound,
            Self::Each(bounds) => bounds[i],
        }
    }
}

/// A loss that is a function of all log-probabilities of a sequence.
pub trait SequenceLoss: fmt::Debug + Send + Sync {
    /// Value and derivative at `logprobs`, `[tokens * k]`. The same arguments give the same bits.
    ///
    /// # Errors
    /// A message that says why the function has no value there.
    fn evaluate(&self, logprobs: &[f32]) -> Result<Evaluation, String>;
}

/// A [`SequenceLoss`] in a [`Loss`]; equal to its clones alone.
#[derive(Debug, Clone)]
pub struct Computed(pub Arc<dyn SequenceLoss>);

impl PartialEq for Computed {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Value and derivative of a loss at the log-probabilities of a sequence.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Evaluation {
    /// The loss, summed over the targets.
    pub total: f64,
    /// What each target adds to it, `[tokens * k]`; empty if the loss is no sum over targets.
    pub terms: Vec<f32>,
    /// Derivative for each log-probability, `[tokens * k]`.
    pub gradient: Vec<f32>,
    /// Further numbers by name.
    pub metrics: Vec<(String, f64)>,
}

/// One sequence of a training batch: position `i` predicts `targets[i * k..][..k]`.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainSequence {
    /// Input tokens, `[tokens]`, at least one.
    pub tokens: Vec<u32>,
    /// Target tokens, `[tokens * k]`.
    pub targets: Vec<u32>,
    /// Targets per position; 1 except for soft targets.
    pub k: usize,
    /// What to minimise.
    pub loss: Loss,
}

impl TrainSequence {
    /// The same targets with the linear loss of this `gradient`, `[tokens * k]`.
    pub(crate) fn linear(&self, gradient: &[f32]) -> Self {
        let weights = gradient.iter().map(|c| -c).collect();
        Self {
            tokens: self.tokens.clone(),
            targets: self.targets.clone(),
            k: self.k,
            loss: Loss::CrossEntropy { weights },
        }
    }
}

/// Log-probability of a logit, given the log of the sum of the exponentials of all; at most 0.
pub(crate) fn log_prob(logit: f32, log_sum_exp: f32) -> f32 {
    let value = logit - log_sum_exp;
    // Rounding may leave it just above 0; `f32::min` would hide a NaN.
    if value > 0.0 { 0.0 } else { value }
}

impl Loss {
    /// Whether each target's contribution depends on its own log-probability alone.
    pub(crate) const fn is_per_target(&self) -> bool {
        !matches!(self, Self::Gspo { .. } | Self::Computed(_))
    }

    /// Contribution of target `i` with log-probability `l`, and its derivative for `l`.
    ///
    /// The loss is the sum of the contributions, so this is all that differs between losses that are
    /// [per target](Self::is_per_target). Of the others it is zero.
    pub(crate) fn term(&self, i: usize, l: f32) -> (f64, f32) {
        let wide = f64::from;
        match self {
            Self::CrossEntropy { weights } => {
                let w = weights[i];
                // A weight of 0 silences a target that cannot occur (`l` of minus infinity).
                if w == 0.0 {
                    (0.0, 0.0)
                } else {
                    (-wide(w) * wide(l), -w)
                }
            }
            Self::ImportanceSampling {
                logprobs,
                advantages,
            } => {
                let ra = (wide(l) - wide(logprobs[i])).exp() * wide(advantages[i]);
                (-ra, -ra as f32)
            }
            Self::Ppo {
                logprobs,
                advantages,
                clip,
            } => {
                let ratio = (wide(l) - wide(logprobs[i])).exp();
                clipped(ratio, advantages[i].into(), clip.at(i))
            }
            Self::Cispo {
                logprobs,
                advantages,
                clip,
            } => {
                let (r, a) = ((wide(l) - wide(logprobs[i])).exp(), wide(advantages[i]));
                let (low, high) = clip.at(i);
                let ratio = r.clamp(low, high);
                (-ratio * wide(l) * a, (-ratio * a) as f32)
            }
            Self::Dro {
                logprobs,
                advantages,
                beta,
            } => {
                let (l, a, beta) = (wide(l), wide(advantages[i]), wide(*beta));
                let difference = l - wide(logprobs[i]);
                let value = l * a - 0.5 * beta * difference * difference;
                (-value, (beta * difference - a) as f32)
            }
            Self::Gspo { .. } | Self::Computed(_) => (0.0, 0.0),
        }
    }

    /// Value and derivative at `logprobs`, `[tokens * k]`.
    ///
    /// # Errors
    /// A message, if a [`SequenceLoss`] has one.
    pub fn evaluate(&self, logprobs: &[f32]) -> Result<Evaluation, String> {
        let terms: Vec<(f64, f32)> = match self {
            Self::Computed(function) => return function.0.evaluate(logprobs),
            Self::Gspo {
                logprobs: q,
                advantages,
                in_ratio,
                clip,
            } => {
                let ratio = sequence_ratio(logprobs, q, in_ratio);
                let term = |(i, a): (usize, &f32)| clipped(ratio, (*a).into(), clip.at(i));
                advantages.iter().enumerate().map(term).collect()
            }
            _ => (0..).zip(logprobs).map(|(i, l)| self.term(i, *l)).collect(),
        };
        Ok(Evaluation::of_terms(&terms))
    }
}

impl Evaluation {
    fn of_terms(terms: &[(f64, f32)]) -> Self {
        Self {
            total: terms.iter().map(|(value, _)| value).sum(),
            terms: terms.iter().map(|(value, _)| *value as f32).collect(),
            gradient: terms.iter().map(|(_, derivative)| *derivative).collect(),
            metrics: Vec::new(),
        }
    }
}

/// The clipped objective of PPO for a ratio whose derivative is itself: value and derivative.
fn clipped(ratio: f64, advantage: f64, (low, high): (f64, f64)) -> (f64, f32) {
    let (r, a) = (ratio, advantage);
    let value = (r * a).min(r.clamp(low, high) * a);
    let is_clipped = (a > 0.0 && r > high) || (a < 0.0 && r < low);
    (-value, if is_clipped { 0.0 } else { (-r * a) as f32 })
}

/// The geometric mean of the ratios that are marked.
fn sequence_ratio(l: &[f32], q: &[f32], in_ratio: &[bool]) -> f64 {
    let marked = l.iter().zip(q).zip(in_ratio).filter(|(_, marked)| **marked);
    let (mut sum, mut n) = (0.0, 0.0);
    for ((l, q), _) in marked {
        sum += f64::from(*l) - f64::from(*q);
        n += 1.0;
    }
    (sum / n).exp()
}
