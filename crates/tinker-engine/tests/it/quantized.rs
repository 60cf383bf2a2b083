//! Quantized weights beside a model whose file holds the values that they stand for.
//!
//! That model is held to PyTorch in `pytorch.rs`; here every result has to have its bits.

use std::path::Path;

use safetensors::Dtype;
use tinker_engine::{Backend, CpuOptions, Precision, Quantization, load_cpu_with};

use crate::common::{ARCHITECTURES, MODELS, Reference, all_modules, dir, tensors, write_tensors};

/// The 16 values of `NormalFloat`, as bitsandbytes has them.
const NF4: [f64; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// What a row of weights becomes.
fn rounded(quantization: Quantization, row: &[f32]) -> Vec<f32> {
    let largest = |block: &[f32]| block.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    match quantization {
        Quantization::Int8 => {
            let scale = largest(row) / 127.0;
            row.iter().map(|x| (x / scale).round() * scale).collect()
        }
        Quantization::Nf4 => {
            let of_block = |block: &[f32]| {
                let scale = largest(block);
                let nearest = |x: &f32| {
                    let values = NF4.map(|value| value as f32);
                    let off = |value: &f32| (x / scale - value).abs();
                    let best = values.iter().min_by(|a, b| off(a).total_cmp(&off(b)));
                    best.unwrap() * scale
                };
                block.iter().map(nearest).collect::<Vec<f32>>()
            };
            row.chunks(64).flat_map(of_block).collect()
        }
    }
}

/// Whether a tensor is of the kind that is quantized.
fn is_layer(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

/// A copy of a model that holds what its weights become.
fn rounded_model(model: &str, quantization: Quantization) -> tempfile::TempDir {
    let (from, to) = (
        dir(model),
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
    );
    std::fs::copy(from.join("config.json"), to.path().join("config.json")).unwrap();
    let mut weights = tensors(&from.join("model.safetensors"));
    let mut n_layers = 0;
    for (name, tensor) in &mut weights {
        if is_layer(name) {
            let rows = tensor.data.chunks(tensor.shape[1]);
            tensor.data = rows.flat_map(|row| rounded(quantization, row)).collect();
            n_layers += 1;
        }
    }
    assert!(n_layers >= 8, "{model} has {n_layers} layers");
    let bytes = |x: f32| x.to_le_bytes().to_vec();
    let file = to.path().join("model.safetensors");
    write_tensors(&file, Dtype::F32, weights.iter(), bytes);
    to
}

/// How the rest of a model is computed.
#[derive(Debug, Clone, Copy)]
struct Way {
    precision: Precision,
    vectors_only: bool,
}

const EXACT: Way = Way {
    precision: Precision::F32,
    vectors_only: false,
};

fn load(dir: &Path, weights: Option<Quantization>, way: Way) -> Box<dyn Backend> {
    let options = CpuOptions {
        threads: 2,
        weights,
        precision: way.precision,
        vectors_only: way.vectors_only,
        ..CpuOptions::default()
    };
    load_cpu_with(dir, &options).unwrap()
}

/// Each model, quantization and unit, with its backend and that of the rounded model.
fn each(check: impl Fn(&str, &mut dyn Backend, &mut dyn Backend)) {
    for model in MODELS.into_iter().chain(ARCHITECTURES) {
        for quantization in Quantization::ALL {
            let plain_dir = rounded_model(model, quantization);
            for precision in Precision::ALL {
                for vectors_only in [false, true] {
                    let way = Way {
                        precision,
                        vectors_only,
                    };
                    let mut quantized = load(&dir(model), Some(quantization), way);
                    let mut plain = load(plain_dir.path(), None, way);
                    let name = format!("{model} {quantization:?}, {way:?}");
                    check(&name, &mut *quantized, &mut *plain);
                }
            }
        }
    }
}

#[test]
fn training_has_the_bits_of_the_rounded_model() {
    each(|name, quantized, plain| {
        let model = name.split(' ').next().unwrap();
        let reference = Reference::of(model);
        let batch = reference.batch("cross_entropy");
        let train = |backend: &mut dyn Backend| {
            let adapter = reference.import(backend);
            let outputs = backend.forward_backward(adapter, &batch).unwrap();
            let logprobs: Vec<Vec<f32>> = outputs.into_iter().map(|o| o.logprobs).collect();
            (logprobs, backend.export_adapter(adapter).unwrap().gradient)
        };

        let (found, wanted) = (train(quantized), train(plain));

        assert!(found == wanted, "{name}");
        assert!(found.1.values().any(|g| g.iter().any(|x| *x != 0.0)));
        let original = train(&mut *load(&dir(model), None, EXACT));
        assert!(found.0 != original.0, "{name}: nothing was quantized");
    });
}

#[test]
fn sampling_has_the_bits_of_the_rounded_model() {
    let prompt: Vec<u32> = (0..300).map(|i| (i * 37 + 11) % 50).collect();
    each(|name, quantized, plain| {
        let run = |backend: &mut dyn Backend| {
            let adapter = backend.create_adapter(&all_modules(5)).unwrap();
            let mut logits = Vec::new();
            let mut rows = Vec::new();
            for (owner, n) in [(Some(adapter), 300), (None, 7), (Some(adapter), 40)] {
                let slot = backend.open_slot(owner, 400).unwrap();
                let prefill = backend.prefill(slot, &prompt[..n], true).unwrap();
                logits.extend(prefill.next_logits);
                logits.extend(prefill.prompt_logprobs);
                rows.push((slot, 3));
            }
            logits.extend(backend.decode_step(&rows).unwrap());
            logits.extend(backend.decode_step(&rows[1..2]).unwrap());
            logits
        };

        assert!(run(quantized) == run(plain), "{name}");
    });
}

#[test]
fn the_precision_of_a_model_names_its_weights() {
    for quantization in Quantization::ALL {
        let backend = load(&dir("llama"), Some(quantization), EXACT);
        let precision = &backend.info().precision;
        let suffix = format!(", weights {}", quantization.name());
        assert!(precision.ends_with(&suffix), "{precision}");
    }
}
