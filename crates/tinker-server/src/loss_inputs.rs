//! Checks the data of a forward-backward request and turns them into the engine's sequences.
//!
//! Every refusal names the datum, the input and the value, since a batch holds hundreds.

use std::collections::BTreeMap;

use tinker_engine::{BaseInfo, Loss, SequenceOutput, TrainSequence};
use tinker_types::{
    Datum, ForwardBackwardOutput, ForwardBackwardRequest, LossConfig, LossConfigValue, LossFn,
    ModelInput, TensorData, TensorValues, loss_input,
};

use crate::error::{Error, Result};

/// The loss with its settings resolved.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Settings {
    CrossEntropy,
    ImportanceSampling,
    Ppo { low: f32, high: f32 },
    Cispo { low: f32, high: f32 },
    Dro { beta: f32 },
}

const CLIP_LOW: &str = "clip_low_threshold";
const CLIP_HIGH: &str = "clip_high_threshold";
const BETA: &str = "beta";
/// The example value of the public description of DRO.
const DEFAULT_BETA: f32 = 0.05;

/// Most targets per position: a distillation target lists the likeliest tokens, not a vocabulary.
const MAX_TARGETS: usize = 1024;
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
) -> Result<Vec<TrainSequence>> {
    if request.data.is_empty() {
        return Err(Error::Invalid("the request holds no data".into()));
    }
    let settings = settings(&request.loss_fn, &request.loss_fn_config)?;
    check_size(&request.data)?;
    let of_datum = |(i, datum): (usize, &Datum)| {
        sequence(datum, settings, &request.loss_fn, info)
            .map_err(|why| Error::Invalid(format!("datum {i}: {why}")))
    };
    request.data.iter().enumerate().map(of_datum).collect()
}

/// The wire form of the engine's outputs: log-probabilities shaped like the targets, and the sum of
/// the losses over tokens and data.
pub(crate) fn output(
    request: &ForwardBackwardRequest,
    outputs: Vec<SequenceOutput>,
) -> Result<ForwardBackwardOutput> {
    let mut loss = 0.0;
    let mut per_datum = Vec::with_capacity(outputs.len());
    for (datum, output) in request.data.iter().zip(outputs) {
        loss += output.loss;
        let shape = datum
            .loss_fn_inputs()
            .get(loss_input::TARGET_TOKENS)
            .map_or_else(|| vec![output.logprobs.len()], |t| t.shape().to_vec());
        let logprobs = TensorData::dense(TensorValues::Float32(output.logprobs), shape)
            .map_err(|e| Error::Invalid(e.to_string()))?;
        per_datum.push(BTreeMap::from([(
            loss_input::LOGPROBS.to_owned(),
            logprobs,
        )]));
    }
    Ok(ForwardBackwardOutput {
        loss_fn_output_type: "TorchLossReturn".into(),
        loss_fn_outputs: per_datum,
        metrics: BTreeMap::from([("loss:sum".to_owned(), loss)]),
    })
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

fn settings(loss: &LossFn, config: &LossConfig) -> Result<Settings> {
    let known: &[&str] = match loss {
        LossFn::CrossEntropy | LossFn::ImportanceSampling => &[],
        LossFn::Ppo | LossFn::Cispo => &[CLIP_LOW, CLIP_HIGH],
        LossFn::Dro => &[BETA],
        other => {
            return Err(Error::Invalid(format!(
                "loss {other} is not supported by this server: it has cross_entropy, importance_sampling, ppo, cispo and dro"
            )));
        }
    };
    if let Some(unknown) = config.keys().find(|key| !known.contains(&key.as_str())) {
        let takes = if known.is_empty() {
            "no settings".to_owned()
        } else {
            known.join(", ")
        };
        return Err(Error::Invalid(format!(
            "loss {loss} does not take the setting {unknown:?}: it takes {takes}"
        )));
    }
    let clip = |low, high| -> Result<(f32, f32)> {
        let (low, high) = (
            number(config, CLIP_LOW, low)?,
            number(config, CLIP_HIGH, high)?,
        );
        if low > high {
            return Err(Error::Invalid(format!(
                "{CLIP_LOW} {low} is above {CLIP_HIGH} {high}: both are bounds of the ratio"
            )));
        }
        Ok((low, high))
    };
    Ok(match loss {
        LossFn::Ppo => {
            let (low, high) = clip(0.8, 1.2)?;
            Settings::Ppo { low, high }
        }
        LossFn::Cispo => {
            let (low, high) = clip(0.0, 4.0)?;
            Settings::Cispo { low, high }
        }
        LossFn::Dro => Settings::Dro {
            beta: number(config, BETA, DEFAULT_BETA)?,
        },
        LossFn::ImportanceSampling => Settings::ImportanceSampling,
        _ => Settings::CrossEntropy,
    })
}

fn number(config: &LossConfig, key: &str, default: f32) -> Result<f32> {
    match config.get(key) {
        None => Ok(default),
        Some(LossConfigValue::Number(n)) if n.is_finite() && *n >= 0.0 => Ok(*n as f32),
        Some(LossConfigValue::Number(n)) => Err(Error::Invalid(format!(
            "{key} {n} must be a finite number of at least 0"
        ))),
        Some(LossConfigValue::Text(text)) => {
            Err(Error::Invalid(format!("{key} {text:?} must be a number")))
        }
    }
}

fn sequence(
    datum: &Datum,
    settings: Settings,
    loss: &LossFn,
    info: &BaseInfo,
) -> std::result::Result<TrainSequence, String> {
    let tokens = checked_tokens(&datum.model_input, info)?;
    check_names(datum, settings, loss)?;
    let (targets, k, shape) = targets(datum, tokens.len(), info)?;
    let floats = |name: &str| floats(datum, name, &shape);
    let loss = match settings {
        Settings::CrossEntropy => Loss::CrossEntropy {
            // Clients may leave the weights out; then every target counts once.
            weights: match datum.loss_fn_inputs().get(loss_input::WEIGHTS) {
                Some(_) => floats(loss_input::WEIGHTS)?,
                None => vec![1.0; targets.len()],
            },
        },
        _ if k != 1 || shape.len() != 1 => {
            return Err(format!(
                "loss {loss} needs target_tokens of shape [{}], got {shape:?}",
                tokens.len()
            ));
        }
        Settings::ImportanceSampling => Loss::ImportanceSampling {
            logprobs: floats(loss_input::LOGPROBS)?,
            advantages: floats(loss_input::ADVANTAGES)?,
        },
        Settings::Ppo { low, high } => Loss::Ppo {
            logprobs: floats(loss_input::LOGPROBS)?,
            advantages: floats(loss_input::ADVANTAGES)?,
            clip_low: low,
            clip_high: high,
        },
        Settings::Cispo { low, high } => Loss::Cispo {
            logprobs: floats(loss_input::LOGPROBS)?,
            advantages: floats(loss_input::ADVANTAGES)?,
            clip_low: low,
            clip_high: high,
        },
        Settings::Dro { beta } => Loss::Dro {
            logprobs: floats(loss_input::LOGPROBS)?,
            advantages: floats(loss_input::ADVANTAGES)?,
            beta,
        },
    };
    Ok(TrainSequence {
        tokens,
        targets,
        k,
        loss,
    })
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

fn check_names(
    datum: &Datum,
    settings: Settings,
    loss: &LossFn,
) -> std::result::Result<(), String> {
    let (needed, takes): (&[&str], &[&str]) = match settings {
        Settings::CrossEntropy => (
            &[loss_input::TARGET_TOKENS],
            &[loss_input::TARGET_TOKENS, loss_input::WEIGHTS],
        ),
        _ => {
            let all = &[
                loss_input::TARGET_TOKENS,
                loss_input::LOGPROBS,
                loss_input::ADVANTAGES,
            ];
            (all, all)
        }
    };
    let inputs = datum.loss_fn_inputs();
    if let Some(unknown) = inputs.keys().find(|key| !takes.contains(&key.as_str())) {
        return Err(format!(
            "loss {loss} does not take the input {unknown:?}: it takes {}",
            takes.join(", ")
        ));
    }
    match needed.iter().find(|key| !inputs.contains_key(**key)) {
        Some(missing) => Err(format!("loss {loss} needs the input {missing:?}")),
        None => Ok(()),
    }
}

/// Targets, targets per position, and the shape that the other inputs must have.
fn targets(
    datum: &Datum,
    n_tokens: usize,
    info: &BaseInfo,
) -> std::result::Result<(Vec<u32>, usize, Vec<usize>), String> {
    let name = loss_input::TARGET_TOKENS;
    let Some(tensor) = datum.loss_fn_inputs().get(name) else {
        return Err(format!("the input {name:?} is missing"));
    };
    let k = match tensor.shape() {
        &[n] if n == n_tokens => 1,
        &[n, k] if n == n_tokens && k > MAX_TARGETS => {
            return Err(format!(
                "{name} has {k} targets per token: at most {MAX_TARGETS} are taken"
            ));
        }
        &[n, k] if n == n_tokens && k > 0 => k,
        shape => {
            return Err(format!(
                "{name} of shape {shape:?} for {n_tokens} input tokens: it must be [{n_tokens}] or [{n_tokens}, k]"
            ));
        }
    };
    // Padding is filled in only once the shape is known to fit.
    let tensor = tensor.to_dense();
    let Some(values) = tensor.as_ints() else {
        return Err(format!("{name} must be int64, got float32"));
    };
    check_range(name, values.iter().copied(), info)?;
    let targets = values.iter().map(|&t| t as u32).collect();
    Ok((targets, k, tensor.shape().to_vec()))
}

fn floats(datum: &Datum, name: &str, shape: &[usize]) -> std::result::Result<Vec<f32>, String> {
    let Some(tensor) = datum.loss_fn_inputs().get(name) else {
        return Err(format!("the input {name:?} is missing"));
    };
    if tensor.shape() != shape {
        return Err(format!(
            "{name} of shape {:?} for target_tokens of shape {shape:?}",
            tensor.shape()
        ));
    }
    let tensor = tensor.to_dense();
    let Some(values) = tensor.as_floats() else {
        return Err(format!("{name} must be float32, got int64"));
    };
    match values.iter().position(|v| !v.is_finite()) {
        Some(at) => Err(format!(
            "{name} is {} at position {at}: it must be finite",
            values.get(at).copied().unwrap_or(f32::NAN)
        )),
        None => Ok(values.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tinker_types::SparseIndex;

    fn info() -> BaseInfo {
        BaseInfo {
            vocab_size: 10,
            max_context: 4,
            hidden_size: 8,
            n_layers: 1,
            n_parameters: 1,
            architecture: "x".into(),
            precision: "cpu".into(),
        }
    }

    fn datum(tokens: &[u32], inputs: &[(&str, TensorData)]) -> Datum {
        let named = inputs
            .iter()
            .map(|(n, t)| ((*n).to_owned(), t.clone()))
            .collect();
        Datum::from_wire(ModelInput::from_tokens(tokens.to_vec()), named)
    }

    fn request(loss: LossFn, datum: Datum) -> ForwardBackwardRequest {
        ForwardBackwardRequest {
            model_id: "r".parse().unwrap(),
            seq_id: 1,
            data: vec![datum],
            loss_fn: loss,
            loss_fn_config: LossConfig::new(),
            forward_only: false,
        }
    }

    fn refusal(loss: LossFn, datum: Datum) -> String {
        sequences(&request(loss, datum), &info())
            .unwrap_err()
            .to_string()
    }

    fn targets_of(n: usize) -> (&'static str, TensorData) {
        ("target_tokens", TensorData::ints(vec![1; n]))
    }

    fn floats_of(name: &'static str, values: &[f32]) -> (&'static str, TensorData) {
        (name, TensorData::floats(values.to_vec()))
    }

    #[test]
    fn missing_weights_count_every_target_once() {
        let built = sequences(
            &request(LossFn::CrossEntropy, datum(&[1, 2], &[targets_of(2)])),
            &info(),
        );

        let expected = Loss::CrossEntropy {
            weights: vec![1.0, 1.0],
        };
        assert_eq!(built.unwrap()[0].loss, expected);
    }

    #[test]
    fn sparse_targets_become_dense() {
        let index = SparseIndex {
            crow_indices: vec![0, 1, 2],
            col_indices: vec![0, 2],
        };
        let sparse = |v: TensorValues| TensorData::sparse(v, vec![2, 3], index.clone()).unwrap();
        let inputs = [
            ("target_tokens", sparse(TensorValues::Int64(vec![5, 6]))),
            ("weights", sparse(TensorValues::Float32(vec![0.5, 0.25]))),
        ];

        let built = sequences(
            &request(LossFn::CrossEntropy, datum(&[1, 2], &inputs)),
            &info(),
        )
        .unwrap();

        assert_eq!(
            (built[0].k, &built[0].targets[..]),
            (3, &[5, 0, 0, 0, 0, 6][..])
        );
        assert_eq!(
            built[0].loss,
            Loss::CrossEntropy {
                weights: vec![0.5, 0.0, 0.0, 0.0, 0.0, 0.25]
            }
        );
    }

    /// A tensor without values, which takes a few bytes on the wire whatever its width.
    fn empty_targets(n_rows: usize, n_cols: usize) -> TensorData {
        let index = SparseIndex {
            crow_indices: vec![0; n_rows + 1],
            col_indices: Vec::new(),
        };
        TensorData::sparse(TensorValues::Int64(Vec::new()), vec![n_rows, n_cols], index).unwrap()
    }

    #[test]
    fn wide_and_many_sparse_tensors_are_refused() {
        let ce = LossFn::CrossEntropy;
        let of_shape = |n, k| datum(&[1, 2], &[("target_tokens", empty_targets(n, k))]);

        assert_eq!(
            refusal(ce.clone(), of_shape(2, 1025)),
            "datum 0: target_tokens has 1025 targets per token: at most 1024 are taken"
        );
        assert_eq!(
            refusal(ce.clone(), of_shape(1, 1 << 20)),
            "datum 0: target_tokens of shape [1, 1048576] for 2 input tokens: it must be [2] or [2, k]"
        );
        let mut many = request(ce.clone(), of_shape(2, 1 << 20));
        many.data = vec![many.data[0].clone(); 33];
        assert_eq!(
            sequences(&many, &info()).unwrap_err().to_string(),
            "datum 32: the tensors of the data up to here have 69206016 cells, more than 67108864: send fewer data at once"
        );
        assert_eq!(
            sequences(&request(ce, of_shape(2, 1024)), &info()).unwrap()[0].k,
            1024
        );
    }

    #[test]
    fn refusals_name_datum_position_and_limit() {
        let ce = LossFn::CrossEntropy;
        let nan = floats_of("weights", &[1.0, f32::NAN]);

        let cases = [
            (
                refusal(ce.clone(), datum(&[1, 10], &[targets_of(2)])),
                "datum 0: token 10 at position 1 is outside the vocabulary of 10 tokens",
            ),
            (
                refusal(ce.clone(), datum(&[1; 5], &[targets_of(5)])),
                "datum 0: 5 tokens do not fit the model's context of 4",
            ),
            (
                refusal(ce.clone(), datum(&[], &[targets_of(0)])),
                "datum 0: the input holds no tokens",
            ),
            (
                refusal(ce.clone(), datum(&[1, 2], &[targets_of(2), nan])),
                "datum 0: weights is NaN at position 1: it must be finite",
            ),
            (
                refusal(ce.clone(), datum(&[1, 2], &[targets_of(3)])),
                "datum 0: target_tokens of shape [3] for 2 input tokens: it must be [2] or [2, k]",
            ),
            (
                refusal(
                    ce.clone(),
                    datum(&[1, 2], &[targets_of(2), floats_of("weights", &[1.0])]),
                ),
                "datum 0: weights of shape [1] for target_tokens of shape [2]",
            ),
            (
                refusal(
                    ce,
                    datum(&[1, 2], &[targets_of(2), floats_of("mask", &[1.0, 1.0])]),
                ),
                "datum 0: loss cross_entropy does not take the input \"mask\": it takes target_tokens, weights",
            ),
            (
                refusal(
                    LossFn::Ppo,
                    datum(
                        &[1, 2],
                        &[targets_of(2), floats_of("logprobs", &[-1.0, -1.0])],
                    ),
                ),
                "datum 0: loss ppo needs the input \"advantages\"",
            ),
        ];

        for (actual, expected) in cases {
            assert_eq!(actual, expected);
        }
    }

    #[test]
    fn policy_losses_have_the_documented_defaults() {
        let settings_of = |loss: &LossFn| settings(loss, &LossConfig::new()).unwrap();

        assert_eq!(
            settings_of(&LossFn::Ppo),
            Settings::Ppo {
                low: 0.8,
                high: 1.2
            }
        );
        assert_eq!(
            settings_of(&LossFn::Cispo),
            Settings::Cispo {
                low: 0.0,
                high: 4.0
            }
        );
        assert_eq!(settings_of(&LossFn::Dro), Settings::Dro { beta: 0.05 });
    }

    #[test]
    fn unknown_losses_and_settings_are_refused() {
        let config = LossConfig::from([("beta".to_owned(), LossConfigValue::Number(1.0))]);

        let error = settings(&LossFn::Ppo, &config).unwrap_err().to_string();
        assert_eq!(
            error,
            "loss ppo does not take the setting \"beta\": it takes clip_low_threshold, clip_high_threshold"
        );
        let error = settings(&LossFn::Gspo, &LossConfig::new())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("gspo is not supported by this server"),
            "{error}"
        );
    }
}
