//! Every architecture beside transformers: log-probabilities, gradients, long prompts, greedy decoding.

use tinker_engine::{AdapterState, Backend};

use crate::common::{
    ARCHITECTURES, LOADS, Load, Reference, all_modules, floats, load, relative, tokens,
};

/// Tolerance in relative L2; the reference's own rounding is below 2e-6.
const TOLERANCE: f64 = 1e-5;

/// Every model, on every unit of this machine.
fn models() -> impl Iterator<Item = (&'static str, Load)> {
    let each = |model| LOADS.into_iter().map(move |load| (model, load));
    ARCHITECTURES.into_iter().flat_map(each)
}

#[test]
fn losses_logprobs_and_gradients_agree() {
    for (model, load) in models() {
        let reference = Reference::of(model);
        let mut backend = load(model, 2);
        let adapter = reference.import(&mut *backend);
        let expected = &reference.json["losses"]["cross_entropy"];

        let outputs = backend
            .forward_backward(adapter, &reference.batch("cross_entropy"))
            .unwrap();

        for (i, output) in outputs.iter().enumerate() {
            let off = relative(&output.logprobs, &floats(&expected["logprobs"][i]));
            assert!(
                off < TOLERANCE,
                "{model} sequence {i}: log-probs off by {off:e}"
            );
        }
        let total: f64 = outputs.iter().map(|o| o.loss).sum();
        let wanted = expected["loss"].as_f64().unwrap();
        assert!(
            (total - wanted).abs() / wanted < TOLERANCE,
            "{model}: {total}"
        );
        let gradient = backend.export_adapter(adapter).unwrap().gradient;
        let references = reference.tensors("grad_cross_entropy");
        assert!(gradient.keys().eq(references.keys()), "{model}");
        for (name, tensor) in references {
            let off = relative(&gradient[&name], &tensor.data);
            assert!(off < TOLERANCE, "{model} {name}: gradient off by {off:e}");
        }
    }
}

#[test]
fn greedy_decoding_gives_the_same_tokens_and_logprobs() {
    for model in ARCHITECTURES {
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

        let wanted = floats(&greedy["prompt_logprobs"]);
        let off = relative(&prefill.prompt_logprobs, &wanted);
        assert!(off < TOLERANCE, "{model}: prompt log-probs off by {off:e}");
        let mut logits = prefill.next_logits;
        for (i, token) in expected.iter().enumerate() {
            if gaps[i] < 1e-4 {
                break;
            }
            let (best, logprob) = best(&logits);
            assert_eq!(best, *token, "{model}: token {i}");
            let off = (logprob - f64::from(logprobs[i])).abs();
            assert!(off < 1e-4, "{model}: token {i} off by {off:e}");
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
    let terms = logits.iter().map(|x| f64::from(*x - *max).exp());
    (token as u32, -terms.sum::<f64>().ln())
}

#[test]
fn logits_after_a_prompt_beyond_every_window_agree() {
    for (model, load) in models() {
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
