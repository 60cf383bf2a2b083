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
