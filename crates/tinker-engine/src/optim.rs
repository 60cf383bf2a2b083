//! The optimizers: AdamW with decoupled weight decay, and Dimuon, both with clipping by global norm.

mod dimuon;

pub use dimuon::Dimuon;
pub(crate) use dimuon::{Direction, ema};

use crate::error::{Error, Result};

/// An optimizer, which an adapter keeps from its first step on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// [`AdamW`]: two moments per weight.
    AdamW,
    /// [`Dimuon`]: one moment per weight.
    Dimuon,
}

impl Family {
    /// Its name on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::Dimuon => "dimuon",
        }
    }
}

/// An optimizer with the hyper-parameters of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Optimizer {
    /// AdamW.
    AdamW(AdamW),
    /// Dimuon.
    Dimuon(Dimuon),
}

impl Optimizer {
    /// Which optimizer it is.
    #[must_use]
    pub const fn family(&self) -> Family {
        match self {
            Self::AdamW(_) => Family::AdamW,
            Self::Dimuon(_) => Family::Dimuon,
        }
    }

    /// Checks every hyper-parameter against its range.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::AdamW(params) => params.check(),
            Self::Dimuon(params) => params.check(),
        }
    }
}

impl From<AdamW> for Optimizer {
    fn from(params: AdamW) -> Self {
        Self::AdamW(params)
    }
}

impl From<Dimuon> for Optimizer {
    fn from(params: Dimuon) -> Self {
        Self::Dimuon(params)
    }
}

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

/// A hyper-parameter: name, value, whether it is in its range, and the range in words.
type Rule = (&'static str, f32, bool, &'static str);

fn check_rules(rules: &[Rule]) -> Result<()> {
    for (name, value, holds, range) in rules {
        if !holds || !value.is_finite() {
            return Err(Error::Invalid(format!(
                "{name} is {value}, it must be {range}"
            )));
        }
    }
    Ok(())
}

impl AdamW {
    /// Checks every hyper-parameter against its range.
    pub(crate) fn check(&self) -> Result<()> {
        let at_least_0 = |name, value: f32| (name, value, value >= 0.0, "at least 0");
        let decay = |name, value: f32| (name, value, (0.0..1.0).contains(&value), "in [0, 1)");
        check_rules(&[
            at_least_0("learning_rate", self.learning_rate),
            decay("beta1", self.beta1),
            decay("beta2", self.beta2),
            ("eps", self.eps, self.eps > 0.0, "above 0"),
            at_least_0("weight_decay", self.weight_decay),
            at_least_0("grad_clip_norm", self.grad_clip_norm),
        ])
    }

    /// Bias correction `1 - beta^step` of a moment.
    pub(crate) fn correction(&self, beta: f32, step: u64) -> f64 {
        1.0 - f64::from(beta).powf(step as f64)
    }
}

/// Factor on a gradient of norm `grad_norm`, as `torch.nn.utils.clip_grad_norm_` computes it; a
/// largest norm of 0 turns clipping off.
pub(crate) fn clip_factor(max_norm: f32, grad_norm: f64) -> f32 {
    if max_norm == 0.0 {
        return 1.0;
    }
    (f64::from(max_norm) / (grad_norm + 1e-6)).min(1.0) as f32
}
