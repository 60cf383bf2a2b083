//! Mean negative log-likelihood from what the server returns.

use tinker_types::ForwardBackwardOutput;

use super::datum::Example;
use crate::error::{Error, Result};

/// `-Σ w l / Σ w` over all tokens of `examples`, natural log: since each example's weights sum to
/// 1, the mean over examples of their mean per trained token.
///
/// # Errors
/// The answer does not hold one log-probability for every target.
pub(crate) fn mean_nll<'a>(
    examples: impl IntoIterator<Item = &'a Example>,
    answer: &ForwardBackwardOutput,
) -> Result<f64> {
    let bad = |reason: String| Error::BadAnswer {
        request: "forward_backward",
        reason,
    };
    let mut outputs = answer.loss_fn_outputs.iter();
    let (mut weighted, mut total) = (0.0_f64, 0.0_f64);
    for (index, example) in examples.into_iter().enumerate() {
        let logprobs = outputs
            .next()
            .and_then(|output| output.get("logprobs")?.as_floats())
            .ok_or_else(|| bad(format!("datum {index} has no log-probabilities")))?;
        if logprobs.len() != example.weights.len() {
            let (n, expected) = (logprobs.len(), example.weights.len());
            return Err(bad(format!(
                "datum {index}: {n} log-probabilities for {expected} targets"
            )));
        }
        for (&weight, &logprob) in example.weights.iter().zip(logprobs) {
            // A token that is not trained may be impossible, and 0 times infinity is no number.
            if weight > 0.0 {
                weighted -= f64::from(weight) * f64::from(logprob);
                total += f64::from(weight);
            }
        }
    }
    if outputs.next().is_some() {
        return Err(bad("it has more outputs than data".to_owned()));
    }
    Ok(weighted / total)
}
