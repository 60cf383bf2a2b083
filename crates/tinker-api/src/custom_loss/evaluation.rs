//! What a loss is given and what it returns.

use std::collections::BTreeMap;

use super::error::CustomLossError;

/// The log-probabilities that the model gives the targets of one datum: natural log, ≤ 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    values: Vec<f32>,
    shape: Vec<usize>,
}

impl Logprobs {
    /// Log-probabilities of a shape: `[tokens]`, or `[tokens, k]` for `k` targets per position.
    ///
    /// # Errors
    /// [`CustomLossError::Failed`] if the product of `shape` is not the number of values.
    pub fn new(values: Vec<f32>, shape: Vec<usize>) -> Result<Self, CustomLossError> {
        let n_cells = shape.iter().try_fold(1_usize, |n, &dim| n.checked_mul(dim));
        if n_cells != Some(values.len()) {
            return Err(CustomLossError::Failed(format!(
                "{} log-probabilities do not make up the shape {shape:?}",
                values.len()
            )));
        }
        Ok(Self { values, shape })
    }

    /// The values, row-major.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// `[tokens]` or `[tokens, k]`, as the targets.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of values.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

/// A loss, its gradient, and what else is worth knowing about it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LossAndGradient {
    /// The loss of all data together; the pass reports it as `loss:sum`.
    pub loss: f64,
    /// `d loss / d logprobs`: one per datum in input order, row-major, as long as its
    /// log-probabilities.
    pub gradients: Vec<Vec<f64>>,
    /// Added to the metrics of the pass under these names.
    pub metrics: BTreeMap<String, f64>,
}

impl LossAndGradient {
    /// Checks the gradient against what it is the gradient of.
    pub(crate) fn check(&self, logprobs: &[Logprobs]) -> Result<(), CustomLossError> {
        if !self.loss.is_finite() {
            return Err(CustomLossError::LossNotFinite(self.loss));
        }
        if self.gradients.len() != logprobs.len() {
            return Err(CustomLossError::GradientCount {
                expected: logprobs.len(),
                actual: self.gradients.len(),
            });
        }
        for (datum, (gradient, logprobs)) in self.gradients.iter().zip(logprobs).enumerate() {
            if gradient.len() != logprobs.len() {
                return Err(CustomLossError::GradientLength {
                    datum,
                    expected: logprobs.len(),
                    actual: gradient.len(),
                });
            }
            // It travels as 32-bit floats, which overflow earlier.
            let bad = gradient.iter().position(|&g| !(g as f32).is_finite());
            if let Some(position) = bad {
                return Err(CustomLossError::GradientNotFinite {
                    datum,
                    position,
                    value: gradient[position] as f32,
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(loss: f64, gradients: &[&[f64]], expected: &str) {
        let logprobs = Logprobs::new(vec![-1.0, -2.0], vec![2]).unwrap();
        let evaluation = LossAndGradient {
            loss,
            gradients: gradients.iter().map(|g| g.to_vec()).collect(),
            ..LossAndGradient::default()
        };
        let error = evaluation.check(&[logprobs]).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn gradients_that_would_spoil_the_weights_are_refused() {
        check(
            f64::NAN,
            &[&[0.0, 0.0]],
            "the loss is NaN: it must be finite",
        );
        check(
            1.0,
            &[],
            "the custom loss returned 0 gradients for 1 data: return one per datum",
        );
        check(
            1.0,
            &[&[0.0]],
            "the custom loss returned 1 gradient values for datum 0, which has 2 log-probabilities",
        );
        check(
            1.0,
            &[&[0.0, 1e39]],
            "the gradient of datum 0 at position 1 is inf: it must be finite",
        );
    }

    #[test]
    fn log_probabilities_fill_their_shape() {
        assert!(Logprobs::new(vec![0.0; 6], vec![3, 2]).is_ok());
        assert!(Logprobs::new(vec![0.0; 6], vec![3]).is_err());
        assert!(Logprobs::new(vec![], vec![usize::MAX, 2]).is_err());
    }
}
