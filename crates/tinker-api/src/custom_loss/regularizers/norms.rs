//! L1, L2 and both.

use tinker_types::Datum;

use super::{Reduction, Regularizer, Result, Target};
use crate::custom_loss::tape::{Tape, Var};

/// `scale * sum |x|`.
#[derive(Debug, Clone, PartialEq)]
pub struct L1 {
    /// What `x` is. Default: log-probabilities.
    pub target: Target,
    /// Factor. Default 1.
    pub scale: f64,
    /// Default: sum.
    pub reduction: Reduction,
    /// A loss input of one weight per value.
    pub mask: Option<String>,
}

impl Default for L1 {
    fn default() -> Self {
        Self {
            target: Target::Logprobs,
            scale: 1.0,
            reduction: Reduction::Sum,
            mask: None,
        }
    }
}

impl Regularizer for L1 {
    fn penalty<'t>(&self, tape: &'t Tape, data: &[Datum], logprobs: &[Var<'t>]) -> Result<Var<'t>> {
        let values = self.target.values(tape, data, logprobs)?;
        let values: Vec<_> = values.into_iter().map(Var::abs).collect();
        let mask = self.mask.as_deref();
        Ok(self.reduction.reduce(tape, data, &values, mask)? * self.scale)
    }
}

/// What squares are taken around.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Center {
    /// A number.
    At(f64),
    /// The mean of all values of all data.
    Mean,
}

/// `scale * sum (x - center)^2`.
#[derive(Debug, Clone, PartialEq)]
pub struct L2 {
    /// What `x` is. Default: log-probabilities.
    pub target: Target,
    /// Factor. Default 1.
    pub scale: f64,
    /// Default: sum.
    pub reduction: Reduction,
    /// Default: 0.
    pub center: Center,
    /// Largest distance from the center that counts; beyond it there is no gradient.
    pub clip: Option<f64>,
    /// A loss input of one weight per value.
    pub mask: Option<String>,
}

impl Default for L2 {
    fn default() -> Self {
        Self {
            target: Target::Logprobs,
            scale: 1.0,
            reduction: Reduction::Sum,
            center: Center::At(0.0),
            clip: None,
            mask: None,
        }
    }
}

impl Regularizer for L2 {
    fn penalty<'t>(&self, tape: &'t Tape, data: &[Datum], logprobs: &[Var<'t>]) -> Result<Var<'t>> {
        let values = self.target.values(tape, data, logprobs)?;
        let mask = self.mask.as_deref();
        let center = match self.center {
            Center::At(center) => tape.number(center),
            Center::Mean => Reduction::Mean.reduce(tape, data, &values, mask)?,
        };
        let square = |x: Var<'t>| {
            let distance = x - center;
            let clipped = self.clip.map(|clip| distance.clamp(-clip, clip));
            clipped.unwrap_or(distance).square()
        };
        let squares: Vec<_> = values.into_iter().map(square).collect();
        Ok(self.reduction.reduce(tape, data, &squares, mask)? * self.scale)
    }
}

/// `scale * sum (l1_ratio |x| + (1 - l1_ratio) x^2)`.
#[derive(Debug, Clone, PartialEq)]
pub struct ElasticNet {
    /// What `x` is. Default: log-probabilities.
    pub target: Target,
    /// Factor. Default 1.
    pub scale: f64,
    /// Part of L1, `0..=1`. Default 0.5.
    pub l1_ratio: f64,
    /// Default: sum.
    pub reduction: Reduction,
    /// A loss input of one weight per value.
    pub mask: Option<String>,
}

impl Default for ElasticNet {
    fn default() -> Self {
        Self {
            target: Target::Logprobs,
            scale: 1.0,
            l1_ratio: 0.5,
            reduction: Reduction::Sum,
            mask: None,
        }
    }
}

impl Regularizer for ElasticNet {
    fn penalty<'t>(&self, tape: &'t Tape, data: &[Datum], logprobs: &[Var<'t>]) -> Result<Var<'t>> {
        let ratio = self.l1_ratio;
        if !(0.0..=1.0).contains(&ratio) {
            return Err(format!("l1_ratio {ratio}: it must be in 0..=1").into());
        }
        let values = self.target.values(tape, data, logprobs)?;
        let mix = |x: Var<'t>| x.abs() * ratio + x.square() * (1.0 - ratio);
        let values: Vec<_> = values.into_iter().map(mix).collect();
        let mask = self.mask.as_deref();
        Ok(self.reduction.reduce(tape, data, &values, mask)? * self.scale)
    }
}
