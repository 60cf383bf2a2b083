//! From a rendered conversation to what `forward_backward` takes.

use tinker_chat::SupervisedExample;
use tinker_types::{Datum, ModelInput, TypeError};

/// A training example ready to be sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Example {
    /// Input and shifted targets; weights sum to 1.
    pub(crate) datum: Datum,
    /// The same weights, to average the answer with.
    pub(crate) weights: Vec<f32>,
}

impl Example {
    /// Shifts `rendered` by one, so that position `i` predicts token `i + 1`, after cutting it to
    /// `max_length` tokens, and divides the weights by their sum: the loss of an example is then
    /// its mean over trained tokens, whatever its length.
    ///
    /// Returns `None` if no trained token is left.
    pub(crate) fn new(
        rendered: &SupervisedExample,
        max_length: usize,
    ) -> Result<Option<Self>, TypeError> {
        let n_tokens = rendered.tokens.len().min(max_length);
        let (Some(targets), Some(weights)) = (
            rendered.tokens.get(1..n_tokens),
            rendered.weights.get(1..n_tokens),
        ) else {
            return Ok(None);
        };
        let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
        if total <= 0.0 {
            return Ok(None);
        }
        let weights: Vec<f32> = weights
            .iter()
            .map(|&weight| (f64::from(weight) / total) as f32)
            .collect();
        let input = ModelInput::from_tokens(rendered.tokens[..targets.len()].to_vec());
        let datum = Datum::cross_entropy(input, targets.to_vec(), weights.clone())?;
        Ok(Some(Self { datum, weights }))
    }

    /// Tokens that the model reads.
    pub(crate) fn n_tokens(&self) -> usize {
        self.weights.len()
    }

    /// Tokens with a weight above zero.
    pub(crate) fn n_trained(&self) -> usize {
        self.weights.iter().filter(|&&weight| weight > 0.0).count()
    }
}

#[cfg(test)]
mod tests {
    use tinker_types::loss_input;

    use super::*;

    fn rendered() -> SupervisedExample {
        SupervisedExample {
            tokens: vec![10, 11, 12, 13],
            weights: vec![0.0, 0.0, 1.0, 1.0],
        }
    }

    #[test]
    fn position_i_predicts_token_i_plus_1_with_weights_that_sum_to_one() {
        let example = Example::new(&rendered(), 100).unwrap().unwrap();

        let inputs = example.datum.loss_fn_inputs();
        assert_eq!(example.datum.model_input.tokens().unwrap(), [10, 11, 12]);
        assert_eq!(
            inputs[loss_input::TARGET_TOKENS].as_ints().unwrap(),
            [11, 12, 13]
        );
        assert_eq!(
            inputs[loss_input::WEIGHTS].as_floats().unwrap(),
            [0.0, 0.5, 0.5]
        );
        assert_eq!((example.n_tokens(), example.n_trained()), (3, 2));
    }

    #[test]
    fn cutting_keeps_the_beginning_and_may_leave_nothing() {
        let cut = Example::new(&rendered(), 3).unwrap().unwrap();
        assert_eq!(cut.weights, [0.0, 1.0]);

        assert_eq!(Example::new(&rendered(), 2).unwrap(), None);
        assert_eq!(Example::new(&rendered(), 0).unwrap(), None);
    }
}
