//! Adapters as safetensors files: the weights by PEFT name, and the optimizer's state beside them.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tinker_engine::{AdapterState, HostTensor, LoraSpec};

use crate::error::{Error, Result};

/// Name of the weights file, as PEFT expects it.
pub(crate) const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Name of the file with moments and accumulated gradient.
pub(crate) const OPTIMIZER_FILE: &str = "optimizer.safetensors";

const FIRST: &str = ".exp_avg";
const SECOND: &str = ".exp_avg_sq";
const GRADIENT: &str = ".grad";

/// The bytes of the weights file. Equal weights give equal bytes.
pub(crate) fn encode_weights(state: &AdapterState) -> Result<Vec<u8>> {
    let tensors = state
        .weights
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.shape.clone(), tensor.data.as_slice()));
    encode(tensors)
}

/// The bytes of the optimizer file; the step is kept elsewhere.
pub(crate) fn encode_optimizer(state: &AdapterState) -> Result<Vec<u8>> {
    let moments = state
        .moments
        .iter()
        .flat_map(|(name, (first, second))| [(name, FIRST, first), (name, SECOND, second)])
        // An optimizer without second moments.
        .filter(|(_, suffix, values)| *suffix == FIRST || !values.is_empty());
    let gradient = state.gradient.iter().map(|(name, g)| (name, GRADIENT, g));
    encode(
        moments
            .chain(gradient)
            .map(|(name, suffix, data)| (format!("{name}{suffix}"), vec![data.len()], &data[..])),
    )
}

/// Puts an adapter together from its files; without `optimizer` it starts afresh at step 0.
///
/// # Errors
/// If a file is not what [`encode_weights`] or [`encode_optimizer`] wrote.
pub(crate) fn decode_state(
    dir: &Path,
    spec: LoraSpec,
    weights: &[u8],
    optimizer: Option<(&[u8], u64)>,
) -> Result<AdapterState> {
    let mut state = AdapterState {
        spec,
        weights: decode(&dir.join(WEIGHTS_FILE), weights)?,
        moments: BTreeMap::new(),
        gradient: BTreeMap::new(),
        step: optimizer.map_or(0, |(_, step)| step),
    };
    let Some((bytes, _step)) = optimizer else {
        return Ok(state);
    };
    for (name, tensor) in decode(&dir.join(OPTIMIZER_FILE), bytes)? {
        if let Some(name) = name.strip_suffix(SECOND) {
            state.moments.entry(name.to_owned()).or_default().1 = tensor.data;
        } else if let Some(name) = name.strip_suffix(FIRST) {
            state.moments.entry(name.to_owned()).or_default().0 = tensor.data;
        } else if let Some(name) = name.strip_suffix(GRADIENT) {
            state.gradient.insert(name.to_owned(), tensor.data);
        }
    }
    Ok(state)
}

/// The module names an adapter touches, such as `q_proj`, for `target_modules`.
pub(crate) fn target_modules(state: &AdapterState) -> Vec<String> {
    let mut names: Vec<String> = state
        .weights
        .keys()
        .filter_map(|key| key.strip_suffix(".lora_A.weight"))
        .filter_map(|path| path.rsplit('.').next())
        .map(str::to_owned)
        .collect();
    names.sort();
    names.dedup();
    names
}

fn encode<'a>(tensors: impl Iterator<Item = (String, Vec<usize>, &'a [f32])>) -> Result<Vec<u8>> {
    let owned: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .map(|(name, shape, data)| (name, shape, to_bytes(data)))
        .collect();
    let fault = |error: safetensors::SafeTensorError| Error::Invalid(error.to_string());
    let views = owned
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(fault)?;
    // One metadata key only: several would be written in random order.
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize(views, Some(metadata)).map_err(fault)
}

fn decode(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, HostTensor>> {
    let fault = |message: String| Error::Corrupt {
        path: path.to_owned(),
        message,
    };
    let file = SafeTensors::deserialize(bytes).map_err(|e| fault(e.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        if view.dtype() != Dtype::F32 {
            return Err(fault(format!(
                "tensor {name} is {:?}, not F32",
                view.dtype()
            )));
        }
        let tensor = HostTensor {
            shape: view.shape().to_vec(),
            data: from_bytes(view.data()),
        };
        tensors.insert(name.to_owned(), tensor);
    }
    Ok(tensors)
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> AdapterState {
        let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        AdapterState {
            spec: LoraSpec {
                rank: 2,
                seed: 1,
                train_attn: true,
                train_mlp: false,
                train_unembed: false,
            },
            weights: [(
                name.to_owned(),
                HostTensor {
                    shape: vec![2, 3],
                    data: vec![1.0, -0.0, 3.5, f32::MIN_POSITIVE, 5.0, 6.0],
                },
            )]
            .into(),
            moments: [(name.to_owned(), (vec![0.25; 6], vec![0.5; 6]))].into(),
            gradient: [(name.to_owned(), vec![-1.0; 6])].into(),
            step: 7,
        }
    }

    #[test]
    fn a_state_comes_back_bit_for_bit() {
        let before = state();
        let weights = encode_weights(&before).unwrap();
        let optimizer = encode_optimizer(&before).unwrap();

        let after = decode_state(Path::new("d"), before.spec, &weights, Some((&optimizer, 7)));

        assert_eq!(after.unwrap(), before);
    }

    #[test]
    fn without_optimizer_only_the_weights_come_back() {
        let before = state();
        let weights = encode_weights(&before).unwrap();

        let after = decode_state(Path::new("d"), before.spec, &weights, None).unwrap();

        assert_eq!(
            (after.step, after.moments.len(), after.gradient.len()),
            (0, 0, 0)
        );
        assert_eq!(after.weights, before.weights);
    }

    #[test]
    fn names_the_modules_for_peft() {
        assert_eq!(target_modules(&state()), ["q_proj"]);
    }

    #[test]
    fn a_damaged_file_is_named() {
        let error = decode_state(Path::new("/c"), state().spec, b"nonsense", None).unwrap_err();

        assert!(
            error
                .to_string()
                .starts_with("/c/adapter_model.safetensors is damaged"),
            "{error}"
        );
    }
}
