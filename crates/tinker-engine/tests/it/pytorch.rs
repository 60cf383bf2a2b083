//! The engine beside PyTorch: losses, log-probabilities, gradients, AdamW, greedy decoding.

use serde_json::Value;
use tinker_engine::AdamW;

use crate::common::{
    ARCHITECTURES, LOSSES, MODELS, Reference, floats, load, on_every_device, on_every_unit,
    relative, tokens,
};

/// Tolerance in relative L2; the reference's own rounding is below 2e-6.
const TOLERANCE: f64 = 1e-5;

/// The losses that a model has references of.
fn losses_of(model: &str) -> &'static [&'static str] {
    if MODELS.contains(&model) {
        &LOSSES
    } else {
        &["cross_entropy"]
    }
}

#[test]
fn losses_logprobs_and_gradients_agree() {
    for (model, load) in on_every_unit(MODELS.into_iter().chain(ARCHITECTURES)) {
        let reference = Reference::of(model);
        let mut backend = load(model, 2);
        for loss in losses_of(model) {
            let adapter = reference.import(&mut *backend);
            let expected = &reference.json["losses"][loss];

            let outputs = backend
                .forward_backward(adapter, &reference.batch(loss))
                .unwrap();

            let total: f64 = outputs.iter().map(|o| o.loss).sum();
            let wanted = expected["loss"].as_f64().unwrap();
            assert!(
                (total - wanted).abs() / wanted.abs() < TOLERANCE,
                "{model} {loss}: {total}"
            );
            for (i, output) in outputs.iter().enumerate() {
                let off = relative(&output.logprobs, &floats(&expected["logprobs"][i]));
                assert!(
                    off < TOLERANCE,
                    "{model} {loss} sequence {i}: log-probs off by {off:e}"
                );
            }
            let gradient = backend.export_adapter(adapter).unwrap().gradient;
            let references = reference.tensors(&format!("grad_{loss}"));
            assert!(gradient.keys().eq(references.keys()), "{model} {loss}");
            for (name, tensor) in references {
                let off = relative(&gradient[&name], &tensor.data);
                assert!(
                    off < TOLERANCE,
                    "{model} {loss} {name}: gradient off by {off:e}"
                );
            }
        }
    }
}

fn adamw(settings: &Value) -> AdamW {
    let number = |key: &str| settings[key].as_f64().unwrap() as f32;
    AdamW {
        learning_rate: number("learning_rate"),
        beta1: number("beta1"),
        beta2: number("beta2"),
        eps: number("eps"),
        weight_decay: number("weight_decay"),
        grad_clip_norm: number("grad_clip_norm"),
    }
}

#[test]
fn an_adamw_step_with_clipping_and_decay_agrees() {
    for model in MODELS {
        let reference = Reference::of(model);
        let settings = &reference.json["adamw"];
        let mut state = reference.adapter();
        // PyTorch's own gradient: where an entry is nearly 0, Adam magnifies rounding of the gradient.
        let gradient = reference.tensors("grad_cross_entropy").into_iter();
        state.gradient = gradient.map(|(name, tensor)| (name, tensor.data)).collect();
        let mut backend = load(model, 2);
        let adapter = backend.import_adapter(&state).unwrap();

        let report = backend
            .optim_step(adapter, &adamw(settings).into())
            .unwrap();

        let norm = settings["steps"][0]["grad_norm"].as_f64().unwrap();
        assert!(
            (report.grad_norm - norm).abs() / norm < 1e-6,
            "{model}: {}",
            report.grad_norm
        );
        let weights = backend.export_adapter(adapter).unwrap().weights;
        for (name, tensor) in reference.tensors("adamw_1") {
            let off = relative(&weights[&name].data, &tensor.data);
            assert!(off < 1e-6, "{model} {name}: off by {off:e}");
        }
    }
}

#[test]
fn three_steps_of_training_agree() {
    for (model, load) in on_every_unit(MODELS) {
        let reference = Reference::of(model);
        let mut backend = load(model, 1);
        let adapter = reference.import(&mut *backend);
        let settings = &reference.json["adamw"];
        let batch = reference.batch("cross_entropy");
        for (i, step) in settings["steps"].as_array().unwrap().iter().enumerate() {
            let outputs = backend.forward_backward(adapter, &batch).unwrap();
            let report = backend
                .optim_step(adapter, &adamw(settings).into())
                .unwrap();

            let loss: f64 = outputs.iter().map(|o| o.loss).sum();
            let wanted = step["loss"].as_f64().unwrap();
            let norm = step["grad_norm"].as_f64().unwrap();
            assert!(
                (loss - wanted).abs() / wanted < 1e-4,
                "{model} step {i}: {loss}"
            );
            assert!(
                (report.grad_norm - norm).abs() / norm < 1e-4,
                "{model} step {i}: {report:?}"
            );
        }
        let weights = backend.export_adapter(adapter).unwrap().weights;
        for (name, tensor) in reference.tensors("adamw_3") {
            let off = relative(&weights[&name].data, &tensor.data);
            assert!(off < 1e-3, "{model} {name}: off by {off:e}");
        }
    }
}

#[test]
fn greedy_decoding_gives_the_same_tokens_and_logprobs() {
    for (model, load) in on_every_device(MODELS.into_iter().chain(ARCHITECTURES)) {
        let reference = Reference::of(model);
        let mut backend = load(model, 2);
        let adapter = reference.import(&mut *backend);
        let greedy = &reference.json["greedy"];
        let (prompt, expected) = (tokens(&greedy["prompt"]), tokens(&greedy["tokens"]));
        let (logprobs, gaps) = (floats(&greedy["logprobs"]), floats(&greedy["gaps"]));
        let slot = backend
            .open_slot(Some(adapter), prompt.len() + expected.len())
            .unwrap();

        let prefill = backend.prefill(slot, &prompt, true).unwrap();

        let off = relative(
            &prefill.prompt_logprobs,
            &floats(&greedy["prompt_logprobs"]),
        );
        assert!(off < TOLERANCE, "{model}: prompt log-probs off by {off:e}");
        let mut logits = prefill.next_logits;
        for (i, token) in expected.iter().enumerate() {
            if gaps[i] < 1e-4 {
                break;
            }
            let (best, logprob) = best(&logits);
            assert_eq!(best, *token, "{model}: token {i}");
            assert!(
                (logprob - f64::from(logprobs[i])).abs() < 1e-4,
                "{model}: token {i}"
            );
            logits = backend.decode_step(&[(slot, *token)]).unwrap();
        }
    }
}

fn best(logits: &[f32]) -> (u32, f64) {
    let (token, max) = logits
        .iter()
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(b.1))
        .expect("a vocabulary");
    let sum: f64 = logits
        .iter()
        .map(|x| (f64::from(*x) - f64::from(*max)).exp())
        .sum();
    (token as u32, -sum.ln())
}
