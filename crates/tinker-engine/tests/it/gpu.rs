//! The GPU backend on an emulated device: beside the CPU, and bit for bit beside itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tinker_engine::cuda::load_on;
use tinker_engine::{
    AdamW, AdapterId, Backend, Dimuon, Error, LoraSpec, Loss, Optimizer, SlotId, TrainSequence,
};

use crate::common::{FEW, Reference, all_modules, dense, dir, load, relative, train};
use crate::emulated::{Gauges, load_emulated, open, open_measured};
use crate::generating::check_company;

pub(crate) const STEP: AdamW = AdamW {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
    grad_clip_norm: 1.0,
};

/// Some sequences of the reference, with two losses.
fn batch(reference: &Reference) -> Vec<TrainSequence> {
    let mut batch = reference.batch("cross_entropy");
    batch.truncate(3);
    batch.extend(reference.batch("ppo").into_iter().take(1));
    batch
}

pub(crate) fn prompt(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + 11) % 320).collect()
}

/// Checks that tensors of two adapters agree.
pub(crate) fn check_tensors<'a>(
    what: &str,
    found: impl IntoIterator<Item = (&'a String, &'a Vec<f32>)>,
    wanted: impl IntoIterator<Item = (&'a String, &'a Vec<f32>)>,
    tolerance: f64,
) {
    let (mut found, mut wanted) = (found.into_iter(), wanted.into_iter());
    loop {
        match (found.next(), wanted.next()) {
            (None, None) => return,
            (Some((name, values)), Some((wanted_name, wanted))) => {
                assert_eq!(name, wanted_name);
                let off = relative(values, wanted);
                assert!(off < tolerance, "{what} {name}: off by {off:e}");
            }
            _ => panic!("{what}: other tensors"),
        }
    }
}

#[test]
fn gradients_agree_with_those_of_the_cpu() {
    for model in dense() {
        let reference = Reference::of(model);
        let batch = batch(&reference);

        let [(wanted, wanted_gradient), (found, gradient)] = [load, load_emulated].map(|load| {
            let mut backend = load(model, 2);
            let adapter = reference.import(&mut *backend);
            let outputs = backend.forward_backward(adapter, &batch).unwrap();
            (outputs, backend.export_adapter(adapter).unwrap().gradient)
        });

        for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            let off = relative(&found.logprobs, &wanted.logprobs);
            assert!(off < 1e-5, "{model} sequence {i}: log-probs off by {off:e}");
            let off = (found.loss - wanted.loss).abs() / wanted.loss.abs().max(1.0);
            assert!(off < 1e-5, "{model} sequence {i}: loss off by {off:e}");
        }
        // Both round: where terms nearly cancel, each by up to 1e-5.
        check_tensors(model, &gradient, &wanted_gradient, 2e-5);
    }
}

#[test]
fn steps_agree_with_those_of_the_cpu() {
    let dimuon = Dimuon::new(1e-2);
    let clipped = Dimuon {
        grad_clip_norm: 0.1,
        ..dimuon
    };
    let optimizers: [Optimizer; 3] = [STEP.into(), dimuon.into(), clipped.into()];
    for optimizer in optimizers {
        let reference = Reference::of("qwen3");
        let mut state = reference.adapter();
        let gradient = reference.tensors("grad_cross_entropy").into_iter();
        state.gradient = gradient.map(|(name, tensor)| (name, tensor.data)).collect();

        let [wanted, found] = [load, load_emulated].map(|load| {
            let mut backend = load("qwen3", 2);
            let mut state = state.clone();
            let mut norm = 0.0;
            for _ in 0..2 {
                let adapter = backend.import_adapter(&state).unwrap();
                let report = backend.optim_step(adapter, &optimizer).unwrap();
                let gradient = std::mem::take(&mut state.gradient);
                state = backend.export_adapter(adapter).unwrap();
                assert!(state.gradient.is_empty());
                assert_eq!(report.step, state.step);
                state.gradient = gradient;
                norm = report.grad_norm;
            }
            (norm, state)
        });

        assert!((found.0 - wanted.0).abs() < 1e-6 * wanted.0);
        assert_eq!(found.1.step, 2);
        for (name, tensor) in &wanted.1.weights {
            let off = relative(&found.1.weights[name].data, &tensor.data);
            assert!(off < 1e-6, "{optimizer:?} {name}: off by {off:e}");
            let ((m, v), (m_wanted, v_wanted)) = (&found.1.moments[name], &wanted.1.moments[name]);
            assert!(relative(m, m_wanted) < 1e-6 && relative(v, v_wanted) < 1e-6);
        }
    }
}

#[test]
fn neither_batch_mates_nor_memory_nor_other_adapters_change_a_bit_of_training() {
    for model in FEW {
        let reference = Reference::of(model);
        let batch = batch(&reference);
        let mut backend = load_emulated(model, 1);
        let whole = train(&mut *backend, &reference, &[&batch]);
        let single: Vec<&[TrainSequence]> = batch.chunks(1).collect();

        assert!(
            train(&mut *backend, &reference, &single) == whole,
            "{model}"
        );

        // Memory for no block's activations: all but the last are computed again.
        let mut small = load_on(&|head| open(head, 1 << 30), &dir(model), Some(0)).unwrap();
        let other = small.create_adapter(&all_modules(20)).unwrap();
        small.forward_backward(other, &batch[..1]).unwrap();
        assert!(
            train(&mut *small, &reference, &[&batch]) == whole,
            "{model}"
        );
    }
}

#[test]
fn export_and_import_in_mid_accumulation_continue_bit_for_bit() {
    let batch = batch(&Reference::of("qwen2"));
    let mut backend = load_emulated("qwen2", 1);
    let first = backend.create_adapter(&all_modules(4)).unwrap();
    backend.forward_backward(first, &batch[..2]).unwrap();
    backend.optim_step(first, &STEP.into()).unwrap();
    backend.forward_backward(first, &batch[..2]).unwrap();

    let state = backend.export_adapter(first).unwrap();
    let mut elsewhere = load_emulated("qwen2", 1);
    let second = elsewhere.import_adapter(&state).unwrap();

    assert_eq!(elsewhere.export_adapter(second).unwrap(), state);
    let [a, b] = [(&mut backend, first), (&mut elsewhere, second)].map(|(backend, adapter)| {
        backend.forward_backward(adapter, &batch[2..]).unwrap();
        backend.optim_step(adapter, &STEP.into()).unwrap();
        backend.export_adapter(adapter).unwrap()
    });
    assert_eq!(a, b);
}

#[test]
fn prompts_in_one_in_chunks_token_by_token_and_scored_have_the_same_bits() {
    for model in FEW {
        let reference = Reference::of(model);
        let mut backend = load_emulated(model, 1);
        let adapter = Some(reference.import(&mut *backend));
        let prompt = prompt(150);
        let whole = backend.open_slot(adapter, 160).unwrap();
        let expected = backend.prefill(whole, &prompt, true).unwrap();

        let chunked = backend.open_slot(adapter, 160).unwrap();
        let mut shown = Vec::new();
        for tokens in prompt[..100].chunks(33) {
            backend.prefill(chunked, tokens, false).unwrap();
        }
        let prefix = backend.fork_prefix(chunked, 90, 155).unwrap();
        let logits = backend.prefill_logits(prefix, &prompt[90..], 40, &mut |i, logits| {
            shown.push((i, logits.to_vec()));
            Ok(())
        });
        assert_eq!(logits.unwrap(), expected.next_logits, "{model}, chunks");
        for token in &prompt[100..140] {
            backend.decode_step(&[(chunked, *token)]).unwrap();
        }
        let mut logits = Vec::new();
        for (i, token) in (140..).zip(&prompt[140..]) {
            logits = backend.decode_step(&[(chunked, *token)]).unwrap();
            if let Some((_, wanted)) = shown.iter().find(|(j, _)| 90 + j == i) {
                assert_eq!(logits, *wanted, "{model}, shown at {i}");
            }
        }
        assert_eq!(shown.len(), 19);
        assert_eq!(logits, expected.next_logits, "{model}, decoded");

        let n = prompt.len() - 1;
        let sequence = TrainSequence {
            tokens: prompt[..n].to_vec(),
            targets: prompt[1..].to_vec(),
            k: 1,
            loss: Loss::CrossEntropy {
                weights: vec![1.0; n],
            },
        };
        let scored = backend.forward(adapter, &[sequence]).unwrap();
        assert_eq!(scored[0].logprobs, expected.prompt_logprobs, "{model}");

        let mut cpu = load(model, 2);
        let adapter = Some(reference.import(&mut *cpu));
        let slot = cpu.open_slot(adapter, 160).unwrap();
        let wanted = cpu.prefill(slot, &prompt, true).unwrap();
        let off = relative(&expected.next_logits, &wanted.next_logits);
        assert!(off < 1e-5, "{model}: logits off by {off:e}");
        let off = relative(&expected.prompt_logprobs, &wanted.prompt_logprobs);
        assert!(off < 1e-5, "{model}: log-probs off by {off:e}");
    }
}

#[test]
fn rows_of_a_decode_step_do_not_see_each_other() {
    for model in FEW {
        let mut backend = load_emulated(model, 1);
        let tuned = Some(Reference::of(model).import(&mut *backend));
        let other = Some(backend.create_adapter(&all_modules(17)).unwrap());
        // More rows than a block of threads takes.
        let owners = [tuned, None, other, tuned, tuned, None].repeat(3);
        let slots: Vec<_> = owners
            .iter()
            .enumerate()
            .map(|(i, adapter)| {
                let slot = backend.open_slot(*adapter, 100).unwrap();
                backend.prefill(slot, &prompt(3 + 2 * i), false).unwrap();
                slot
            })
            .collect();
        let fork = |slot| backend.fork_slot(slot).unwrap();
        let twins: Vec<_> = slots.iter().copied().map(fork).collect();
        let rows: Vec<_> = slots.into_iter().zip(5..).collect();

        let together = backend.decode_step(&rows).unwrap();

        let vocab = backend.info().vocab_size;
        for ((twin, (_, token)), logits) in twins.iter().zip(&rows).zip(together.chunks(vocab)) {
            let alone = backend.decode_step(&[(*twin, *token)]).unwrap();
            assert_eq!(alone, logits, "{model}");
        }
    }
}

#[test]
fn samples_do_not_depend_on_company_or_rows() {
    check_company("llama", load_emulated, &[2]);
}

#[test]
fn snapshots_and_open_slots_keep_the_weights_they_were_made_of() {
    let mut backend = load_emulated("llama", 1);
    let reference = Reference::of("llama");
    let adapter = reference.import(&mut *backend);
    let logits = |backend: &mut dyn Backend, adapter| {
        let slot = backend.open_slot(Some(adapter), 50).unwrap();
        backend.prefill(slot, &[3, 1, 4, 1], false).unwrap();
        backend.decode_step(&[(slot, 5)]).unwrap()
    };
    let before = logits(&mut *backend, adapter);
    let snapshot = backend.snapshot_adapter(adapter).unwrap();
    let slot = backend.open_slot(Some(adapter), 50).unwrap();
    backend.prefill(slot, &[3, 1, 4, 1], false).unwrap();

    backend
        .forward_backward(adapter, &batch(&reference))
        .unwrap();
    backend.optim_step(adapter, &STEP.into()).unwrap();

    assert_ne!(logits(&mut *backend, adapter), before);
    assert_eq!(logits(&mut *backend, snapshot), before);
    assert_eq!(backend.decode_step(&[(slot, 5)]).unwrap(), before);
    backend.drop_adapter(adapter);
    assert_eq!(logits(&mut *backend, snapshot), before);
    let copy = backend.export_adapter(snapshot).unwrap();
    assert!(copy.moments.is_empty() && copy.gradient.is_empty() && copy.step == 0);
}

/// What both devices say to calls that cannot be done.
fn refusals(backend: &mut dyn Backend, reference: &Reference) -> Vec<String> {
    let adapter = reference.import(backend);
    let good = reference.batch("cross_entropy").swap_remove(0);
    let mut said = Vec::new();
    let mut far = good.clone();
    far.targets[0] = 320;
    let mut heavy = good.clone();
    heavy.loss = Loss::CrossEntropy {
        weights: vec![3e38; good.targets.len()],
    };
    for bad in [far, heavy] {
        let outcome = backend.forward_backward(adapter, &[good.clone(), bad]);
        said.push(outcome.unwrap_err().to_string());
        assert!(backend.export_adapter(adapter).unwrap().gradient.is_empty());
    }
    let mut steep = STEP;
    steep.learning_rate = 3e38;
    steep.weight_decay = 3e38;
    let wrong = AdamW { beta1: 1.0, ..STEP };
    for step in [steep, wrong] {
        let before = backend.export_adapter(adapter).unwrap().weights;
        let outcome = backend.optim_step(adapter, &step.into());
        said.push(outcome.unwrap_err().to_string());
        let after = backend.export_adapter(adapter).unwrap();
        assert!(after.weights == before && after.step == 0 && after.moments.is_empty());
    }
    backend.optim_step(adapter, &STEP.into()).unwrap();
    let other = backend.optim_step(adapter, &Dimuon::new(0.1).into());
    said.push(other.unwrap_err().to_string());
    let slot = backend.open_slot(None, 5).unwrap();
    said.push(backend.open_slot(None, 0).unwrap_err().to_string());
    said.push(backend.prefill(slot, &[], false).unwrap_err().to_string());
    said.push(
        backend
            .prefill(slot, &[1; 6], false)
            .unwrap_err()
            .to_string(),
    );
    said.push(
        backend
            .prefill(slot, &[320], false)
            .unwrap_err()
            .to_string(),
    );
    backend.prefill(slot, &[1, 2], false).unwrap();
    let twice = backend.decode_step(&[(slot, 1), (slot, 2)]);
    said.push(twice.unwrap_err().to_string());
    said.push(backend.fork_prefix(slot, 3, 5).unwrap_err().to_string());
    let narrow = LoraSpec {
        rank: 0,
        ..all_modules(1)
    };
    said.push(backend.create_adapter(&narrow).unwrap_err().to_string());
    said.push(
        backend
            .export_adapter(AdapterId(999))
            .unwrap_err()
            .to_string(),
    );
    said
}

#[test]
fn what_cannot_be_done_is_refused_in_the_words_of_the_cpu_and_changes_nothing() {
    let reference = Reference::of("llama");
    let [wanted, found] = [load, load_emulated].map(|load| {
        let mut backend = load("llama", 1);
        refusals(&mut *backend, &reference)
    });

    assert_eq!(found, wanted);
}

#[test]
fn what_has_no_kernels_is_refused_before_a_device_is_opened() {
    let never = |_| -> tinker_engine::Result<_> { panic!("a device was opened") };

    let error = load_on(&never, &dir("qwen3_moe"), None).unwrap_err();

    let text = error.to_string();
    assert!(
        text.ends_with(
            "Qwen3MoeForCausalLM has a mixture of experts, which the GPU does not compute: \
             use --device cpu"
        ),
        "{text}"
    );
}

#[test]
fn weights_that_do_not_fit_are_refused_before_memory_is_taken() {
    let error = load_on(&|head| open(head, 1 << 10), &dir("llama"), None).unwrap_err();

    assert!(matches!(error, Error::Device(_)));
    assert!(
        error.to_string().contains("emulated has 0 MiB left"),
        "{error}"
    );
}

#[test]
fn activations_give_way_where_memory_is_short() {
    let mut batch = Reference::of("llama").batch("cross_entropy");
    batch.push(TrainSequence {
        tokens: prompt(200),
        targets: prompt(200),
        k: 1,
        loss: Loss::CrossEntropy {
            weights: vec![1.0; 200],
        },
    });
    let gradient = |memory: usize, activations: usize| {
        let open = move |head| open(head, memory);
        let mut backend = load_on(&open, &dir("llama"), Some(activations)).unwrap();
        let adapter = Reference::of("llama").import(&mut *backend);
        backend.forward_backward(adapter, &batch)?;
        Ok::<_, Error>(backend.export_adapter(adapter).unwrap().gradient)
    };
    let sizes = (4..40).map(|quarters| quarters << 18);
    let (least, wanted) = sizes
        .filter_map(|memory| Some((memory, gradient(memory, 0).ok()?)))
        .next()
        .unwrap();

    assert!(gradient(least, usize::MAX).unwrap() == wanted);
}

#[test]
fn activations_keep_to_their_memory_whatever_the_order_of_the_batch() {
    // Room for the activations of one block of the long sequence, or of all blocks of the short one.
    let budget = 1 << 20;
    let peak_of = |batch: &[usize], budget| {
        let gauges = Arc::new(Gauges::default());
        let read = Arc::clone(&gauges);
        let open = move |head| Ok(open_measured(head, &gauges));
        let mut backend = load_on(&open, &dir("llama"), Some(budget)).unwrap();
        let adapter = backend.create_adapter(&all_modules(4)).unwrap();
        let batch: Vec<_> = batch.iter().copied().map(whole).collect();
        backend.forward_backward(adapter, &batch).unwrap();
        read.peak.load(Ordering::Relaxed)
    };
    let [long, short] = [200, 100].map(|n| peak_of(&[n], budget));
    assert!(long == peak_of(&[200], 0) && short > peak_of(&[100], 0));

    for batch in [[200, 100], [100, 200]] {
        let together = peak_of(&batch, budget);
        assert!(together <= long.max(short), "{together} {long} {short}");
    }
}

/// As docs/guide/serving.md counts them: launches are what a small model's token takes on a GPU.
#[test]
fn a_token_takes_few_launches() {
    let gauges = Arc::new(Gauges::default());
    let read = Arc::clone(&gauges);
    let open = move |head| Ok(open_measured(head, &gauges));
    let mut backend = load_on(&open, &dir("llama"), None).unwrap();
    let spec = LoraSpec {
        train_unembed: false,
        ..all_modules(4)
    };
    let adapter = backend.create_adapter(&spec).unwrap();
    let n_layers = backend.info().n_layers as u64;
    let mut launches = |adapter, context: usize, n_sequences: usize| {
        let mut slot = || {
            let slot = backend.open_slot(adapter, 400).unwrap();
            backend.prefill(slot, &prompt(context), false).unwrap();
            slot
        };
        let rows: Vec<_> = (0..n_sequences).map(|_| (slot(), 3)).collect();
        let before = read.launches.load(Ordering::Relaxed);
        backend.decode_step(&rows).unwrap();
        // Beside embedding, last norm and head.
        read.launches.load(Ordering::Relaxed) - before - 3
    };

    assert_eq!(launches(None, 10, 1), 9 * n_layers);
    assert_eq!(launches(Some(adapter), 10, 1), 13 * n_layers);
    assert_eq!(launches(Some(adapter), 10, 8), 13 * n_layers);
    // Chunks of a long context are put together.
    assert_eq!(launches(Some(adapter), 300, 1), 14 * n_layers);
}

#[test]
fn memory_that_runs_out_is_an_error_and_leaves_the_gradient() {
    let reference = Reference::of("llama");
    let short = batch(&reference);
    let long = TrainSequence {
        tokens: vec![1; 512],
        targets: vec![2; 512],
        k: 1,
        loss: Loss::CrossEntropy {
            weights: vec![1.0; 512],
        },
    };
    let mut backend = load_on(&|head| open(head, 3 << 20), &dir("llama"), Some(1 << 20)).unwrap();
    let adapter = reference.import(&mut *backend);
    backend.forward_backward(adapter, &short).unwrap();
    let before = backend.export_adapter(adapter).unwrap();

    let error = backend.forward_backward(adapter, &[long]).unwrap_err();

    assert!(matches!(error, Error::Device(_)), "{error}");
    assert_eq!(backend.export_adapter(adapter).unwrap(), before);
    backend.clear_gradient(adapter).unwrap();
    backend.forward_backward(adapter, &short).unwrap();
    assert_eq!(backend.export_adapter(adapter).unwrap(), before);
}

#[test]
fn a_step_that_memory_runs_out_in_changes_nothing() {
    let mut outcomes = Vec::new();
    for memory in (4..48).map(|sixteenths| sixteenths << 16) {
        let Ok(mut backend) = load_on(&move |head| open(head, memory), &dir("llama"), Some(0))
        else {
            continue;
        };
        let Ok(adapter) = backend.create_adapter(&all_modules(16)) else {
            continue;
        };
        let before = backend.export_adapter(adapter).unwrap();
        let bytes = backend.adapter_bytes(adapter);

        let outcome = backend.optim_step(adapter, &STEP.into());

        if outcome.is_err() {
            assert_eq!(backend.export_adapter(adapter).unwrap(), before);
            assert_eq!(backend.adapter_bytes(adapter), bytes);
        }
        outcomes.push(outcome.is_ok());
    }
    assert!(
        outcomes.contains(&false) && outcomes.contains(&true),
        "{outcomes:?}"
    );
}

#[test]
fn what_training_keeps_gives_way_to_other_work() {
    type Work = fn(&mut dyn Backend, AdapterId, SlotId) -> tinker_engine::Result<Vec<f32>>;
    let works: [(&str, Work); 7] = [
        ("prefill", |backend, _, slot| {
            let prefill = backend.prefill(slot, &prompt(50), true)?;
            Ok(prefill.next_logits)
        }),
        ("prefill_logits", |backend, _, slot| {
            let mut shown = Vec::new();
            let last = backend.prefill_logits(slot, &prompt(50), 30, &mut |_, logits| {
                shown.extend_from_slice(logits);
                Ok(())
            })?;
            shown.extend(last);
            Ok(shown)
        }),
        ("decode_step", |backend, _, slot| {
            backend.decode_step(&[(slot, 5)])
        }),
        ("forward", |backend, adapter, _| {
            let outputs = backend.forward(Some(adapter), &[whole(50)])?;
            Ok(outputs[0].logprobs.clone())
        }),
        ("create_adapter", |backend, _, _| {
            backend.create_adapter(&all_modules(16))?;
            Ok(Vec::new())
        }),
        ("fork_slot", |backend, _, slot| {
            for _ in 0..3 {
                backend.fork_slot(slot)?;
            }
            Ok(Vec::new())
        }),
        ("optim_step", |backend, adapter, _| {
            let norm = backend.optim_step(adapter, &STEP.into())?.grad_norm;
            Ok(vec![norm as f32])
        }),
    ];
    let trained = |memory: usize| {
        let open = move |head| open(head, memory);
        let mut backend = load_on(&open, &dir("llama"), Some(0))?;
        let adapter = backend.import_adapter(&Reference::of("llama").adapter())?;
        let slot = backend.open_slot(Some(adapter), 100)?;
        backend.prefill(slot, &prompt(10), false)?;
        backend.forward_backward(adapter, &[whole(100)])?;
        Ok::<_, Error>((backend, adapter, slot))
    };
    let sizes: Vec<usize> = (32..256).map(|n| n << 14).collect();
    let least = sizes[sizes.partition_point(|memory| trained(*memory).is_err())];

    for (name, work) in works {
        let [found, wanted] = [least, 1 << 30].map(|memory| {
            let (mut backend, adapter, slot) = trained(memory).unwrap();
            work(&mut *backend, adapter, slot)
        });
        assert_eq!(found.unwrap(), wanted.unwrap(), "{name}");
    }
}

fn whole(n: usize) -> TrainSequence {
    TrainSequence {
        tokens: prompt(n),
        targets: prompt(n),
        k: 1,
        loss: Loss::CrossEntropy {
            weights: vec![1.0; n],
        },
    }
}
