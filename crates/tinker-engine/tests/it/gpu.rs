//! The GPU backend on an emulated device, beside the CPU and beside PyTorch.

use tinker_engine::TrainSequence;

use crate::common::{ARCHITECTURES, MODELS, ROUNDED, Reference, load, relative};
use crate::emulated::load_emulated;

/// The models without experts.
fn dense() -> impl Iterator<Item = &'static str> {
    let all = MODELS.into_iter().chain(ROUNDED).chain(ARCHITECTURES);
    all.filter(|model| !model.contains("moe"))
}

fn batch(reference: &Reference) -> Vec<TrainSequence> {
    let mut batch = reference.batch("cross_entropy");
    batch.extend(reference.batch("ppo").into_iter().take(2));
    batch
}

#[test]
fn gradients_agree_with_those_of_the_cpu() {
    for model in dense() {
        let reference = Reference::of(model);
        let batch = batch(&reference);
        let mut results = [load, load_emulated].map(|load| {
            let mut backend = load(model, 2);
            let adapter = reference.import(&mut *backend);
            let outputs = backend.forward_backward(adapter, &batch).unwrap();
            (outputs, backend.export_adapter(adapter).unwrap().gradient)
        });
        let [(wanted, wanted_gradient), (found, gradient)] = &mut results;
        for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
            let off = relative(&found.logprobs, &wanted.logprobs);
            assert!(off < 1e-5, "{model} sequence {i}: log-probs off by {off:e}");
        }
        assert!(gradient.keys().eq(wanted_gradient.keys()));
        for (name, values) in gradient {
            let off = relative(values, &wanted_gradient[name]);
            assert!(off < 1e-5, "{model} {name}: gradient off by {off:e}");
        }
    }
}
