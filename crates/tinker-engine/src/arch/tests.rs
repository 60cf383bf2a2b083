//! What `config.json` of each family is read as, and what is refused.

use super::*;

fn config(extra: &str) -> String {
    format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4{extra}}}"#
    )
}

#[test]
fn old_and_new_spellings_of_rope_mean_the_same() {
    let scaling = r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64"#;
    let old =
        format!(r#", "rope_theta": 500.0, "rope_scaling": {{"rope_type": "llama3", {scaling}}}"#);
    let new = format!(
        r#", "rope_parameters": {{"rope_theta": 500.0, "rope_type": "llama3", {scaling}}}"#
    );

    let (old, new) = (
        Arch::parse(&config(&old)).unwrap(),
        Arch::parse(&config(&new)).unwrap(),
    );

    assert_eq!(old, new);
    assert_eq!(old.ropes[0].frequencies[0], 1.0);
    assert!(old.ropes[0].frequencies[1] < 500f32.powf(-0.5));
}

#[test]
fn rotary_scalings_are_those_of_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/numerics/rope.json");
    let text = std::fs::read_to_string(path).unwrap();
    let cases: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (name, case) in cases.as_object().unwrap() {
        let parameters = case["rope_parameters"].to_string();
        let extra = format!(
            r#", "head_dim": 32, "max_position_embeddings": 512, "rope_parameters": {parameters}"#
        );

        let arch = Arch::parse(&config(&extra)).unwrap();

        let rope = &arch.ropes[0];
        let amplitude = case["amplitude"].as_f64().unwrap() as f32;
        assert!((rope.amplitude - amplitude).abs() < 1e-6, "{name}");
        let frequencies = case["frequencies"].as_array().unwrap();
        assert_eq!(rope.frequencies.len(), frequencies.len(), "{name}");
        for (ours, theirs) in rope.frequencies.iter().zip(frequencies) {
            let theirs = theirs.as_f64().unwrap() as f32;
            assert!(
                (ours / theirs - 1.0).abs() < 2e-6,
                "{name}: {ours} {theirs}"
            );
        }
        let context = if name.starts_with("longrope") {
            128
        } else {
            512
        };
        assert_eq!(arch.max_context, context, "{name}");
    }
}

/// Windows of the blocks of a model of four.
fn windows(class: &str, extra: &str) -> Result<Vec<Option<usize>>, String> {
    let text = config(extra)
        .replace("LlamaForCausalLM", class)
        .replace("\"num_hidden_layers\": 1", "\"num_hidden_layers\": 4")
        .replace(
            "\"hidden_size\"",
            "\"max_position_embeddings\": 999, \"hidden_size\"",
        );
    Ok(Arch::parse(&text)?
        .layers
        .iter()
        .map(|l| l.window)
        .collect())
}

#[test]
fn windows_are_where_each_family_has_them() {
    let (local, global) = (Some(7), None);
    let on = r#", "use_sliding_window": true, "sliding_window": 7"#;
    let types = r#", "sliding_window": 7, "layer_types":
        ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]"#;
    let cases = [
        ("LlamaForCausalLM", on.to_owned(), [global; 4]),
        (
            "MistralForCausalLM",
            r#", "sliding_window": 7"#.into(),
            [local; 4],
        ),
        (
            "MistralForCausalLM",
            r#", "sliding_window": null"#.into(),
            [global; 4],
        ),
        (
            "Qwen2ForCausalLM",
            r#", "sliding_window": 7"#.into(),
            [global; 4],
        ),
        (
            "Qwen2ForCausalLM",
            format!(r#"{on}, "max_window_layers": 3"#),
            [global, global, global, local],
        ),
        ("Qwen3ForCausalLM", types.to_owned(), [global; 4]),
        (
            "Qwen3ForCausalLM",
            format!(r#"{types}, "use_sliding_window": true"#),
            [global, local, global, local],
        ),
        (
            "Gemma2ForCausalLM",
            r#", "sliding_window": 7"#.into(),
            [local, global, local, global],
        ),
        (
            "Gemma3ForCausalLM",
            r#", "sliding_window": 7, "sliding_window_pattern": 3"#.into(),
            [local, local, global, local],
        ),
        (
            "Gemma3ForCausalLM",
            types.to_owned(),
            [global, local, global, local],
        ),
        // A window that no sequence fills is none.
        ("MistralForCausalLM", String::new(), [global; 4]),
    ];
    for (class, extra, expected) in cases {
        assert_eq!(windows(class, &extra).unwrap(), expected, "{class} {extra}");
    }
    for (class, extra, expected) in [
        (
            "MistralForCausalLM",
            r#", "sliding_window": 0"#,
            "sliding_window is 0",
        ),
        (
            "Gemma2ForCausalLM",
            r#", "layer_types": ["full_attention"]"#,
            "layer_types has 1 entries for 4 layers",
        ),
        (
            "Qwen3ForCausalLM",
            r#", "layer_types": ["a", "a", "a", "linear_attention"]"#,
            "layer type `a` is not supported; supported: sliding_attention, full_attention",
        ),
        (
            "Gemma2ForCausalLM",
            r#", "final_logit_softcapping": 0"#,
            "final_logit_softcapping is 0, it must be above 0",
        ),
    ] {
        assert_eq!(windows(class, extra).unwrap_err(), expected);
    }
}

fn moe(extra: &str) -> String {
    config(extra).replace("Llama", "Qwen3Moe")
}

#[test]
fn what_cannot_be_computed_is_refused_by_name() {
    let cases = [
        (
            config("").replace("Llama", "Mamba"),
            "architecture `MambaForCausalLM` is not supported",
        ),
        (
            config(r#", "rope_scaling": {"type": "axial"}"#),
            "rope type `axial` is not supported; supported: default, linear",
        ),
        (
            config(r#", "hidden_act": "gelu""#),
            "hidden_act `gelu` is not supported",
        ),
        (
            config(r#", "quantization_config": {"quant_method": "gptq"}"#),
            "quantised weights (quant_method `gptq`) are not supported; supported: F32",
        ),
        (
            config(r#", "num_key_value_heads": 3"#),
            "4 query heads cannot share 3 key heads",
        ),
        (config(r#", "head_dim": 5"#), "head_dim 5 is odd"),
        (config("").replace("32", "0"), "vocab_size is 0"),
        (
            config(r#", "head_dim": 18446744073709551614"#),
            "head_dim is 18446744073709551614",
        ),
        (
            config(r#", "head_dim": 1000000000"#),
            "head_dim is 1000000000, above 65536",
        ),
        (
            config(r#", "rope_theta": 0"#),
            "rope_theta is 0, it must be above 0",
        ),
        (
            config(r#", "rope_parameters": {"rope_theta": -10.0}"#),
            "rope_theta is -10, it must be above 0",
        ),
        (
            config(r#", "rope_theta": 1e-200"#),
            "gives the frequency inf",
        ),
        (
            config(r#", "rms_norm_eps": -1e-6"#),
            "rms_norm_eps is -0.000001, it must be at least 0",
        ),
        (
            config(r#", "rms_norm_eps": 1e300"#),
            "rms_norm_eps is inf, it must be at least 0",
        ),
        (
            moe(r#", "num_experts": 4, "num_experts_per_tok": 5"#),
            "num_experts_per_tok is 5, it must be in 1..=4",
        ),
        (
            moe(r#", "num_experts": 5000"#),
            "num_experts is 5000, it must be in 1..=4096",
        ),
        (
            moe(r#", "moe_intermediate_size": 0"#),
            "moe_intermediate_size is 0",
        ),
        (
            config(r#", "partial_rotary_factor": 0.5"#),
            "partial_rotary_factor 0.5 is not supported here",
        ),
        (
            config(r#", "partial_rotary_factor": 0.3"#).replace("Llama", "Phi3"),
            "partial_rotary_factor 0.3 of head_dim 4 is not an even number of elements",
        ),
        (
            config(r#", "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}"#),
            "rope scaling has 1 usable numbers in `short_factor` for 2 pairs",
        ),
        (
            config(r#", "use_bidirectional_attention": true"#).replace("Llama", "Gemma3"),
            "use_bidirectional_attention is not supported",
        ),
        ("{".into(), "EOF while parsing"),
    ];
    for (text, expected) in cases {
        let message = Arch::parse(&text).unwrap_err();
        assert!(message.contains(expected), "{message}");
    }
}
