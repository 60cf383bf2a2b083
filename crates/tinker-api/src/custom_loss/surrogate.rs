//! The two cross-entropy passes that stand for a custom loss: their data and their result.

use std::collections::BTreeMap;

use tinker_types::{Datum, ForwardBackwardOutput, TensorData, TensorValues, loss_input};

use super::evaluation::Logprobs;
use crate::error::{Error, Result};

const LOSS: &str = "loss:sum";
const SURROGATE_LOSS: &str = "surrogate_loss:sum";

/// Data of the forward pass: targets and weights only. Weights are zeros where there are none.
pub(super) fn forward_data(data: &[Datum]) -> Result<Vec<Datum>> {
    data.iter()
        .enumerate()
        .map(|(i, datum)| {
            let weights = datum.loss_fn_inputs().get(loss_input::WEIGHTS).cloned();
            let weights = match weights {
                Some(weights) => weights,
                None => zeros(targets(i, datum)?.shape())?,
            };
            reduced(i, datum, weights)
        })
        .collect()
}

/// Data of the backward pass: the same with weights `-gradient`, so that the gradient of
/// cross-entropy, `-sum w l`, is that of the custom loss.
pub(super) fn backward_data(
    data: &[Datum],
    logprobs: &[Logprobs],
    gradients: Vec<Vec<f64>>,
) -> Result<Vec<Datum>> {
    let parts = data.iter().zip(logprobs).zip(gradients);
    parts
        .enumerate()
        .map(|(i, ((datum, logprobs), gradient))| {
            let weights = gradient.into_iter().map(|g| -g as f32).collect();
            let values = TensorValues::Float32(weights);
            reduced(
                i,
                datum,
                TensorData::dense(values, logprobs.shape().to_vec())?,
            )
        })
        .collect()
}

/// The log-probabilities that a forward pass brought, one per datum.
pub(super) fn logprobs(data: &[Datum], output: ForwardBackwardOutput) -> Result<Vec<Logprobs>> {
    let outputs = output.loss_fn_outputs;
    if outputs.len() != data.len() {
        return Err(Error::Protocol(format!(
            "the server returned {} outputs for {} data; look into its log",
            outputs.len(),
            data.len()
        )));
    }
    let pairs = data.iter().zip(outputs).enumerate();
    pairs
        .map(|(i, (datum, mut output))| {
            let tensor = output.remove(loss_input::LOGPROBS).ok_or_else(|| {
                Error::Protocol(format!(
                    "the server returned no log-probabilities of datum {i}"
                ))
            })?;
            logprobs_of(i, targets(i, datum)?.shape(), &tensor)
        })
        .collect()
}

fn logprobs_of(i: usize, targets: &[usize], tensor: &TensorData) -> Result<Logprobs> {
    let shape = tensor.shape().to_vec();
    let wrong = || {
        Error::Protocol(format!(
            "the server returned log-probabilities of shape {shape:?} for datum {i}, \
             whose targets have shape {targets:?}"
        ))
    };
    let values = tensor.as_floats().ok_or_else(wrong)?.to_vec();
    let n_targets = targets.iter().product::<usize>();
    if values.len() != n_targets {
        return Err(wrong());
    }
    Logprobs::new(values, tensor.shape().to_vec()).map_err(|_| wrong())
}

/// The backward pass's result under the name of the custom loss.
pub(super) fn relabel(
    mut output: ForwardBackwardOutput,
    loss: f64,
    metrics: BTreeMap<String, f64>,
) -> Result<ForwardBackwardOutput> {
    let surrogate = output
        .metrics
        .remove(LOSS)
        .ok_or_else(|| Error::Protocol(format!("the server's result lacks the metric {LOSS:?}")))?;
    output.metrics.extend(metrics);
    output.metrics.insert(LOSS.to_owned(), loss);
    output.metrics.insert(SURROGATE_LOSS.to_owned(), surrogate);
    Ok(output)
}

fn targets(i: usize, datum: &Datum) -> Result<&TensorData> {
    let inputs = datum.loss_fn_inputs();
    inputs.get(loss_input::TARGET_TOKENS).ok_or_else(|| {
        let name = loss_input::TARGET_TOKENS;
        Error::InvalidRequest(format!("datum {i}: a custom loss needs `{name}`"))
    })
}

fn zeros(shape: &[usize]) -> Result<TensorData> {
    let n_cells = shape.iter().product();
    let values = TensorValues::Float32(vec![0.0; n_cells]);
    Ok(TensorData::dense(values, shape.to_vec())?)
}

/// The datum with its targets and these weights and nothing else for the loss to read.
fn reduced(i: usize, datum: &Datum, weights: TensorData) -> Result<Datum> {
    let inputs = [
        (loss_input::TARGET_TOKENS, targets(i, datum)?.clone()),
        (loss_input::WEIGHTS, weights),
    ];
    let inputs = inputs
        .map(|(name, tensor)| (name.to_owned(), tensor))
        .into();
    let mut reduced = Datum::from_wire(datum.model_input.clone(), inputs);
    reduced
        .model_input_spans
        .clone_from(&datum.model_input_spans);
    reduced
        .loss_fn_input_spans
        .clone_from(&datum.loss_fn_input_spans);
    Ok(reduced)
}

#[cfg(test)]
mod tests {
    use tinker_types::ModelInput;

    use super::*;

    fn soft_datum() -> Datum {
        let input = ModelInput::from_tokens(vec![1, 2]);
        let values = TensorValues::Int64(vec![3, 4, 5, 6]);
        let targets = TensorData::dense(values, vec![2, 2]).unwrap();
        let inputs = [
            (loss_input::TARGET_TOKENS.to_owned(), targets),
            ("advantages".to_owned(), TensorData::floats(vec![1.0; 2])),
        ];
        Datum::from_wire(input, inputs.into())
    }

    #[test]
    fn the_forward_pass_gets_targets_and_zeros_and_nothing_else() {
        let sent = forward_data(&[soft_datum()]).unwrap();

        let inputs = sent[0].loss_fn_inputs();
        assert_eq!(inputs.len(), 2);
        assert_eq!(inputs["weights"].as_floats(), Some(&[0.0; 4][..]));
        assert_eq!(inputs["weights"].shape(), [2, 2]);
    }

    #[test]
    fn the_forward_pass_keeps_given_weights() {
        let input = ModelInput::from_tokens(vec![1, 2]);
        let datum = Datum::cross_entropy(input, vec![2, 3], vec![0.5, 1.5]).unwrap();

        assert_eq!(forward_data(std::slice::from_ref(&datum)).unwrap(), [datum]);
    }

    #[test]
    fn the_backward_pass_weighs_by_the_negative_gradient() {
        let logprobs = Logprobs::new(vec![-1.0; 4], vec![2, 2]).unwrap();
        let gradient = vec![0.25, -1.0, 0.0, 2.0];

        let sent = backward_data(&[soft_datum()], &[logprobs], vec![gradient]).unwrap();

        let weights = &sent[0].loss_fn_inputs()["weights"];
        assert_eq!(weights.as_floats(), Some(&[-0.25, 1.0, 0.0, -2.0][..]));
        assert_eq!(weights.shape(), [2, 2]);
    }

    #[test]
    fn the_loss_of_the_surrogate_gets_a_name_of_its_own() {
        let output = ForwardBackwardOutput {
            metrics: [("loss:sum".to_owned(), 7.0), ("x:mean".to_owned(), 1.0)].into(),
            ..ForwardBackwardOutput::default()
        };
        let own = [("x:mean".to_owned(), 3.0), ("loss:sum".to_owned(), 9.0)].into();

        let metrics = relabel(output, 0.5, own).unwrap().metrics;

        let expected = [
            ("loss:sum", 0.5),
            ("surrogate_loss:sum", 7.0),
            ("x:mean", 3.0),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value));
        assert_eq!(metrics, expected.into());
        assert!(relabel(ForwardBackwardOutput::default(), 0.5, BTreeMap::new()).is_err());
    }

    #[test]
    fn log_probabilities_of_another_length_are_refused() {
        let tensor = TensorData::floats(vec![-1.0; 3]);

        let error = logprobs_of(4, &[2, 2], &tensor).unwrap_err().to_string();

        assert_eq!(
            error,
            "the server returned log-probabilities of shape [3] for datum 4, \
             whose targets have shape [2, 2]"
        );
    }
}
