//! Training sequences and the losses over their log-probabilities.

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
        /// Lower bound of the ratio.
        clip_low: f32,
        /// Upper bound of the ratio.
        clip_high: f32,
    },
    /// `-sum stop_gradient(clip(r, low, high)) l A`.
    Cispo {
        /// `q`, `[tokens]`.
        logprobs: Vec<f32>,
        /// `A`, `[tokens]`.
        advantages: Vec<f32>,
        /// Lower bound of the ratio.
        clip_low: f32,
        /// Upper bound of the ratio.
        clip_high: f32,
    },
    /// `-sum (l A - beta/2 (l - q)^2)`.
    Dro {
        /// `q`, `[tokens]`.
        logprobs: Vec<f32>,
        /// `A`, `[tokens]`.
        advantages: Vec<f32>,
        /// Strength of the quadratic penalty.
        beta: f32,
    },
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

/// Log-probability of a logit, given the log of the sum of the exponentials of all; at most 0.
pub(crate) fn log_prob(logit: f32, log_sum_exp: f32) -> f32 {
    let value = logit - log_sum_exp;
    // Rounding may leave it just above 0; `f32::min` would hide a NaN.
    if value > 0.0 { 0.0 } else { value }
}

impl Loss {
    /// Contribution of target `i` with log-probability `l`, and its derivative for `l`.
    ///
    /// The loss is the sum of the contributions, so this is all that differs between losses.
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
                clip_low,
                clip_high,
            } => {
                let (r, a) = ((wide(l) - wide(logprobs[i])).exp(), wide(advantages[i]));
                let (low, high) = (wide(*clip_low), wide(*clip_high));
                let value = (r * a).min(r.clamp(low, high) * a);
                let clipped = (a > 0.0 && r > high) || (a < 0.0 && r < low);
                (-value, if clipped { 0.0 } else { (-r * a) as f32 })
            }
            Self::Cispo {
                logprobs,
                advantages,
                clip_low,
                clip_high,
            } => {
                let (r, a) = ((wide(l) - wide(logprobs[i])).exp(), wide(advantages[i]));
                let ratio = r.clamp(wide(*clip_low), wide(*clip_high));
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
        }
    }

    /// Lengths of the per-target inputs, by name.
    fn inputs(&self) -> Vec<(&'static str, usize)> {
        match self {
            Self::CrossEntropy { weights } => vec![("weights", weights.len())],
            Self::ImportanceSampling {
                logprobs,
                advantages,
            }
            | Self::Ppo {
                logprobs,
                advantages,
                ..
            }
            | Self::Cispo {
                logprobs,
                advantages,
                ..
            }
            | Self::Dro {
                logprobs,
                advantages,
                ..
            } => {
                vec![
                    ("logprobs", logprobs.len()),
                    ("advantages", advantages.len()),
                ]
            }
        }
    }

    /// Checks the numbers that are not per target; the error is a message.
    fn check(&self, k: usize) -> Result<(), String> {
        if let Self::Ppo {
            clip_low,
            clip_high,
            ..
        }
        | Self::Cispo {
            clip_low,
            clip_high,
            ..
        } = self
            && clip_low
                .partial_cmp(clip_high)
                .is_none_or(|order| order.is_gt())
        {
            return Err(format!("clip range {clip_low} to {clip_high} is empty"));
        }
        if let Self::Dro { beta, .. } = self
            && !(beta.is_finite() && *beta >= 0.0)
        {
            return Err(format!("beta is {beta}, it must be at least 0"));
        }
        if k != 1 && !matches!(self, Self::CrossEntropy { .. }) {
            return Err(format!(
                "{k} targets per token; only cross entropy takes more than 1"
            ));
        }
        Ok(())
    }
}

impl TrainSequence {
    /// Checks lengths, tokens and loss inputs against a model; the error is a message.
    pub(crate) fn check(&self, vocab_size: usize, max_context: usize) -> Result<(), String> {
        let n = self.tokens.len();
        if n == 0 {
            return Err("it has no tokens".into());
        }
        if n > max_context {
            return Err(format!("{n} tokens, the model's context is {max_context}"));
        }
        if self.k == 0 || n.checked_mul(self.k) != Some(self.targets.len()) {
            let (targets, k) = (self.targets.len(), self.k);
            return Err(format!("{targets} targets for {n} tokens with {k} each"));
        }
        let mut all = self.tokens.iter().chain(&self.targets);
        if let Some(token) = all.find(|t| **t as usize >= vocab_size) {
            return Err(format!(
                "token {token} is not below the vocabulary size {vocab_size}"
            ));
        }
        let targets = self.targets.len();
        if let Some((name, len)) = self
            .loss
            .inputs()
            .into_iter()
            .find(|(_, len)| *len != targets)
        {
            return Err(format!("{len} {name} for {targets} targets"));
        }
        self.loss.check(self.k)
    }
}

#[cfg(test)]
#[expect(clippy::approx_constant, reason = "the digits of the golden vector")]
mod tests {
    use super::*;

    const L: [f32; 4] = [-0.5, -1.2, -2.0, -0.1];
    const ADVANTAGES: [f32; 4] = [1.0, 1.0, -0.5, -1.0];

    fn logprobs() -> Vec<f32> {
        vec![-0.7, -1.0, -2.0, -1.1]
    }

    fn check(loss: &Loss, value: f64, gradient: [f64; 4]) {
        let terms: Vec<(f64, f32)> = (0..4).map(|i| loss.term(i, L[i])).collect();
        let total: f64 = terms.iter().map(|t| t.0).sum();
        assert!((total - value).abs() < 1e-6, "{loss:?}: {total}");
        for ((_, c), expected) in terms.iter().zip(gradient) {
            assert!(
                (f64::from(*c) - expected).abs() < 1e-6,
                "{loss:?}: {terms:?}"
            );
        }
    }

    #[test]
    fn values_and_gradients_match_the_golden_vector() {
        let (logprobs, advantages) = (logprobs(), ADVANTAGES.to_vec());
        let weights = vec![0.0, 1.0, 1.0, 0.5];
        check(
            &Loss::CrossEntropy { weights },
            3.25,
            [0.0, -1.0, -1.0, -0.5],
        );
        let is = Loss::ImportanceSampling {
            logprobs: logprobs.clone(),
            advantages: advantages.clone(),
        };
        check(&is, 1.178_148_317, [-1.221_403, -0.818_731, 0.5, 2.718_282]);
        let (clip_low, clip_high) = (0.8, 1.2);
        let ppo = Loss::Ppo {
            logprobs: logprobs.clone(),
            advantages: advantages.clone(),
            clip_low,
            clip_high,
        };
        check(&ppo, 1.199_551_075, [0.0, -0.818_731, 0.5, 2.718_282]);
        for (clip_low, clip_high, value, gradient) in [
            (
                0.0,
                4.0,
                0.321_350_1,
                [-1.221_403, -0.818_731, 0.5, 2.718_282],
            ),
            (0.8, 1.2, 0.462_476_904, [-1.2, -0.818_731, 0.5, 1.2]),
        ] {
            let (logprobs, advantages) = (logprobs.clone(), advantages.clone());
            check(
                &Loss::Cispo {
                    logprobs,
                    advantages,
                    clip_low,
                    clip_high,
                },
                value,
                gradient,
            );
        }
        let dro = Loss::Dro {
            logprobs,
            advantages,
            beta: 0.05,
        };
        check(&dro, 0.627, [-0.99, -1.01, 0.5, 1.05]);
    }
}
