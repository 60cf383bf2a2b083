//! Rows that have nothing in common.

use tinker_types::Datum;

use super::{Regularizer, Result, Target};
use crate::custom_loss::tape::{Tape, Var};

/// What the products of rows should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OrthogonalityMode {
    /// 0 for different rows; lengths are free.
    #[default]
    OffDiagonal,
    /// The identity.
    Identity,
}

/// `sum (X X^T - I)^2`, or without the diagonal.
///
/// With `[tokens, k]` targets, `X` has a row for each position of a datum, and the penalties of the
/// data are added up; with one target per position, `X` has a row for each datum, all of one length.
/// Cost: the square of the number of rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Orthogonality {
    /// What the rows hold. Default: log-probabilities.
    pub target: Target,
    /// Default: off the diagonal.
    pub mode: OrthogonalityMode,
    /// Scale rows to length 1 first. Default true.
    pub normalize: bool,
}

impl Default for Orthogonality {
    fn default() -> Self {
        Self {
            target: Target::Logprobs,
            mode: OrthogonalityMode::OffDiagonal,
            normalize: true,
        }
    }
}

impl Orthogonality {
    fn of<'t>(&self, tape: &'t Tape, rows: Var<'t>) -> Var<'t> {
        let n = rows.shape().first().copied().unwrap_or_default();
        let rows = match self.normalize {
            true => rows / rows.square().sum_axis(1).sqrt().reshape(&[n, 1]),
            false => rows,
        };
        let products = rows.matmul(rows.transpose());
        let is_diagonal = |cell: usize| cell / n.max(1) == cell % n.max(1);
        let on_diagonal = |value: f64| move |cell| if is_diagonal(cell) { value } else { 0.0 };
        let deviations = match self.mode {
            OrthogonalityMode::Identity => {
                let identity: Vec<f64> = (0..n * n).map(on_diagonal(1.0)).collect();
                products - tape.constant(&identity).reshape(&[n, n])
            }
            OrthogonalityMode::OffDiagonal => {
                let others: Vec<f64> = (0..n * n).map(|c| 1.0 - on_diagonal(1.0)(c)).collect();
                products.mask(&others)
            }
        };
        deviations.square().sum()
    }
}

impl Regularizer for Orthogonality {
    fn penalty<'t>(&self, tape: &'t Tape, data: &[Datum], logprobs: &[Var<'t>]) -> Result<Var<'t>> {
        let values = self.target.values(tape, data, logprobs)?;
        if values.iter().any(|value| value.shape().len() == 1) {
            return Ok(self.of(tape, tape.stack(values)));
        }
        let penalties = values.into_iter().map(|rows| self.of(tape, rows));
        Ok(tape.stack(penalties).sum())
    }
}
