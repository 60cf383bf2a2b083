//! Every architecture beside transformers and PEFT: prompts beyond every window, names and shapes.

use tinker_engine::{AdapterState, Backend};

use crate::common::{
    ARCHITECTURES, Reference, all_modules, floats, load, on_every_unit, relative, tokens,
};

/// Tolerance in relative L2; the reference's own rounding is below 2e-6.
const TOLERANCE: f64 = 1e-5;

#[test]
fn logits_after_a_prompt_beyond_every_window_agree() {
    for (model, load) in on_every_unit(ARCHITECTURES) {
        let reference = Reference::of(model);
        let mut backend = load(model, 2);
        let adapter = reference.import(&mut *backend);
        let (prompt, expected) = (
            tokens(&reference.json["beyond"]["tokens"]),
            floats(&reference.json["beyond"]["logits"]),
        );
        let slot = backend.open_slot(Some(adapter), prompt.len()).unwrap();

        let logits = backend.prefill(slot, &prompt, false).unwrap().next_logits;

        let off = relative(&logits, &expected);
        assert!(off < TOLERANCE, "{model}: logits off by {off:e}");
    }
}

#[test]
fn new_adapters_have_the_names_and_shapes_of_the_reference() {
    for model in ARCHITECTURES {
        let reference = Reference::of(model);
        let wanted = reference.adapter();
        let mut backend = load(model, 1);

        let adapter = backend
            .create_adapter(&all_modules(wanted.spec.rank))
            .unwrap();

        let made = backend.export_adapter(adapter).unwrap();
        assert_eq!(shapes(&made), shapes(&wanted), "{model}");
        assert_eq!(reimported(&mut *backend, &wanted), wanted, "{model}");
    }
}

fn shapes(state: &AdapterState) -> Vec<(&str, &[usize])> {
    let shapes = state.weights.iter();
    shapes
        .map(|(name, tensor)| (name.as_str(), &tensor.shape[..]))
        .collect()
}

fn reimported(backend: &mut dyn Backend, state: &AdapterState) -> AdapterState {
    let adapter = backend.import_adapter(state).unwrap();
    backend.export_adapter(adapter).unwrap()
}
