//! Checks the data of a forward-backward request and turns them into the engine's sequences.
//!
//! Every refusal names the datum, the input and the value, since a batch holds hundreds.

mod settings;
mod tensors;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use tinker_engine::{BaseInfo, SequenceOutput, TrainSequence};
use tinker_types::{
    Datum, ForwardBackwardOutput, ForwardBackwardRequest, LossFnOutput, ModelInput, TensorData,
    TensorValues, loss_input,
};

use crate::error::{Error, Result};
pub(crate) use settings::FindLoss;
use settings::Settings;
use tensors::targets;

/// What each target adds to the loss, as the service names it.
const ELEMENTWISE_LOSS: &str = "elementwise_loss";
/// Most cells of the tensors of a request, all together and with the padding of sparse ones: a
/// gigabyte of targets, weights and log-probabilities.
const MAX_CELLS: usize = 1 << 26;

/// The engine's sequences of a request, one per datum, in order.
///
/// # Errors
/// [`Error::Invalid`] naming the datum at fault.
pub(crate) fn sequences(
    request: &ForwardBackwardRequest,
    info: &BaseInfo,
    find: FindLoss<'_>,
) -> Result<Vec<TrainSequence>> {
    if request.data.is_empty() {
        return Err(Error::Invalid("the request holds no data".into()));
    }
    let settings = Settings::of(&request.loss_fn, &request.loss_fn_config, find)?;
    check_size(&request.data)?;
    let of_datum = |(i, datum): (usize, &Datum)| {
        sequence(datum, &settings, info).map_err(|why| Error::Invalid(format!("datum {i}: {why}")))
    };
    request.data.iter().enumerate().map(of_datum).collect()
}

fn sequence(
    datum: &Datum,
    settings: &Settings,
    info: &BaseInfo,
) -> std::result::Result<TrainSequence, String> {
    let tokens = checked_tokens(&datum.model_input, info)?;
    settings.check_names(datum)?;
    let (targets, k, shape) = targets(datum, tokens.len(), info)?;
    let loss = settings.loss(datum, &shape)?;
    Ok(TrainSequence {
        tokens,
        targets,
        k,
        loss,
    })
}

/// The wire form of the engine's outputs: log-probabilities and losses shaped like the targets, and
/// the sum of the losses over tokens and data.
pub(crate) fn output(
    request: &ForwardBackwardRequest,
    sequences: &[TrainSequence],
    outputs: Vec<SequenceOutput>,
) -> Result<ForwardBackwardOutput> {
    let mut metrics = BTreeMap::from([("loss:sum".to_owned(), 0.0)]);
    let mut per_datum = Vec::with_capacity(outputs.len());
    let n_data = outputs.len() as f64;
    for ((datum, sequence), output) in request.data.iter().zip(sequences).zip(outputs) {
        let evaluated = sequence
            .loss
            .evaluate(&output.logprobs)
            .map_err(Error::Invalid)?;
        *metrics.entry("loss:sum".to_owned()).or_default() += output.loss;
        for (name, value) in evaluated.metrics {
            let share = if name.ends_with(":mean") {
                value / n_data
            } else {
                value
            };
            *metrics.entry(name).or_default() += share;
        }
        let shape = datum
            .loss_fn_inputs()
            .get(loss_input::TARGET_TOKENS)
            .map_or_else(|| vec![output.logprobs.len()], |t| t.shape().to_vec());
        let mut named = LossFnOutput::new();
        if !evaluated.terms.is_empty() {
            named.insert(ELEMENTWISE_LOSS.to_owned(), dense(evaluated.terms, &shape)?);
        }
        named.insert(
            loss_input::LOGPROBS.to_owned(),
            dense(output.logprobs, &shape)?,
        );
        per_datum.push(named);
    }
    Ok(ForwardBackwardOutput {
        loss_fn_output_type: "TorchLossReturn".into(),
        loss_fn_outputs: per_datum,
        metrics,
    })
}

fn dense(values: Vec<f32>, shape: &[usize]) -> Result<TensorData> {
    TensorData::dense(TensorValues::Float32(values), shape.to_vec())
        .map_err(|e| Error::Invalid(e.to_string()))
}

/// The tokens of an input that has only text, checked against vocabulary and context.
///
/// # Errors
/// A text that names the position and the limit.
pub(crate) fn checked_tokens(
    input: &ModelInput,
    info: &BaseInfo,
) -> std::result::Result<Vec<u32>, String> {
    let Some(tokens) = input.tokens() else {
        return Err("the model reads text alone, not images or audio".into());
    };
    if tokens.is_empty() {
        return Err("the input holds no tokens".into());
    }
    if tokens.len() > info.max_context {
        return Err(format!(
            "{} tokens do not fit the model's context of {}",
            tokens.len(),
            info.max_context
        ));
    }
    check_range("token", tokens.iter().map(|&t| i64::from(t)), info)?;
    Ok(tokens)
}

fn check_range(
    what: &str,
    tokens: impl Iterator<Item = i64>,
    info: &BaseInfo,
) -> std::result::Result<(), String> {
    let n = info.vocab_size;
    let inside = |token: i64| usize::try_from(token).is_ok_and(|t| t < n);
    match tokens.enumerate().find(|&(_, token)| !inside(token)) {
        None => Ok(()),
        Some((at, token)) => Err(format!(
            "{what} {token} at position {at} is outside the vocabulary of {n} tokens"
        )),
    }
}

/// Bounds what a request becomes in memory: a sparse tensor of a few bytes may have many cells.
fn check_size(data: &[Datum]) -> Result<()> {
    let mut n_cells: usize = 0;
    for (i, datum) in data.iter().enumerate() {
        for tensor in datum.loss_fn_inputs().values() {
            let of_tensor = tensor
                .shape()
                .iter()
                .copied()
                .fold(1, usize::saturating_mul);
            n_cells = n_cells.saturating_add(of_tensor);
        }
        if n_cells > MAX_CELLS {
            return Err(Error::Invalid(format!(
                "datum {i}: the tensors of the data up to here have {n_cells} cells, more than {MAX_CELLS}: send fewer data at once"
            )));
        }
    }
    Ok(())
}
