//! AdamW with decoupled weight decay and clipping by global norm.

use crate::error::{Error, Result};

/// Hyper-parameters of one AdamW step (Loshchilov and Hutter 2019, algorithm 2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Step size, at least 0.
    pub learning_rate: f32,
    /// Decay of the first moment, in `[0, 1)`.
    pub beta1: f32,
    /// Decay of the second moment, in `[0, 1)`.
    pub beta2: f32,
    /// Added to the root of the second moment, above 0.
    pub eps: f32,
    /// Decoupled: the weight shrinks by `learning_rate * weight_decay` of itself.
    pub weight_decay: f32,
    /// Largest global gradient norm; 0 turns clipping off.
    pub grad_clip_norm: f32,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimReport {
    /// Steps taken so far, this one included.
    pub step: u64,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
}

impl AdamW {
    /// Checks every hyper-parameter against its range.
    pub(crate) fn check(&self) -> Result<()> {
        let rules = [
            (
                "learning_rate",
                self.learning_rate,
                self.learning_rate >= 0.0,
                "at least 0",
            ),
            (
                "beta1",
                self.beta1,
                (0.0..1.0).contains(&self.beta1),
                "in [0, 1)",
            ),
            (
                "beta2",
                self.beta2,
                (0.0..1.0).contains(&self.beta2),
                "in [0, 1)",
            ),
            ("eps", self.eps, self.eps > 0.0, "above 0"),
            (
                "weight_decay",
                self.weight_decay,
                self.weight_decay >= 0.0,
                "at least 0",
            ),
            (
                "grad_clip_norm",
                self.grad_clip_norm,
                self.grad_clip_norm >= 0.0,
                "at least 0",
            ),
        ];
        for (name, value, holds, range) in rules {
            if !holds || !value.is_finite() {
                return Err(Error::Invalid(format!(
                    "{name} is {value}, it must be {range}"
                )));
            }
        }
        Ok(())
    }

    /// Factor on the gradient, as `torch.nn.utils.clip_grad_norm_` computes it.
    pub(crate) fn clip_factor(&self, grad_norm: f64) -> f32 {
        if self.grad_clip_norm == 0.0 {
            return 1.0;
        }
        (f64::from(self.grad_clip_norm) / (grad_norm + 1e-6)).min(1.0) as f32
    }

    /// Bias correction `1 - beta^step` of a moment.
    pub(crate) fn correction(&self, beta: f32, step: u64) -> f64 {
        1.0 - f64::from(beta).powf(step as f64)
    }
}
