//! What is refused, in which words, and that nothing changes then.

use tinker_engine::{AdamW, Backend, Error, LoraSpec, Loss, SlotId, TrainSequence, load_cpu};

use crate::common::{Reference, all_modules, dir, load};

fn sequence(tokens: &[u32], targets: &[u32], weights: usize) -> TrainSequence {
    TrainSequence {
        tokens: tokens.to_vec(),
        targets: targets.to_vec(),
        k: 1,
        loss: Loss::CrossEntropy {
            weights: vec![1.0; weights],
        },
    }
}

#[test]
fn bad_sequences_are_refused_and_leave_the_gradient() {
    let mut backend = load("llama", 2);
    let adapter = Reference::of("llama").import(&mut *backend);
    backend
        .forward_backward(adapter, &[sequence(&[1, 2], &[2, 3], 2)])
        .unwrap();
    let before = backend.export_adapter(adapter).unwrap();
    let long = vec![1; 513];
    let nan = Loss::CrossEntropy {
        weights: vec![f32::NAN],
    };
    let cases = [
        (sequence(&[], &[], 0), "sequence 1: it has no tokens"),
        (
            sequence(&[1, 320], &[1, 2], 2),
            "sequence 1: token 320 is not below the vocabulary size 320",
        ),
        (
            sequence(&[1, 2], &[1, 999], 2),
            "sequence 1: token 999 is not below the vocabulary size 320",
        ),
        (
            sequence(&[1, 2], &[1], 1),
            "sequence 1: 1 targets for 2 tokens with 1 each",
        ),
        (
            sequence(&[1, 2], &[1, 2], 3),
            "sequence 1: 3 weights for 2 targets",
        ),
        (
            sequence(&long, &long, 513),
            "sequence 1: 513 tokens, the model's context is 512",
        ),
        (
            TrainSequence {
                loss: nan,
                ..sequence(&[1], &[1], 1)
            },
            "sequence 1: weights is NaN at position 0: it must be finite",
        ),
    ];
    for (bad, expected) in cases {
        let batch = [sequence(&[5, 6, 7], &[6, 7, 8], 3), bad];

        let error = backend.forward_backward(adapter, &batch).unwrap_err();

        assert_eq!(error.to_string(), expected);
        assert_eq!(backend.export_adapter(adapter).unwrap(), before);
    }
}

#[test]
fn an_infinite_ratio_is_named_and_leaves_the_gradient() {
    let mut backend = load("llama", 2);
    let adapter = Reference::of("llama").import(&mut *backend);
    let loss = Loss::ImportanceSampling {
        logprobs: vec![-2e4],
        advantages: vec![1.0],
    };
    let batch = [TrainSequence {
        loss,
        ..sequence(&[1], &[1], 1)
    }];

    let error = backend.forward_backward(adapter, &batch).unwrap_err();

    assert!(matches!(error, Error::NotFinite(_)), "{error}");
    assert!(backend.export_adapter(adapter).unwrap().gradient.is_empty());
}

#[test]
fn bad_optimizer_settings_are_refused_and_leave_the_adapter() {
    let good = AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.0,
        grad_clip_norm: 0.0,
    };
    let mut backend = load("llama", 1);
    let adapter = backend.create_adapter(&all_modules(2)).unwrap();
    let before = backend.export_adapter(adapter).unwrap();
    let cases = [
        (
            AdamW {
                learning_rate: -1.0,
                ..good
            },
            "learning_rate is -1, it must be at least 0",
        ),
        (
            AdamW { beta1: 1.0, ..good },
            "beta1 is 1, it must be in [0, 1)",
        ),
        (AdamW { eps: 0.0, ..good }, "eps is 0, it must be above 0"),
        (
            AdamW {
                weight_decay: f32::NAN,
                ..good
            },
            "weight_decay is NaN, it must be at least 0",
        ),
        (
            AdamW {
                grad_clip_norm: f32::INFINITY,
                ..good
            },
            "grad_clip_norm is inf, it must be at least 0",
        ),
    ];
    for (params, expected) in cases {
        assert_eq!(
            backend
                .optim_step(adapter, &params.into())
                .unwrap_err()
                .to_string(),
            expected
        );
        assert_eq!(backend.export_adapter(adapter).unwrap(), before);
    }
    assert_eq!(backend.optim_step(adapter, &good.into()).unwrap().step, 1);
}

#[test]
fn infinite_logits_are_refused_in_training_and_in_all_of_a_prompt() {
    let mut backend = load("llama", 2);
    // What the factor is multiplied with has one sign or the other: both infinities come up.
    let both = [1e38, -1e38].map(|factor| {
        let mut state = Reference::of("llama").adapter();
        let ends = [
            ("lm_head.lora_A.weight", 1e10),
            ("lm_head.lora_B.weight", factor),
        ];
        for (end, value) in ends {
            let mut weights = state.weights.iter_mut();
            let (_, tensor) = weights.find(|(name, _)| name.ends_with(end)).unwrap();
            tensor.data.fill(0.0);
            tensor.data[0] = value;
        }
        let adapter = backend.import_adapter(&state).unwrap();
        let slot = backend.open_slot(Some(adapter), 16).unwrap();
        let loss = Loss::CrossEntropy {
            weights: vec![0.0; 3],
        };
        let batch = [TrainSequence {
            loss,
            ..sequence(&[5, 5, 5], &[0, 0, 0], 3)
        }];

        let logits = backend.prefill(slot, &[5], false).unwrap().next_logits;
        let of_prompt = backend.prefill(slot, &[5, 0], true).map(|_| ());
        let of_border = tinker_engine::sampler::logprob_of(&logits, 0).map(|_| ());
        let of_training = backend.forward(Some(adapter), &batch).map(|_| ());

        for outcome in [of_prompt, of_border, of_training] {
            assert!(matches!(outcome, Err(Error::NotFinite(_))), "{outcome:?}");
        }
        logits[0]
    });
    assert!(both.contains(&f32::INFINITY) && both.contains(&f32::NEG_INFINITY));
}

const PLAIN: AdamW = AdamW {
    learning_rate: 1e-3,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.0,
    grad_clip_norm: 0.0,
};

#[test]
fn a_step_that_overflows_is_refused_and_leaves_the_adapter() {
    let mut backend = load("llama", 2);
    let name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";
    let mut state = Reference::of("llama").adapter();
    let zeros = |tensor: &tinker_engine::HostTensor| vec![0.0; tensor.data.len()];
    state.gradient = state
        .weights
        .iter()
        .map(|(name, tensor)| (name.clone(), zeros(tensor)))
        .collect();
    // Its square is not an f32.
    state.gradient.get_mut(name).unwrap()[5] = 1e25;
    let adapter = backend.import_adapter(&state).unwrap();

    let error = backend.optim_step(adapter, &PLAIN.into()).unwrap_err();

    assert!(matches!(error, Error::NotFinite(_)), "{error}");
    assert!(error.to_string().contains(&format!("`{name}`")), "{error}");
    assert_eq!(backend.export_adapter(adapter).unwrap(), state);
    let fast = AdamW {
        learning_rate: f32::MAX,
        weight_decay: 2.0,
        ..PLAIN
    };
    state.gradient.clear();
    let adapter = backend.import_adapter(&state).unwrap();
    assert!(backend.optim_step(adapter, &fast.into()).is_err());
    assert_eq!(backend.export_adapter(adapter).unwrap(), state);
}

#[test]
fn a_gradient_whose_sum_overflows_is_refused_and_stays_as_it_was() {
    let mut backend = load("llama", 2);
    let adapter = Reference::of("llama").import(&mut *backend);
    let mut batch = [sequence(&[5, 6, 7], &[6, 7, 8], 3)];
    backend.forward_backward(adapter, &batch).unwrap();
    let mut state = backend.export_adapter(adapter).unwrap();
    for value in state.gradient.values_mut().flatten() {
        *value = f32::MAX.copysign(*value);
    }
    let full = backend.import_adapter(&state).unwrap();
    batch[0].loss = Loss::CrossEntropy {
        weights: vec![1e34; 3],
    };

    let error = backend.forward_backward(full, &batch).unwrap_err();

    let message = error.to_string();
    assert!(
        message.starts_with("the accumulated gradient of `base_model.model."),
        "{message}"
    );
    assert_eq!(backend.export_adapter(full).unwrap(), state);
}

#[test]
fn logprobs_that_are_not_numbers_are_refused_even_where_they_do_not_count() {
    let mut backend = load("llama", 2);
    let mut state = Reference::of("llama").adapter();
    let name = "base_model.model.lm_head.lora_B.weight";
    state.weights.get_mut(name).unwrap().data.fill(1e38);
    let adapter = backend.import_adapter(&state).unwrap();
    let silent = TrainSequence {
        loss: Loss::CrossEntropy {
            weights: vec![0.0; 2],
        },
        ..sequence(&[1, 2], &[2, 3], 2)
    };
    let message = "sequence 0: the log-probability at position 0 is NaN";

    let forward = backend.forward(Some(adapter), std::slice::from_ref(&silent));
    assert_eq!(forward.unwrap_err().to_string(), message);
    let backward = backend.forward_backward(adapter, &[silent]);
    assert_eq!(backward.unwrap_err().to_string(), message);

    let slot = backend.open_slot(Some(adapter), 3).unwrap();
    backend.prefill(slot, &[1], true).unwrap();
    let error = backend.prefill(slot, &[1, 2], true).unwrap_err();
    let expected = format!(
        "slot {}: the log-probability of the token at position 2 is NaN",
        slot.0
    );
    assert_eq!(error.to_string(), expected);
    // The slot still holds one token of three.
    backend.prefill(slot, &[1, 2], false).unwrap();
}

#[test]
fn optimizer_states_that_no_training_leaves_are_refused() {
    let mut backend = load("llama", 1);
    let adapter = backend.create_adapter(&all_modules(2)).unwrap();
    backend.optim_step(adapter, &PLAIN.into()).unwrap();
    let good = backend.export_adapter(adapter).unwrap();
    let name = "base_model.model.lm_head.lora_A.weight";
    let mut negative = good.clone();
    negative.moments.get_mut(name).unwrap().1[3] = -0.5;
    let mut bare = good.clone();
    bare.moments.clear();
    let mut early = good.clone();
    early.step = 0;
    let mut late = good.clone();
    late.step = u64::MAX;
    let cases = [
        (
            negative,
            format!("second moments of `{name}` hold -0.5, below 0"),
        ),
        (bare, "an adapter at optimizer step 1 has no moments".into()),
        (early, "an adapter at optimizer step 0 has moments".into()),
        (
            late,
            format!("optimizer step {} is above {}", u64::MAX, 1u64 << 53),
        ),
    ];
    for (bad, expected) in cases {
        let error = backend.import_adapter(&bad).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    assert!(backend.import_adapter(&good).is_ok());
}

#[test]
fn bad_adapters_are_refused() {
    let mut backend = load("llama", 1);
    let nothing = LoraSpec {
        train_attn: false,
        train_mlp: false,
        train_unembed: false,
        ..all_modules(4)
    };
    let cases = [
        (all_modules(0), "LoRA rank 0 is not in 1..=64"),
        (all_modules(65), "LoRA rank 65 is not in 1..=64"),
        (
            nothing,
            "LoRA needs one of train_attn, train_mlp and train_unembed",
        ),
    ];
    for (spec, expected) in cases {
        assert_eq!(
            backend.create_adapter(&spec).unwrap_err().to_string(),
            expected
        );
    }
    let good = Reference::of("llama").adapter();
    let name = "base_model.model.lm_head.lora_A.weight";
    let mut bad = good.clone();
    bad.weights.get_mut(name).unwrap().data[3] = f32::NAN;
    assert_eq!(
        backend.import_adapter(&bad).unwrap_err().to_string(),
        format!("`{name}` holds NaN")
    );
    let mut bad = good.clone();
    bad.weights.get_mut(name).unwrap().shape = vec![4, 32];
    let message = format!("`{name}` has shape [4, 32], the base model asks for [4, 64]");
    assert_eq!(
        backend.import_adapter(&bad).unwrap_err().to_string(),
        message
    );
    let mut bad = good.clone();
    bad.weights.remove(name);
    assert_eq!(
        backend.import_adapter(&bad).unwrap_err().to_string(),
        format!("weight of `{name}` is missing")
    );
    let mut bad = good;
    let tensor = bad.weights[name].clone();
    bad.weights.insert("extra".into(), tensor);
    let message = "weight `extra` is of no module that the adapter trains";
    assert_eq!(
        backend.import_adapter(&bad).unwrap_err().to_string(),
        message
    );
}

#[test]
fn adapters_that_are_gone_are_named() {
    let mut backend = load("llama", 1);
    let adapter = backend.create_adapter(&all_modules(2)).unwrap();
    backend.drop_adapter(adapter);
    let message = format!("adapter {} is not loaded", adapter.0);
    assert_eq!(
        backend.export_adapter(adapter).unwrap_err().to_string(),
        message
    );
    assert_eq!(
        backend.snapshot_adapter(adapter).unwrap_err().to_string(),
        message
    );
    assert_eq!(
        backend
            .forward_backward(adapter, &[])
            .unwrap_err()
            .to_string(),
        message
    );
    assert_eq!(
        backend.open_slot(Some(adapter), 5).unwrap_err().to_string(),
        message
    );
}

#[test]
fn bad_slot_calls_are_refused_and_leave_the_slot() {
    let mut backend = load("llama", 1);
    assert_eq!(
        backend.open_slot(None, 0).unwrap_err().to_string(),
        "slot capacity 0 is not in 1..=512"
    );
    assert_eq!(
        backend.open_slot(None, 513).unwrap_err().to_string(),
        "slot capacity 513 is not in 1..=512"
    );
    let slot = backend.open_slot(None, 4).unwrap();
    backend.prefill(slot, &[1, 2, 3], false).unwrap();
    let gone = SlotId(99);
    let decode =
        |backend: &mut dyn Backend, rows: &[(SlotId, u32)]| backend.decode_step(rows).unwrap_err();
    let cases = [
        (
            backend.prefill(slot, &[], false).unwrap_err(),
            "there are no tokens to append",
        ),
        (
            backend.prefill(slot, &[320], false).unwrap_err(),
            "token 320 is not below the vocabulary size 320",
        ),
        (
            backend.prefill(slot, &[1, 2], false).unwrap_err(),
            "2 more tokens do not fit a slot that holds 3 of 4",
        ),
        (
            decode(&mut *backend, &[(slot, 1), (slot, 2)]),
            &format!("slot {} is named twice", slot.0),
        ),
        (
            decode(&mut *backend, &[(slot, 1), (gone, 2)]),
            "slot 99 is not loaded",
        ),
        (
            backend.fork_slot(gone).unwrap_err(),
            "slot 99 is not loaded",
        ),
    ];
    for (error, expected) in cases {
        assert_eq!(error.to_string(), expected);
    }
    backend.decode_step(&[(slot, 1)]).unwrap();
    let full = "1 more tokens do not fit a slot that holds 4 of 4";
    assert_eq!(decode(&mut *backend, &[(slot, 1)]).to_string(), full);
}

/// A copy of the Llama directory with one change.
fn broken(change: impl FnOnce(&std::path::Path)) -> String {
    let copy = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(dir("llama").join(name), copy.path().join(name)).unwrap();
    }
    change(copy.path());
    load_cpu(copy.path(), 1).unwrap_err().to_string()
}

#[test]
fn damaged_model_directories_are_refused_by_name() {
    let edit = |from: &'static str, to: &'static str| {
        move |dir: &std::path::Path| {
            let path = dir.join("config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            std::fs::write(path, text.replace(from, to)).unwrap();
        }
    };
    let truncate = |dir: &std::path::Path| {
        let path = dir.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() - 100]).unwrap();
    };
    let scribble = |dir: &std::path::Path| {
        let path = dir.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[..8].fill(0xff);
        std::fs::write(path, bytes).unwrap();
    };
    let poison = |dir: &std::path::Path| {
        let path = dir.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
    };
    let cases = [
        (
            broken(|dir| std::fs::remove_file(dir.join("config.json")).unwrap()),
            "No such file",
        ),
        (
            broken(|dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap()),
            "has neither",
        ),
        (
            broken(edit("LlamaForCausalLM", "GPT2LMHeadModel")),
            "`GPT2LMHeadModel` is not supported",
        ),
        (
            broken(edit("\"hidden_size\": 64", "\"hidden_size\": 72")),
            "config.json asks for",
        ),
        (
            broken(edit("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3")),
            "is missing",
        ),
        (
            broken(edit("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1")),
            "has weights of layer 1",
        ),
        (broken(truncate), "safetensors"),
        (broken(scribble), "not a valid safetensors file"),
        (broken(poison), "holds NaN at index"),
    ];
    for (message, expected) in cases {
        assert!(
            message.contains(expected),
            "`{message}` does not say `{expected}`"
        );
    }
}
