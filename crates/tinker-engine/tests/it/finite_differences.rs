//! Gradients against differences of the loss, through the whole model.

use std::collections::BTreeSet;

use tinker_engine::{AdapterState, Backend, Loss, TrainSequence};

use crate::common::{MODELS, Reference, load};

fn loss(backend: &mut dyn Backend, state: &AdapterState, batch: &[TrainSequence]) -> f64 {
    let adapter = backend.import_adapter(state).unwrap();
    let outputs = backend.forward(Some(adapter), batch).unwrap();
    backend.drop_adapter(adapter);
    outputs.iter().map(|o| o.loss).sum()
}

/// Checks the derivative along the `n` largest entries of each tensor's gradient; returns the state.
fn check_slopes(
    model: &str,
    state: &AdapterState,
    batch: &[TrainSequence],
    n: usize,
) -> AdapterState {
    let mut backend = load(model, 2);
    let adapter = backend.import_adapter(state).unwrap();
    backend.forward_backward(adapter, batch).unwrap();
    let state = backend.export_adapter(adapter).unwrap();
    for (tensor, gradient) in &state.gradient {
        let direction = largest(gradient, n);
        let squares = direction.iter().map(|(_, g)| g.powi(2));
        let norm = squares.sum::<f64>().sqrt();
        // A step along the gradient raises the loss fastest, so rounding matters least there.
        const STEP: f64 = 2e-3;
        let moved = |step: f64| {
            let mut moved = state.clone();
            moved.gradient.clear();
            let weights = &mut moved.weights.get_mut(tensor).unwrap().data;
            for (i, g) in &direction {
                weights[*i] += (step * g / norm) as f32;
            }
            moved
        };

        let up = loss(&mut *backend, &moved(STEP), batch);
        let down = loss(&mut *backend, &moved(-STEP), batch);

        let slope = (up - down) / (2.0 * STEP);
        assert!(
            (slope - norm).abs() < 0.01 * norm + 0.02,
            "{model} {tensor}: {slope} {norm}"
        );
    }
    state
}

/// The `n` entries of largest magnitude, with their indices.
fn largest(gradient: &[f32], n: usize) -> Vec<(usize, f64)> {
    let mut entries: Vec<_> = gradient.iter().map(|g| f64::from(*g)).enumerate().collect();
    entries.sort_by(|(_, a), (_, b)| b.abs().total_cmp(&a.abs()));
    entries.truncate(n);
    entries
}

#[test]
fn directional_derivatives_of_each_tensor_match_the_gradient() {
    for (model, name) in [
        (MODELS[0], "cross_entropy"),
        (MODELS[1], "cross_entropy_k"),
        (MODELS[2], "importance_sampling"),
    ] {
        let reference = Reference::of(model);
        check_slopes(
            model,
            &reference.adapter(),
            &reference.batch(name),
            usize::MAX,
        );
    }
}

#[test]
fn derivatives_of_a_sequence_longer_than_all_blocks_match_the_gradient() {
    let n = 300;
    let token = |i: u32| (i * 37 + i * i % 11) % 320;
    let sequence = TrainSequence {
        tokens: (0..n).map(token).collect(),
        targets: (1..=n).map(token).collect(),
        k: 1,
        loss: Loss::CrossEntropy {
            weights: (0..n).map(|i| 0.2 + (i % 5) as f32 * 0.1).collect(),
        },
    };
    for model in MODELS {
        let adapter = Reference::of(model).adapter();
        check_slopes(model, &adapter, std::slice::from_ref(&sequence), usize::MAX);
    }
}

const ATTENTION: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];
const MLP: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// PEFT names of the adapter's tensors on a model of two blocks.
fn names(attn: bool, mlp: bool, unembed: bool) -> BTreeSet<String> {
    let mut modules = Vec::new();
    for i in 0..2 {
        let in_block = |part: &str, leaf: &str| format!("model.layers.{i}.{part}.{leaf}");
        if attn {
            modules.extend(ATTENTION.map(|leaf| in_block("self_attn", leaf)));
        }
        if mlp {
            modules.extend(MLP.map(|leaf| in_block("mlp", leaf)));
        }
    }
    if unembed {
        modules.push("lm_head".into());
    }
    let factors = |module: String| {
        ["A", "B"].map(|factor| format!("base_model.model.{module}.lora_{factor}.weight"))
    };
    modules.into_iter().flat_map(factors).collect()
}

#[test]
fn every_choice_of_modules_trains_these_and_no_others() {
    for (model, flags) in MODELS
        .iter()
        .flat_map(|m| (1..8).map(move |flags| (m, flags)))
    {
        let reference = Reference::of(model);
        let [attn, mlp, unembed] = [1, 2, 4].map(|bit| flags & bit != 0);
        let names = names(attn, mlp, unembed);
        let mut state = reference.adapter();
        state.spec.train_attn = attn;
        state.spec.train_mlp = mlp;
        state.spec.train_unembed = unembed;
        state.weights.retain(|name, _| names.contains(name));

        let trained = check_slopes(model, &state, &reference.batch("cross_entropy")[..4], 6);

        assert!(
            trained.weights.keys().eq(&names),
            "{model} {:?}",
            state.spec
        );
        assert!(
            trained.gradient.keys().eq(&names),
            "{model} {:?}",
            state.spec
        );
        let mut backend = load(model, 1);
        let spec = tinker_engine::LoraSpec {
            rank: 2,
            ..state.spec
        };
        let fresh = backend.create_adapter(&spec).unwrap();
        assert!(
            backend
                .export_adapter(fresh)
                .unwrap()
                .weights
                .keys()
                .eq(&names)
        );
    }
    assert_eq!(names(true, true, true).len(), 2 * (2 * 7 + 1));
}
