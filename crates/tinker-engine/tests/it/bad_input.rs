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
            "sequence 1: the loss is NaN",
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
                .optim_step(adapter, &params)
                .unwrap_err()
                .to_string(),
            expected
        );
        assert_eq!(backend.export_adapter(adapter).unwrap(), before);
    }
    assert_eq!(backend.optim_step(adapter, &good).unwrap().step, 1);
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
