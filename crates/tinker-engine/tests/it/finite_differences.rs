//! Gradients against differences of the loss, through the whole model.

use tinker_engine::{AdapterState, Backend};

use crate::common::{MODELS, Reference, load};

fn loss(backend: &mut dyn Backend, state: &AdapterState, reference: &Reference, name: &str) -> f64 {
    let adapter = backend.import_adapter(state).unwrap();
    let outputs = backend
        .forward(Some(adapter), &reference.batch(name))
        .unwrap();
    backend.drop_adapter(adapter);
    outputs.iter().map(|o| o.loss).sum()
}

#[test]
fn directional_derivatives_of_each_tensor_match_the_gradient() {
    for (model, name) in [
        (MODELS[0], "cross_entropy"),
        (MODELS[1], "importance_sampling"),
    ] {
        let reference = Reference::of(model);
        let mut backend = load(model, 2);
        let adapter = reference.import(&mut *backend);
        backend
            .forward_backward(adapter, &reference.batch(name))
            .unwrap();
        let state = backend.export_adapter(adapter).unwrap();
        for (tensor, gradient) in &state.gradient {
            let norm = gradient
                .iter()
                .map(|g| f64::from(*g).powi(2))
                .sum::<f64>()
                .sqrt();
            // A step along the gradient raises the loss fastest, so rounding matters least there.
            const STEP: f64 = 2e-3;
            let moved = |step: f64| {
                let mut moved = state.clone();
                moved.gradient.clear();
                let weights = &mut moved.weights.get_mut(tensor).unwrap().data;
                for (w, g) in weights.iter_mut().zip(gradient) {
                    *w += (step * f64::from(*g) / norm) as f32;
                }
                moved
            };

            let up = loss(&mut *backend, &moved(STEP), &reference, name);
            let down = loss(&mut *backend, &moved(-STEP), &reference, name);

            let slope = (up - down) / (2.0 * STEP);
            assert!(
                (slope - norm).abs() < 0.01 * norm + 0.02,
                "{model} {tensor}: {slope} {norm}"
            );
        }
    }
}
