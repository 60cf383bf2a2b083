//! Adapters beside PEFT: its logits with ours, and ours with those that it or others wrote.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};
use tinker_engine::peft::read_peft;
use tinker_engine::{AdapterState, HostTensor};

use crate::common::{
    ARCHITECTURES, MODELS, Reference, dir, floats, load, relative, tokens, write_tensors,
};

/// Logits after the prompt that PEFT was given.
fn logits(model: &str, state: &AdapterState) -> Vec<f32> {
    let prompt = tokens(&Reference::of(model).json["peft"]["tokens"]);
    let mut backend = load(model, 2);
    let adapter = backend.import_adapter(state).unwrap();
    let slot = backend.open_slot(Some(adapter), prompt.len()).unwrap();
    backend.prefill(slot, &prompt, false).unwrap().next_logits
}

#[test]
fn an_exported_adapter_gives_the_logits_that_it_gives_in_peft() {
    let models = MODELS.into_iter().chain(ARCHITECTURES);
    for model in models.filter(|model| *model != "qwen3_moe_mixed") {
        let reference = Reference::of(model);
        let state = reference.adapter();
        let mut backend = load(model, 1);
        let adapter = backend.import_adapter(&state).unwrap();
        // PEFT read the file that this state is of, and an export gives it back to the bit.
        let exported = backend.export_adapter(adapter).unwrap();
        assert_eq!(exported.weights, state.weights, "{model}");

        let ours = logits(model, &exported);

        let theirs = floats(&reference.json["peft"]["logits"]);
        for (a, b) in ours.iter().zip(&theirs) {
            assert!((a - b).abs() < 1e-4, "{model}: {a} {b}");
        }
    }
}

/// Writes an adapter as PEFT does.
fn write<'a>(
    dir: &Path,
    config: &Value,
    dtype: Dtype,
    tensors: impl Iterator<Item = (&'a String, &'a HostTensor)>,
) {
    let mut all = json!({ "peft_type": "LORA", "bias": "none", "target_modules": ["q_proj"] });
    let fields = all.as_object_mut().unwrap();
    fields.extend(config.as_object().unwrap().clone());
    std::fs::write(dir.join("adapter_config.json"), all.to_string()).unwrap();
    let file = dir.join("adapter_model.safetensors");
    match dtype {
        Dtype::F16 => write_tensors(&file, dtype, tensors, |x| {
            half::f16::from_f32(x).to_le_bytes().to_vec()
        }),
        _ => write_tensors(&file, dtype, tensors, |x| x.to_le_bytes().to_vec()),
    }
}

#[test]
fn an_adapter_as_peft_wrote_it_gives_its_logits() {
    for model in ["llama", "phi3", "gemma3", "qwen3_moe"] {
        let reference = Reference::of(model);
        let state = reference.adapter();
        let files = tempfile::tempdir().unwrap();
        let config = json!({ "r": state.spec.rank, "lora_alpha": 32 });
        write(files.path(), &config, Dtype::F32, state.weights.iter());

        let read = read_peft(files.path(), &dir(model), state.spec.rank).unwrap();

        let theirs = floats(&reference.json["peft"]["logits"]);
        let off = relative(&logits(model, &read), &theirs);
        assert!(off < 1e-5, "{model}: off by {off:e}");
    }
}

#[test]
fn an_adapter_that_peft_made_gives_its_logits() {
    // Experts joined in one module, and the frozen weight of the head beside its LoRA.
    let reference = Reference::of("qwen3_moe");

    let read = read_peft(&dir("qwen3_moe").join("peft"), &dir("qwen3_moe"), 4).unwrap();

    assert_eq!(read.spec.rank, 4);
    let theirs = floats(&reference.json["peft_own"]["logits"]);
    for (a, b) in logits("qwen3_moe", &read).iter().zip(&theirs) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
    let plain = logits("qwen3_moe", &reference.adapter());
    assert!(relative(&plain, &theirs) > 0.01, "the adapters differ");
}

#[test]
fn alpha_rank_and_modules_are_the_adapters_own() {
    let reference = Reference::of("llama");
    let state = reference.adapter();
    let kept = |name: &String| name.contains("q_proj") || name.contains("layers.1.mlp.up_proj");
    let tensors = || state.weights.iter().filter(|(name, _)| kept(name));
    // (config, what our scale of 32 / rank has to be multiplied by)
    let configs = [
        (json!({ "r": 4, "lora_alpha": 8 }), 0.25),
        (json!({ "r": 4, "lora_alpha": 8, "use_rslora": true }), 0.5),
    ];
    for (config, factor) in configs {
        let files = tempfile::tempdir().unwrap();
        write(files.path(), &config, Dtype::F32, tensors());

        let read = read_peft(files.path(), &dir("llama"), 4).unwrap();

        assert!(read.spec.train_attn && read.spec.train_mlp && !read.spec.train_unembed);
        assert_eq!(read.weights.len(), 2 * 2 * 7);
        for (name, tensor) in &read.weights {
            let scale = if name.contains("lora_A") { 1.0 } else { factor };
            let scale = if kept(name) { scale } else { 0.0 };
            let wanted: Vec<f32> = state.weights[name].data.iter().map(|x| x * scale).collect();
            assert_eq!(tensor.data, wanted, "{name} {config}");
        }
    }
}

#[test]
fn a_module_that_an_adapter_leaves_out_is_not_trained() {
    let reference = Reference::of("llama");
    let state = reference.adapter();
    let files = tempfile::tempdir().unwrap();
    let config = json!({ "r": 4, "lora_alpha": 32 });
    let tensors = state
        .weights
        .iter()
        .filter(|(name, _)| name.contains("v_proj"));
    write(files.path(), &config, Dtype::F32, tensors);
    let mut backend = load("llama", 1);
    let read = read_peft(files.path(), &dir("llama"), 4).unwrap();
    let adapter = backend.import_adapter(&read).unwrap();

    backend
        .forward_backward(adapter, &reference.batch("cross_entropy"))
        .unwrap();

    for (name, gradient) in backend.export_adapter(adapter).unwrap().gradient {
        let is_zero = gradient.iter().all(|g| *g == 0.0);
        assert_eq!(is_zero, !name.contains("v_proj"), "{name}");
    }
}

#[test]
fn ranks_of_modules_are_padded_to_the_largest() {
    let reference = Reference::of("llama");
    let mut state = reference.adapter();
    let name = |factor: &str| {
        format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.weight")
    };
    // The first two rows of A, and columns of B.
    let a = state.weights.get_mut(&name("A")).unwrap();
    let inner = a.shape[1];
    a.shape[0] = 2;
    a.data.truncate(2 * inner);
    let b = state.weights.get_mut(&name("B")).unwrap();
    let halves = b.data.chunks(4).flat_map(|row| row[..2].to_vec());
    b.data = halves.collect();
    b.shape[1] = 2;
    let files = tempfile::tempdir().unwrap();
    let config = json!({ "r": 4, "lora_alpha": 16, "rank_pattern": { "layers.0.*q_proj": 2 } });
    write(files.path(), &config, Dtype::F16, state.weights.iter());

    let read = read_peft(files.path(), &dir("llama"), 4).unwrap();

    let round = |x: f32| half::f16::from_f32(x).to_f32();
    let (a, b) = (&read.weights[&name("A")], &read.weights[&name("B")]);
    assert_eq!((a.shape[0], b.shape[1]), (4, 4));
    assert!(a.data[2 * inner..].iter().all(|x| *x == 0.0));
    let (wanted, row) = (&state.weights[&name("B")].data, &b.data[4..8]);
    // 16 / 2 beside our 32 / 4.
    assert_eq!(row, [round(wanted[2]), round(wanted[3]), 0.0, 0.0]);
    // 16 / 4 in the others.
    let other = name("B").replace("q_proj", "k_proj");
    let first = round(state.weights[&other].data[0]) / 2.0;
    assert_eq!(read.weights[&other].data[0], first);
}

#[test]
fn what_is_no_plain_lora_of_this_model_is_refused_by_name() {
    let state = Reference::of("llama").adapter();
    let plain = json!({ "r": 4, "lora_alpha": 32 });
    let with = |key: &str, value: Value| {
        let mut config = plain.clone();
        config[key] = value;
        config
    };
    let cases = [
        (with("use_dora", json!(true)), "use_dora is not supported"),
        (
            with("peft_type", json!("IA3")),
            "peft_type `IA3` is not supported",
        ),
        (with("bias", json!("all")), "bias `all` is not supported"),
        (
            with("modules_to_save", json!(["lm_head"])),
            "modules_to_save is not supported",
        ),
        (with("r", json!(0)), "r is 0 and lora_alpha 32"),
        (with("r", json!(8)), "the adapter's tensors have rank 4"),
    ];
    for (config, expected) in cases {
        let files = tempfile::tempdir().unwrap();
        write(files.path(), &config, Dtype::F32, state.weights.iter());
        let error = read_peft(files.path(), &dir("llama"), 4).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let files = tempfile::tempdir().unwrap();
    write(files.path(), &plain, Dtype::F32, state.weights.iter());
    for (model, expected) in [
        ("phi3", "is of no LoRA module of Phi3ForCausalLM"),
        ("mistral", "has shape"),
    ] {
        let error = read_peft(files.path(), &dir(model), 4).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    std::fs::remove_file(files.path().join("adapter_config.json")).unwrap();
    let error = read_peft(files.path(), &dir("llama"), 4).unwrap_err();
    assert!(error.to_string().contains("adapter_config.json"), "{error}");
}

#[test]
fn an_adapter_of_another_rank_than_announced_is_refused() {
    let state = Reference::of("llama").adapter();
    let files = tempfile::tempdir().unwrap();
    let config = json!({ "r": 4, "lora_alpha": 32 });
    write(files.path(), &config, Dtype::F32, state.weights.iter());

    let error = read_peft(files.path(), &dir("llama"), 2).unwrap_err();

    let expected = "the adapter has rank 4 and rank 2 was announced";
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn a_factor_without_elements_is_refused_by_name() {
    // Of all experts of a block, and of one module.
    for (model, module, hidden, out) in [
        ("qwen3_moe", "mlp.experts", 32, 64),
        ("llama", "self_attn.q_proj", 64, 64),
    ] {
        let name = |f: &str| format!("base_model.model.model.layers.0.{module}.lora_{f}.weight");
        let empty = |shape: [usize; 2]| HostTensor {
            shape: shape.to_vec(),
            data: Vec::new(),
        };
        let tensors = [
            (name("A"), empty([0, hidden])),
            (name("B"), empty([out, 0])),
        ];
        let files = tempfile::tempdir().unwrap();
        let config = json!({ "r": 4, "lora_alpha": 32, "rank_pattern": { "x": 4 } });
        let tensors = tensors.iter().map(|(name, tensor)| (name, tensor));
        write(files.path(), &config, Dtype::F32, tensors);

        let error = read_peft(files.path(), &dir(model), 4).unwrap_err();

        let expected = format!("`{}` has shape [0, {hidden}]", name("A"));
        assert!(error.to_string().contains(&expected), "{error}");
    }
}
