//! Bit for bit: threads, batch mates, order of calls, chunks, slots and other adapters do not matter.

use tinker_engine::{AdamW, AdapterState, Backend, TrainSequence};

use crate::common::{Load, Reference, all_models, all_modules, load, load_on_vectors, relative};

const STEP: AdamW = AdamW {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
    grad_clip_norm: 1.0,
};

/// Log-probs of the batch and the state after it went through.
fn train(threads: usize, model: &str, calls: &[&[TrainSequence]]) -> (Vec<Vec<f32>>, AdapterState) {
    let reference = Reference::of(model);
    let mut backend = load(model, threads);
    let adapter = reference.import(&mut *backend);
    let mut logprobs = Vec::new();
    for call in calls {
        let outputs = backend.forward_backward(adapter, call).unwrap();
        logprobs.extend(outputs.into_iter().map(|o| o.logprobs));
    }
    (logprobs, backend.export_adapter(adapter).unwrap())
}

fn batch(model: &str) -> Vec<TrainSequence> {
    let reference = Reference::of(model);
    let mut batch = reference.batch("cross_entropy");
    batch.extend(reference.batch("ppo"));
    batch
}

#[test]
fn threads_do_not_change_a_training_step() {
    for model in all_models() {
        let batch = batch(model);
        let one = train(1, model, &[&batch]);
        for threads in [2, 3, 5] {
            assert!(
                train(threads, model, &[&batch]) == one,
                "{model}, {threads} threads"
            );
        }
    }
}

#[test]
fn splitting_a_call_does_not_change_its_gradient() {
    for model in all_models() {
        let batch = batch(model);
        let whole = train(2, model, &[&batch]);
        let (head, tail) = batch.split_at(3);
        assert!(train(2, model, &[head, tail]) == whole, "{model}");
        let single: Vec<&[TrainSequence]> = batch.chunks(1).collect();
        assert!(train(1, model, &single) == whole, "{model}");
    }
}

#[test]
fn batch_mates_do_not_change_a_sequence() {
    for model in all_models() {
        let batch = batch(model);
        let (together, _) = train(2, model, &[&batch]);
        let mut backend = load(model, 2);
        let adapter = Reference::of(model).import(&mut *backend);
        for (sequence, expected) in batch.iter().zip(&together) {
            let one = std::slice::from_ref(sequence);
            let alone = backend.forward_backward(adapter, one).unwrap();
            assert_eq!(alone[0].logprobs, *expected);
        }
    }
}

#[test]
fn scoring_agrees_with_training() {
    for model in all_models() {
        let batch = batch(model);
        for (load, tolerance) in [(load as Load, 1e-6), (load_on_vectors, 0.0)] {
            let mut backend = load(model, 2);
            let adapter = Reference::of(model).import(&mut *backend);

            let scored = backend.forward(Some(adapter), &batch).unwrap();
            let trained = backend.forward_backward(adapter, &batch).unwrap();

            for (scored, trained) in scored.iter().zip(&trained) {
                let off = relative(&scored.logprobs, &trained.logprobs);
                assert!(off <= tolerance, "{model}: off by {off:e}");
            }
        }
    }
}

/// Gradients of both units; the rounded models have no reference of PyTorch.
#[test]
fn units_agree_on_gradients() {
    for model in all_models() {
        let batch = batch(model);
        let gradient = |load: Load| {
            let mut backend = load(model, 2);
            let adapter = Reference::of(model).import(&mut *backend);
            backend.forward_backward(adapter, &batch).unwrap();
            backend.export_adapter(adapter).unwrap().gradient
        };
        let on_vectors = gradient(load_on_vectors);
        for (name, values) in gradient(load) {
            let off = relative(&values, &on_vectors[&name]);
            assert!(off < 1e-5, "{model} {name}: off by {off:e}");
        }
    }
}

#[test]
fn other_adapters_and_slots_do_not_change_a_result() {
    for model in all_models() {
        let batch = batch(model);
        let (alone, _) = train(2, model, &[&batch]);
        let mut backend = load(model, 2);
        let other = backend.create_adapter(&all_modules(20)).unwrap();
        backend.forward_backward(other, &batch[..3]).unwrap();
        backend.optim_step(other, &STEP.into()).unwrap();
        let slot = backend.open_slot(Some(other), 100).unwrap();
        backend.prefill(slot, &[1, 2, 3], false).unwrap();
        let adapter = Reference::of(model).import(&mut *backend);

        let outputs = backend.forward_backward(adapter, &batch).unwrap();

        assert!(outputs.into_iter().map(|o| o.logprobs).eq(alone));
    }
}

#[test]
fn export_and_import_in_mid_accumulation_continue_bit_for_bit() {
    for model in all_models() {
        let batch = batch(model);
        let mut backend = load(model, 2);
        let first = backend.create_adapter(&all_modules(4)).unwrap();
        backend.forward_backward(first, &batch).unwrap();
        backend.optim_step(first, &STEP.into()).unwrap();
        backend.forward_backward(first, &batch[..4]).unwrap();

        let state = backend.export_adapter(first).unwrap();
        let mut elsewhere = load(model, 1);
        let second = elsewhere.import_adapter(&state).unwrap();

        assert_eq!(elsewhere.export_adapter(second).unwrap(), state);
        for (backend, adapter) in [(&mut backend, first), (&mut elsewhere, second)] {
            backend.forward_backward(adapter, &batch[4..]).unwrap();
            backend.optim_step(adapter, &STEP.into()).unwrap();
        }
        let (a, b) = (
            backend.export_adapter(first),
            elsewhere.export_adapter(second),
        );
        assert_eq!(a.unwrap(), b.unwrap());
    }
}

/// A prompt longer than any block of rows or keys.
fn prompt() -> Vec<u32> {
    (0..500).map(|i| (i * 37 + 11) % 320).collect()
}

#[test]
fn chunks_of_a_prompt_and_single_tokens_give_the_bits_of_the_whole() {
    for model in all_models() {
        let mut backend = load(model, 2);
        let adapter = Some(Reference::of(model).import(&mut *backend));
        let prompt = prompt();
        let whole = backend.open_slot(adapter, 512).unwrap();
        let expected = backend.prefill(whole, &prompt, true).unwrap();
        for chunk in [7, 33, 64, 150, 480, 497] {
            let slot = backend.open_slot(adapter, 512).unwrap();
            let mut next_logits = Vec::new();
            for tokens in prompt.chunks(chunk) {
                next_logits = backend.prefill(slot, tokens, false).unwrap().next_logits;
            }
            assert_eq!(
                next_logits, expected.next_logits,
                "{model}, chunks of {chunk}"
            );
        }
        let slot = backend.open_slot(adapter, 512).unwrap();
        backend.prefill(slot, &prompt[..400], false).unwrap();
        let mut logits = Vec::new();
        for token in &prompt[400..] {
            logits = backend.decode_step(&[(slot, *token)]).unwrap();
        }
        assert_eq!(logits, expected.next_logits, "{model}, decoded");
    }
}

#[test]
fn scoring_a_sequence_gives_the_bits_of_its_prompt_logprobs() {
    for model in all_models() {
        let mut backend = load(model, 2);
        let adapter = Some(Reference::of(model).import(&mut *backend));
        let prompt = prompt();
        let n = prompt.len() - 1;
        let sequence = TrainSequence {
            tokens: prompt[..n].to_vec(),
            targets: prompt[1..].to_vec(),
            k: 1,
            loss: tinker_engine::Loss::CrossEntropy {
                weights: vec![1.0; n],
            },
        };

        let scored = backend.forward(adapter, &[sequence]).unwrap();

        let slot = backend.open_slot(adapter, 512).unwrap();
        let prefill = backend.prefill(slot, &prompt, true).unwrap();
        assert_eq!(prefill.prompt_logprobs, scored[0].logprobs, "{model}");
    }
}

#[test]
fn rows_of_a_decode_step_do_not_see_each_other() {
    for model in all_models() {
        let mut backend = load(model, 3);
        let tuned = Some(Reference::of(model).import(&mut *backend));
        let other = Some(backend.create_adapter(&all_modules(17)).unwrap());
        let owners = [tuned, None, other, tuned, None, tuned, tuned, other, None];
        let mut open = |adapter, i: usize| {
            let slot = backend.open_slot(adapter, 512).unwrap();
            backend
                .prefill(slot, &prompt()[..3 + 11 * i], false)
                .unwrap();
            slot
        };
        let slots: Vec<_> = owners
            .iter()
            .enumerate()
            .map(|(i, a)| open(*a, i))
            .collect();
        let twins: Vec<_> = slots
            .iter()
            .map(|s| backend.fork_slot(*s).unwrap())
            .collect();
        let rows: Vec<_> = slots
            .iter()
            .zip(5..)
            .map(|(slot, token)| (*slot, token))
            .collect();

        let together = backend.decode_step(&rows).unwrap();

        let vocab = backend.info().vocab_size;
        for ((twin, (_, token)), logits) in twins.iter().zip(&rows).zip(together.chunks(vocab)) {
            assert_eq!(
                backend.decode_step(&[(*twin, *token)]).unwrap(),
                logits,
                "{model}"
            );
        }
    }
}

#[test]
fn a_forked_slot_goes_its_own_way() {
    let mut backend = load("llama", 1);
    let slot = backend.open_slot(None, 50).unwrap();
    backend.prefill(slot, &[3, 1, 4], false).unwrap();
    let fork = backend.fork_slot(slot).unwrap();

    backend.prefill(fork, &[7, 7], false).unwrap();
    let logits = backend.decode_step(&[(slot, 1)]).unwrap();

    let fresh = backend.open_slot(None, 50).unwrap();
    assert_eq!(
        backend
            .prefill(fresh, &[3, 1, 4, 1], false)
            .unwrap()
            .next_logits,
        logits
    );
}

#[test]
fn threads_do_not_change_prefill_and_decoding() {
    for model in all_models() {
        let run = |threads| {
            let mut backend = load(model, threads);
            let tuned = Some(Reference::of(model).import(&mut *backend));
            let rows: Vec<_> = [tuned, None, tuned]
                .into_iter()
                .zip([500, 97, 20])
                .map(|(adapter, n)| {
                    let slot = backend.open_slot(adapter, 512).unwrap();
                    (slot, backend.prefill(slot, &prompt()[..n], true).unwrap())
                })
                .collect();
            let (slots, prefills): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
            let decode = |token| {
                let rows: Vec<_> = slots.iter().map(|slot| (*slot, token)).collect();
                backend.decode_step(&rows).unwrap()
            };
            (prefills, (0..10).map(decode).collect::<Vec<_>>())
        };
        let one = run(1);
        for threads in [2, 5] {
            assert!(run(threads) == one, "{model}, {threads} threads");
        }
    }
}

#[test]
fn snapshots_and_open_slots_keep_the_weights_they_were_made_of() {
    for model in all_models() {
        let mut backend = load(model, 2);
        let adapter = Reference::of(model).import(&mut *backend);
        let logits = |backend: &mut dyn Backend, adapter| {
            let slot = backend.open_slot(Some(adapter), 50).unwrap();
            backend.prefill(slot, &[3, 1, 4, 1], false).unwrap();
            backend.decode_step(&[(slot, 5)]).unwrap()
        };
        let before = logits(&mut *backend, adapter);
        let snapshot = backend.snapshot_adapter(adapter).unwrap();
        let slot = backend.open_slot(Some(adapter), 50).unwrap();
        backend.prefill(slot, &[3, 1, 4, 1], false).unwrap();

        backend.forward_backward(adapter, &batch(model)).unwrap();
        backend.optim_step(adapter, &STEP.into()).unwrap();

        assert_ne!(logits(&mut *backend, adapter), before, "{model}");
        assert_eq!(logits(&mut *backend, snapshot), before, "{model}");
        assert_eq!(
            backend.decode_step(&[(slot, 5)]).unwrap(),
            before,
            "{model}"
        );
        backend.drop_adapter(adapter);
        assert_eq!(logits(&mut *backend, snapshot), before, "{model}");
        let copy = backend.export_adapter(snapshot).unwrap();
        assert!(copy.moments.is_empty() && copy.gradient.is_empty() && copy.step == 0);
        backend.import_adapter(&copy).unwrap();
    }
}
