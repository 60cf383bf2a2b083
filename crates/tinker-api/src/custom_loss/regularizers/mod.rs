//! Penalties on log-probabilities, to be added to a loss with
//! [`ComposedLoss`](super::ComposedLoss).
//!
//! Each of them reads all data. Where a penalty is made of one value per position, those values are
//! added up or averaged over all positions of all data, weighted by a mask if one is named.

mod consistency;
mod entropy;
mod gradient_penalty;
mod kl;
mod norms;
mod orthogonality;
mod reference;

use std::fmt;

pub use consistency::{Consistency, Distance};
pub use entropy::{Entropy, EntropyGoal};
pub use gradient_penalty::{GradientPenalty, PenaltyPoint};
pub use kl::{KlDirection, KlDivergence};
pub use norms::{Center, ElasticNet, L1, L2};
pub use orthogonality::{Orthogonality, OrthogonalityMode};
pub use reference::ReferenceLogprobs;
use tinker_types::Datum;

use super::error::CustomLossError;
use super::tape::{Tape, Var};

type Result<T> = std::result::Result<T, CustomLossError>;

/// A penalty: a single number that depends on the log-probabilities.
pub trait Regularizer: fmt::Debug + Send + Sync + 'static {
    /// The penalty of all data together.
    ///
    /// # Errors
    /// If the data lack what it reads; operations that make no sense are noted on the tape.
    fn penalty<'t>(&self, tape: &'t Tape, data: &[Datum], logprobs: &[Var<'t>]) -> Result<Var<'t>>;
}

/// How values of all positions become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// They are added up.
    Sum,
    /// They are averaged over the positions of all data.
    #[default]
    Mean,
}

impl Reduction {
    /// Reduces values per datum; `mask` names a loss input of one weight per value.
    fn reduce<'t>(
        self,
        tape: &'t Tape,
        data: &[Datum],
        values: &[Var<'t>],
        mask: Option<&str>,
    ) -> Result<Var<'t>> {
        let mut n = 0.0;
        let mut sums = Vec::with_capacity(values.len());
        for (i, values) in values.iter().enumerate() {
            let Some(mask) = mask else {
                n += values.shape().iter().product::<usize>() as f64;
                sums.push(values.sum());
                continue;
            };
            let weights = tape.input(datum(data, i)?, mask).values();
            n += weights.iter().sum::<f64>();
            sums.push(values.mask(&weights).sum());
        }
        let sum = tape.stack(sums).sum();
        match self {
            Self::Sum => Ok(sum),
            Self::Mean if n == 0.0 => Err("there is nothing to average: the mask is 0".into()),
            Self::Mean => Ok(sum / n),
        }
    }
}

/// What a norm is taken of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Target {
    /// The log-probabilities.
    #[default]
    Logprobs,
    /// The probabilities.
    Probs,
    /// A loss input by its name, of each datum. It has no gradient: for measuring.
    Input(String),
}

impl Target {
    fn values<'t>(
        &self,
        tape: &'t Tape,
        data: &[Datum],
        logprobs: &[Var<'t>],
    ) -> Result<Vec<Var<'t>>> {
        let value = |(i, l): (usize, &Var<'t>)| {
            Ok(match self {
                Self::Logprobs => *l,
                Self::Probs => l.exp(),
                Self::Input(name) => tape.input(datum(data, i)?, name),
            })
        };
        logprobs.iter().enumerate().map(value).collect()
    }
}

fn datum(data: &[Datum], i: usize) -> Result<&Datum> {
    let missing = || format!("there are log-probabilities of a datum {i}, but no such datum");
    data.get(i).ok_or_else(|| missing().into())
}

/// `value` with the gradient of `gradient`.
fn with_gradient_of<'t>(value: Var<'t>, gradient: Var<'t>) -> Var<'t> {
    gradient + (value - gradient).detach()
}

/// `[n, k]` scores as log-probabilities that add up to 1 in each row.
fn normalized_rows(scores: Var<'_>) -> Var<'_> {
    let n_rows = scores.shape().first().copied().unwrap_or_default();
    scores - scores.log_sum_exp_axis(1).reshape(&[n_rows, 1])
}
