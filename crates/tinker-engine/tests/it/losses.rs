//! Losses and optimizers beside PyTorch, and losses of whole sequences through a model.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use tinker_engine::{
    AdamW, AdapterState, Bound, Clip, Computed, Dimuon, Error, Evaluation, LoraSpec, Loss,
    SequenceLoss, TrainSequence,
};

use crate::common::{LOADS, Reference, floats, load, relative};

fn reference(name: &str) -> Value {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/losses");
    let text = std::fs::read_to_string(dir.join(format!("{name}.json"))).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()[name].take()
}

fn bound(value: &Value) -> Bound {
    match value.as_f64() {
        Some(bound) => Bound::All(bound as f32),
        None => Bound::Each(floats(value)),
    }
}

fn loss_of(case: &Value) -> Loss {
    let (logprobs, advantages) = (floats(&case["q"]), floats(&case["a"]));
    let clip = || Clip {
        low: bound(&case["low"]),
        high: bound(&case["high"]),
    };
    match case["loss"].as_str().unwrap() {
        "cross_entropy" => Loss::CrossEntropy {
            weights: floats(&case["weights"]),
        },
        "importance_sampling" => Loss::ImportanceSampling {
            logprobs,
            advantages,
        },
        "ppo" => Loss::Ppo {
            logprobs,
            advantages,
            clip: clip(),
        },
        "cispo" => Loss::Cispo {
            logprobs,
            advantages,
            clip: clip(),
        },
        "dro" => Loss::Dro {
            logprobs,
            advantages,
            beta: case["beta"].as_f64().unwrap() as f32,
        },
        "gspo" => Loss::Gspo {
            logprobs,
            advantages,
            in_ratio: floats(&case["mask"]).iter().map(|x| *x != 0.0).collect(),
            clip: clip(),
        },
        other => panic!("no loss {other}"),
    }
}

#[test]
fn every_loss_has_the_values_and_derivatives_of_autograd() {
    let cases = reference("losses");
    let mut seen = BTreeMap::<&str, usize>::new();
    for (i, case) in cases.as_array().unwrap().iter().enumerate() {
        let name = case["loss"].as_str().unwrap();
        *seen.entry(name).or_default() += 1;

        let evaluated = loss_of(case).evaluate(&floats(&case["l"])).unwrap();

        let value = case["value"].as_f64().unwrap();
        let off = (evaluated.total - value).abs() / value.abs().max(1.0);
        assert!(off < 1e-6, "{i} {name}: {} {value}", evaluated.total);
        for (what, actual, expected) in [
            ("terms", &evaluated.terms, &case["terms"]),
            ("gradient", &evaluated.gradient, &case["gradient"]),
        ] {
            let off = relative(actual, &floats(expected));
            assert!(off < 1e-6, "{i} {name}: {what} off by {off:e}");
        }
    }
    let names = [
        "cispo",
        "cross_entropy",
        "dro",
        "gspo",
        "importance_sampling",
        "ppo",
    ];
    assert!(seen.keys().eq(&names), "{seen:?}");
}

/// The reference batch with GSPO, some of whose ratios are clipped.
fn gspo_batch(reference: &Reference) -> Vec<TrainSequence> {
    let mut batch = reference.batch("importance_sampling");
    for (i, sequence) in batch.iter_mut().enumerate() {
        let Loss::ImportanceSampling {
            logprobs,
            advantages,
        } = sequence.loss.clone()
        else {
            panic!("another loss");
        };
        sequence.loss = Loss::Gspo {
            in_ratio: (0..logprobs.len()).map(|j| j % 3 != 1).collect(),
            logprobs,
            advantages,
            clip: if i % 2 == 0 {
                Clip::between(0.9, 1.1)
            } else {
                Clip::between(0.0, 100.0)
            },
        };
    }
    batch
}

#[test]
fn a_loss_of_whole_sequences_goes_back_through_its_derivatives() {
    for load in LOADS {
        let reference = Reference::of("qwen3");
        let mut backend = load("qwen3", 2);
        let adapter = reference.import(&mut *backend);
        let batch = gspo_batch(&reference);

        let outputs = backend.forward_backward(adapter, &batch).unwrap();

        let mut linear = batch.clone();
        for (sequence, output) in linear.iter_mut().zip(&outputs) {
            let evaluated = sequence.loss.evaluate(&output.logprobs).unwrap();
            assert_eq!(evaluated.total, output.loss);
            sequence.loss = Loss::CrossEntropy {
                weights: evaluated.gradient.iter().map(|c| -c).collect(),
            };
        }
        let other = reference.import(&mut *backend);
        backend.forward_backward(other, &linear).unwrap();
        let (a, b) = (
            backend.export_adapter(adapter).unwrap(),
            backend.export_adapter(other).unwrap(),
        );
        assert!(!a.gradient.is_empty());
        assert_eq!(a.gradient, b.gradient);
        let scored = backend.forward(Some(adapter), &batch).unwrap();
        for (scored, output) in scored.iter().zip(&outputs) {
            assert!((scored.loss - output.loss).abs() < 1e-4 * (1.0 + output.loss.abs()));
        }
    }
}

/// The mean of the squares of the log-probabilities.
#[derive(Debug)]
struct MeanSquare;

impl SequenceLoss for MeanSquare {
    fn evaluate(&self, logprobs: &[f32]) -> Result<Evaluation, String> {
        let n = logprobs.len() as f32;
        if n > 60.0 {
            return Err(format!("{n} are too many"));
        }
        let total = logprobs.iter().map(|l| f64::from(*l).powi(2)).sum::<f64>() / f64::from(n);
        Ok(Evaluation {
            total,
            gradient: logprobs.iter().map(|l| 2.0 * l / n).collect(),
            ..Evaluation::default()
        })
    }
}

#[test]
fn a_computed_loss_trains_and_its_error_leaves_the_gradient() {
    let reference = Reference::of("llama");
    let mut backend = load("llama", 2);
    let adapter = reference.import(&mut *backend);
    let mut batch = reference.batch("cross_entropy");
    for sequence in &mut batch {
        sequence.loss = Loss::Computed(Computed(Arc::new(MeanSquare)));
    }
    let step = AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.0,
        grad_clip_norm: 0.0,
    };

    let error = backend.forward_backward(adapter, &batch).unwrap_err();

    assert_eq!(error.to_string(), "sequence 4: 70 are too many");
    assert!(matches!(error, Error::Invalid(_)));
    assert!(backend.export_adapter(adapter).unwrap().gradient.is_empty());
    batch.pop();
    let mut losses = Vec::new();
    for _ in 0..5 {
        let outputs = backend.forward_backward(adapter, &batch).unwrap();
        losses.push(outputs.iter().map(|o| o.loss).sum::<f64>());
        backend.optim_step(adapter, &step.into()).unwrap();
    }
    assert!(losses.is_sorted_by(|a, b| a > b), "{losses:?}");
}

#[test]
fn a_cleared_gradient_is_as_if_it_had_never_been() {
    let reference = Reference::of("llama");
    let mut backend = load("llama", 2);
    let adapter = reference.import(&mut *backend);
    let before = backend.export_adapter(adapter).unwrap();
    backend
        .forward_backward(adapter, &reference.batch("ppo"))
        .unwrap();

    backend.clear_gradient(adapter).unwrap();

    assert_eq!(backend.export_adapter(adapter).unwrap(), before);
    backend.drop_adapter(adapter);
    assert!(matches!(
        backend.clear_gradient(adapter),
        Err(Error::Unknown { .. })
    ));
}

const MODULE: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_";

fn name(factor: &str) -> String {
    format!("{MODULE}{factor}.weight")
}

/// The reference's first weights in one module of a model; the rest is zero.
fn dimuon_state(reference: &Value, template: &AdapterState) -> AdapterState {
    let mut state = template.clone();
    for (name, tensor) in &mut state.weights {
        tensor.data.fill(0.0);
        let zeros = vec![0.0; tensor.data.len()];
        state.gradient.insert(name.clone(), zeros);
    }
    for factor in ["A", "B"] {
        let tensor = state.weights.get_mut(&name(factor)).unwrap();
        tensor.data = floats(&reference["start"][factor]);
    }
    state
}

#[test]
fn dimuon_takes_the_steps_of_a_singular_value_decomposition() {
    let reference = reference("dimuon");
    let number = |key: &str| reference["settings"][key].as_f64().unwrap() as f32;
    let step = Dimuon {
        learning_rate: number("learning_rate"),
        beta1: number("beta1"),
        grad_clip_norm: number("grad_clip_norm"),
        damping: number("damping"),
        rank_exponent: number("rank_exponent"),
    };
    let mut backend = load("llama", 2);
    let spec = LoraSpec {
        rank: 4,
        seed: 1,
        train_attn: true,
        train_mlp: false,
        train_unembed: false,
    };
    let fresh = backend.create_adapter(&spec).unwrap();
    let template = backend.export_adapter(fresh).unwrap();
    let mut state = dimuon_state(&reference, &template);
    let zeros = state.gradient.clone();
    for expected in reference["steps"].as_array().unwrap() {
        state.gradient.clone_from(&zeros);
        for factor in ["A", "B"] {
            let gradient = floats(&expected["gradient"][factor]);
            state.gradient.insert(name(factor), gradient);
        }
        let adapter = backend.import_adapter(&state).unwrap();

        let report = backend.optim_step(adapter, &step.into()).unwrap();

        let norm = expected["grad_norm"].as_f64().unwrap();
        assert!((report.grad_norm - norm).abs() / norm < 1e-6);
        state = backend.export_adapter(adapter).unwrap();
        for factor in ["A", "B"] {
            let weights = floats(&expected["weights"][factor]);
            let off = relative(&state.weights[&name(factor)].data, &weights);
            assert!(off < 1e-5, "{factor}: off by {off:e}");
            let (momentum, second) = &state.moments[&name(factor)];
            let wanted = floats(&expected["momentum"][factor]);
            assert!(relative(momentum, &wanted) < 1e-6);
            assert!(second.is_empty());
        }
    }
    assert_eq!(state.step, 2);
}

#[test]
fn a_dimuon_step_that_overflows_or_is_out_of_range_leaves_the_adapter() {
    let reference = Reference::of("llama");
    let mut backend = load("llama", 2);
    let adapter = reference.import(&mut *backend);
    backend
        .forward_backward(adapter, &reference.batch("cross_entropy"))
        .unwrap();
    let before = backend.export_adapter(adapter).unwrap();
    let good = Dimuon::new(0.01);
    let cases = [
        (
            Dimuon {
                rank_exponent: -1.0,
                ..Dimuon::new(f32::MAX)
            },
            "the optimizer step takes weights or moments of",
        ),
        (
            Dimuon {
                damping: 0.0,
                ..good
            },
            "damping is 0, it must be above 0",
        ),
        (
            Dimuon { beta1: 1.0, ..good },
            "beta1 is 1, it must be in [0, 1)",
        ),
        (
            Dimuon::new(f32::NAN),
            "learning_rate is NaN, it must be at least 0",
        ),
    ];
    for (step, expected) in cases {
        let error = backend.optim_step(adapter, &step.into()).unwrap_err();

        let text = error.to_string();
        assert!(text.starts_with(expected), "{text}");
        assert_eq!(backend.export_adapter(adapter).unwrap(), before);
    }
    assert_eq!(backend.optim_step(adapter, &good.into()).unwrap().step, 1);
}

#[test]
fn moments_of_one_optimizer_are_not_used_by_the_other() {
    let reference = Reference::of("llama");
    let mut backend = load("llama", 2);
    let adapter = reference.import(&mut *backend);
    let batch = reference.batch("cross_entropy");
    backend.forward_backward(adapter, &batch).unwrap();
    backend
        .optim_step(adapter, &Dimuon::new(0.01).into())
        .unwrap();
    let adamw = AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.0,
        grad_clip_norm: 0.0,
    };

    let error = backend.optim_step(adapter, &adamw.into()).unwrap_err();

    assert_eq!(
        error.to_string(),
        "the adapter was trained with dimuon, a step of adamw cannot follow: load its weights without optimizer"
    );
    let mut state = backend.export_adapter(adapter).unwrap();
    let (name, (_, second)) = state.moments.iter_mut().next().unwrap();
    assert!(second.is_empty(), "{name}");
    *second = vec![0.0; 1];
    let error = backend.import_adapter(&state).unwrap_err();
    assert!(error.to_string().contains("some are missing"), "{error}");
}

#[test]
fn dimuon_gives_the_same_bits_on_any_number_of_threads() {
    let reference = Reference::of("qwen3");
    let after = |threads| {
        let mut backend = load("qwen3", threads);
        let adapter = reference.import(&mut *backend);
        for _ in 0..2 {
            backend
                .forward_backward(adapter, &reference.batch("ppo"))
                .unwrap();
            backend
                .optim_step(adapter, &Dimuon::new(0.01).into())
                .unwrap();
        }
        backend.export_adapter(adapter).unwrap()
    };

    let alone = after(1);

    assert_eq!(after(2), alone);
    assert_eq!(after(3), alone);
}
