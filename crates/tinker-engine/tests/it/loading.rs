//! Weights of 16 bits and in several files.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use tinker_engine::load_cpu;

use crate::common::{ARCHITECTURES, MODELS, all_modules, dir, load, tensors, write_tensors};

/// Logits and prompt log-probs of a model directory.
fn answer(dir: &Path) -> tinker_engine::Prefill {
    let mut backend = load_cpu(dir, 2).unwrap();
    let slot = backend.open_slot(None, 20).unwrap();
    backend.prefill(slot, &[3, 1, 4, 1, 5, 9], true).unwrap()
}

/// Compares a model in three shards of `dtype` with the same numbers in one file of float32.
fn check(model: &str, dtype: Dtype, bytes: impl Fn(f32) -> Vec<u8>, round: impl Fn(f32) -> f32) {
    let (sharded, whole) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for copy in [&sharded, &whole] {
        let config = dir(model).join("config.json");
        std::fs::copy(config, copy.path().join("config.json")).unwrap();
    }
    let mut weights = tensors(&dir(model).join("model.safetensors"));
    let mut map = BTreeMap::new();
    for shard in 0..3 {
        let file = format!("model-{shard}-of-3.safetensors");
        let part = weights.iter().enumerate().filter(|(i, _)| i % 3 == shard);
        map.extend(
            part.clone()
                .map(|(_, (name, _))| (name.clone(), file.clone())),
        );
        write_tensors(
            &sharded.path().join(file),
            dtype,
            part.map(|(_, t)| t),
            &bytes,
        );
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    std::fs::write(sharded.path().join("model.safetensors.index.json"), index).unwrap();
    for value in weights.values_mut().flat_map(|tensor| &mut tensor.data) {
        *value = round(*value);
    }
    let single = whole.path().join("model.safetensors");
    write_tensors(&single, Dtype::F32, weights.iter(), |x| {
        x.to_le_bytes().to_vec()
    });

    assert_eq!(
        answer(sharded.path()),
        answer(whole.path()),
        "{model} {dtype:?}"
    );
    // The smaller models are of bf16 as they are.
    if MODELS.contains(&model) {
        assert_ne!(
            answer(sharded.path()),
            answer(&dir(model)),
            "{model} {dtype:?}"
        );
    }
}

#[test]
fn shards_of_16_bits_load_as_their_rounded_values() {
    for model in MODELS.into_iter().chain(ARCHITECTURES) {
        check(
            model,
            Dtype::BF16,
            |x| bf16::from_f32(x).to_le_bytes().to_vec(),
            |x| bf16::from_f32(x).to_f32(),
        );
        check(
            model,
            Dtype::F16,
            |x| f16::from_f32(x).to_le_bytes().to_vec(),
            |x| f16::from_f32(x).to_f32(),
        );
    }
}

#[test]
fn an_adapter_takes_the_memory_of_its_weights_in_both_orientations() {
    let mut backend = load("llama", 1);
    let adapter = backend.create_adapter(&all_modules(4)).unwrap();
    let weights = backend.export_adapter(adapter).unwrap().weights;
    let n: usize = weights.values().map(|tensor| tensor.data.len()).sum();

    let bytes = backend.adapter_bytes(adapter);

    assert!(bytes >= 2 * n * size_of::<f32>(), "{bytes} for {n} weights");
    backend.drop_adapter(adapter);
    assert_eq!(backend.adapter_bytes(adapter), 0);
}
