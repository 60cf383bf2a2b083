//! The tensors of a datum, with their shapes and values checked.

use tinker_engine::BaseInfo;
use tinker_types::{Datum, loss_input};

use super::check_range;
use crate::custom_loss::Input;

/// Most targets per position: a distillation target lists the likeliest tokens, not a vocabulary.
const MAX_TARGETS: usize = 1024;

/// Targets, targets per position, and the shape that the other inputs must have.
pub(super) fn targets(
    datum: &Datum,
    n_tokens: usize,
    info: &BaseInfo,
) -> Result<(Vec<u32>, usize, Vec<usize>), String> {
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

/// An input of any shape and kind, for an uploaded loss.
pub(super) fn input(datum: &Datum, name: &str) -> Result<Input, String> {
    let Some(tensor) = datum.loss_fn_inputs().get(name) else {
        return Err(format!("the input {name:?} is missing"));
    };
    let tensor = tensor.to_dense();
    let shape = tensor.shape().to_vec();
    if let Some(values) = tensor.as_ints() {
        let data = values.iter().map(|v| *v as f64).collect();
        return Ok(Input {
            shape,
            is_int: true,
            data,
        });
    }
    let data = floats(datum, name, &shape)?;
    Ok(Input {
        data: data.into_iter().map(f64::from).collect(),
        is_int: false,
        shape,
    })
}

/// Finite numbers of this shape.
pub(super) fn floats(datum: &Datum, name: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
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
