//! The bf16 mode: as near to float32 as PyTorch's but for one mixture of experts, and as little moved by
//! anything else as float32 is.

use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;
use tinker_engine::{Backend, CpuOptions, Precision, TrainSequence, load_cpu_with};

use crate::common::{
    ARCHITECTURES, MODELS, Reference, all_modules, dir, floats, relative, tensors, train,
    write_tensors,
};

fn load_as(dir: &Path, precision: Precision, threads: usize, on_vectors: bool) -> Box<dyn Backend> {
    let options = CpuOptions {
        threads,
        precision,
        vectors_only: on_vectors,
        ..CpuOptions::default()
    };
    load_cpu_with(dir, &options).unwrap()
}

fn load(model: &str, threads: usize) -> Box<dyn Backend> {
    load_as(&dir(model), Precision::Bf16, threads, false)
}

fn models() -> impl Iterator<Item = &'static str> {
    MODELS.into_iter().chain(ARCHITECTURES)
}

/// What PyTorch in bf16 is off by, made by `fixtures/numerics/bf16.py`.
fn distances_of_pytorch() -> Value {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("../../fixtures/numerics/bf16.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn results_are_nearer_to_float32_than_those_of_pytorch_but_for_one_mixture_of_experts() {
    let allowed = distances_of_pytorch();
    for model in models() {
        let (reference, allowed) = (Reference::of(model), &allowed[model]);
        let allowed = |key: &str| allowed[key].as_f64().unwrap();
        let batch = reference.batch("cross_entropy");
        let wanted = &reference.json["losses"]["cross_entropy"]["logprobs"];
        let wanted: Vec<f32> = (0..batch.len()).flat_map(|i| floats(&wanted[i])).collect();
        let gradients = reference.tensors("grad_cross_entropy");
        for on_vectors in [false, true] {
            let mut backend = load_as(&dir(model), Precision::Bf16, 2, on_vectors);

            let (logprobs, state) = train(&mut *backend, &reference, &[&batch]);

            let off = relative(&logprobs.concat(), &wanted);
            // A token near the border between two experts may go to the other.
            let experts = if model == "qwen3_moe_mixed" { 3.0 } else { 1.0 };
            let allowed = |key: &str| experts * allowed(key);
            assert!(off < allowed("logprobs"), "{model}: off by {off:e}");
            assert!(off > 1e-5, "{model}: nothing was rounded");
            let mut off: Vec<f64> = gradients
                .iter()
                .map(|(name, wanted)| relative(&state.gradient[name], &wanted.data))
                .collect();
            off.sort_by(f64::total_cmp);
            let (median, worst) = (off[off.len() / 2], off[off.len() - 1]);
            assert!(median < allowed("gradient_median"), "{model}: {median:e}");
            assert!(worst < allowed("gradient_worst"), "{model}: {worst:e}");
        }
    }
}

#[test]
fn weights_of_float32_are_those_rounded_to_bf16() {
    for model in MODELS {
        let reference = Reference::of(model);
        let batch = reference.batch("cross_entropy");
        let rounded = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let to = rounded.path();
        std::fs::copy(dir(model).join("config.json"), to.join("config.json")).unwrap();
        let mut weights = tensors(&dir(model).join("model.safetensors"));
        for (name, tensor) in &mut weights {
            let is_factor = tensor.shape.len() == 2 && !name.contains("embed_tokens");
            // A tied head is a factor too.
            if is_factor || model == "qwen3" {
                let round = |x: &mut f32| *x = half::bf16::from_f32(*x).to_f32();
                if tensor.shape.len() == 2 {
                    tensor.data.iter_mut().for_each(round);
                }
            }
        }
        let bytes = |x: f32| x.to_le_bytes().to_vec();
        let file = to.join("model.safetensors");
        write_tensors(&file, Dtype::F32, weights.iter(), bytes);
        for on_vectors in [false, true] {
            let run = |dir: &Path| {
                let mut backend = load_as(dir, Precision::Bf16, 2, on_vectors);
                train(&mut *backend, &reference, &[&batch])
            };
            assert!(run(to) == run(&dir(model)), "{model}");
        }
    }
}

#[test]
fn threads_batch_mates_and_calls_do_not_change_a_training_step() {
    for model in models() {
        let reference = Reference::of(model);
        let batch = reference.batch("cross_entropy");
        let whole = train(&mut *load(model, 1), &reference, &[&batch]);
        for threads in [2, 3] {
            let again = train(&mut *load(model, threads), &reference, &[&batch]);
            assert!(again == whole, "{model}, {threads} threads");
        }
        let single: Vec<&[TrainSequence]> = batch.chunks(1).collect();
        let again = train(&mut *load(model, 2), &reference, &single);
        assert!(again == whole, "{model}, one by one");
    }
}

#[test]
fn sampling_has_the_bits_of_scoring_whatever_the_chunks_and_mates() {
    let prompt: Vec<u32> = (0..300).map(|i| (i * 37 + 11) % 50).collect();
    for model in models() {
        let mut backend = load(model, 2);
        let adapter = backend.create_adapter(&all_modules(5)).unwrap();
        let slot = backend.open_slot(Some(adapter), 400).unwrap();
        let whole = backend.prefill(slot, &prompt, true).unwrap();

        let mates = [Some(adapter), None, Some(adapter)].map(|owner| {
            let slot = backend.open_slot(owner, 400).unwrap();
            backend.prefill(slot, &prompt[..299], false).unwrap();
            slot
        });
        let rows = mates.map(|slot| (slot, prompt[299]));
        let together = backend.decode_step(&rows).unwrap();
        let vocab = backend.info().vocab_size;
        assert!(together[..vocab] == whole.next_logits, "{model}");
        assert!(together[2 * vocab..] == whole.next_logits, "{model}");

        let sequence = TrainSequence {
            tokens: prompt[..299].to_vec(),
            targets: prompt[1..].to_vec(),
            k: 1,
            loss: tinker_engine::Loss::CrossEntropy {
                weights: vec![1.0; 299],
            },
        };
        let scored = backend.forward(Some(adapter), &[sequence]).unwrap();
        assert!(scored[0].logprobs == whole.prompt_logprobs, "{model}");
    }
}

#[test]
fn the_precision_of_a_model_is_named() {
    for (precision, name) in [(Precision::F32, " f32"), (Precision::Bf16, " bf16")] {
        for on_vectors in [false, true] {
            let backend = load_as(&dir("llama"), precision, 1, on_vectors);
            let found = &backend.info().precision;
            assert!(found.ends_with(name), "{found}");
        }
    }
}
