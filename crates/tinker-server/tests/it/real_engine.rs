//! The same promises over the real engine and a tiny model.

use std::path::{Path, PathBuf};

use serde_json::json;
use tinker_engine::{CpuOptions, Precision, Quantization, load_cpu_with};
use tinker_server::{ApiToken, AppOptions, Loader};
use tinker_types::{LossFn, TensorData};

use crate::harness::{Harness, TOKEN, datum, fb, raw_datum};

fn tiny_model() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/numerics/qwen3");
    root.canonicalize().unwrap()
}

fn open(home: &Path) -> Harness {
    Harness::with(AppOptions {
        threads: 2,
        ..AppOptions::new(home.to_owned(), ApiToken::new(TOKEN).unwrap())
    })
}

async fn create(server: &Harness, session: &str, number: u64) -> String {
    let body = json!({"session_id": session, "model_seq_id": number,
        "base_model": tiny_model(), "lora_config": {"rank": 4, "seed": 3}});
    let id = server.submit("/create_model", body).await;
    server.result(&id).await.json()["model_id"]
        .as_str()
        .unwrap()
        .to_owned()
}

async fn save(server: &Harness, run: &str, seq: u64, name: &str) -> String {
    let body = json!({"model_id": run, "seq_id": seq, "path": name});
    let id = server.submit("/save_weights", body).await;
    server.result(&id).await.json()["path"]
        .as_str()
        .unwrap()
        .to_owned()
}

fn files(home: &Path, run: &str, name: &str) -> Vec<u8> {
    let run = run.replace(':', "_");
    let dir = home
        .join("server/checkpoints")
        .join(run)
        .join("weights")
        .join(name);
    let mut bytes = std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    bytes.extend(std::fs::read(dir.join("optimizer.safetensors")).unwrap());
    bytes
}

async fn step(server: &Harness, run: &str, seq: u64) {
    server.forward_backward(run, seq, &[1, 2, 3, 4, 5]).await;
    let step = server.optim_step(run, seq + 1).await;
    let metrics = server.result(&step).await.json()["metrics"].clone();
    assert!(metrics["grad_norm"].as_f64().unwrap() > 0.0, "{metrics}");
}

#[tokio::test]
async fn rebuilt_and_reloaded_runs_continue_bit_for_bit() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let run = create(&server, &session, 0).await;
    step(&server, &run, 1).await;
    step(&server, &run, 3).await;
    let path = save(&server, &run, 5, "mid").await;
    let body = json!({"session_id": session, "model_seq_id": 1, "path": path, "optimizer": true});
    let id = server.submit("/load_weights", body).await;
    let reloaded = server.result(&id).await.json()["model_id"]
        .as_str()
        .unwrap()
        .to_owned();
    step(&server, &reloaded, 1).await;
    save(&server, &reloaded, 3, "end").await;
    // The first run is rebuilt from its log by another process before it takes the same step.
    drop(server);
    let server = open(home.path());
    step(&server, &run, 6).await;
    save(&server, &run, 8, "end").await;

    assert!(files(home.path(), &run, "end") == files(home.path(), &reloaded, "end"));
}

#[tokio::test]
async fn a_gradient_in_flight_survives_a_rebuild_bit_for_bit() {
    let home = tempfile::tempdir().unwrap();
    let mut server = open(home.path());
    let session = server.session().await;
    let mut ends = Vec::new();
    for number in 0..3 {
        let run = create(&server, &session, number).await;
        step(&server, &run, 1).await;
        let gradient = server.forward_backward(&run, 3, &[5, 4, 3, 2]).await;
        server.output(&gradient).await;
        match number {
            // From the log.
            1 => {
                drop(server);
                server = open(home.path());
            }
            // From a snapshot.
            2 => {
                let body = json!({"model_id": run});
                let id = server.submit("/unload_model", body).await;
                assert_eq!(server.result(&id).await.json()["model_id"], run);
            }
            _ => {}
        }
        server.forward_backward(&run, 4, &[9, 8, 7]).await;
        let step = server.optim_step(&run, 5).await;
        assert_eq!(server.result(&step).await.json()["metrics"]["step"], 2.0);
        save(&server, &run, 6, "end").await;
        ends.push(files(home.path(), &run, "end"));
    }

    assert!(ends[1] == ends[0], "rebuilt from the log");
    assert!(ends[2] == ends[0], "rebuilt from a snapshot");
}

#[tokio::test]
async fn sampled_logprobs_equal_those_of_a_forward_pass() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let run = create(&server, &session, 0).await;
    step(&server, &run, 1).await;
    let body = json!({"model_id": run, "seq_id": 3, "sampling_session_seq_id": 0});
    let id = server.submit("/save_weights_for_sampler", body).await;
    let sampler = server.result(&id).await.json()["sampling_session_id"].clone();

    let sample = json!({"sampling_session_id": sampler, "seq_id": 0, "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 6, "stop": []}});
    let id = server.submit("/asample", sample).await;
    let sequence = server.samples(&id).await.sequences.remove(0);
    let mut tokens = vec![1, 2, 3];
    tokens.extend(&sequence.tokens);
    let (input, targets) = (&tokens[..tokens.len() - 1], &tokens[1..]);
    let datum = tinker_types::Datum::cross_entropy(
        tinker_types::ModelInput::from_tokens(input.to_vec()),
        targets.to_vec(),
        vec![1.0; targets.len()],
    );
    let mut forward = fb(&run, 4, vec![datum.unwrap()]);
    forward.forward_only = true;
    let answer = server.post_proto(&forward).await;
    let output = server
        .output(answer.json()["request_id"].as_str().unwrap())
        .await;

    let recomputed = output.loss_fn_outputs[0]["logprobs"].as_floats().unwrap()[2..].to_vec();
    for (a, b) in sequence.logprobs.unwrap().iter().zip(recomputed) {
        assert!((a - b).abs() < 1e-4, "{a} and {b}");
    }
}

#[tokio::test]
async fn a_damaged_base_model_is_named() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::copy(tiny_model().join("config.json"), model.join("config.json")).unwrap();
    std::fs::write(model.join("model.safetensors"), b"damage").unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let body = json!({"session_id": session, "model_seq_id": 0, "base_model": model,
        "lora_config": {"rank": 4}});

    let id = server.submit("/create_model", body).await;

    let failure = server.failure(&id).await;
    assert!(failure.contains("model.safetensors"), "{failure}");
}

#[tokio::test]
async fn an_adapter_is_not_put_on_another_base_model() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(tiny_model().join(file), model.join(file)).unwrap();
    }
    let server = open(home.path());
    let session = server.session().await;
    let body = json!({"session_id": session, "model_seq_id": 0, "base_model": model,
        "lora_config": {"rank": 4}});
    let id = server.submit("/create_model", body).await;
    let run = server.result(&id).await.json()["model_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let path = save(&server, &run, 1, "x").await;
    drop(server);
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    std::fs::write(model.join("config.json"), format!("{config} ")).unwrap();

    let server = open(home.path());
    let body = json!({"session_id": session, "model_seq_id": 1, "path": path, "optimizer": true});
    let id = server.submit("/load_weights", body).await;

    let failure = server.failure(&id).await;
    assert!(failure.contains("it fits no other weights"), "{failure}");
}

/// A server that holds base models, or computes, with fewer bits.
fn open_with(home: &Path, weights: Option<Quantization>, precision: Precision) -> Harness {
    let load = move |dir: &Path, threads: usize| {
        let options = CpuOptions {
            threads,
            weights,
            precision,
            ..CpuOptions::default()
        };
        load_cpu_with(dir, &options)
    };
    Harness::with(AppOptions {
        threads: 2,
        weights,
        precision,
        loader: Loader::new(load),
        ..AppOptions::new(home.to_owned(), ApiToken::new(TOKEN).unwrap())
    })
}

#[tokio::test]
async fn what_was_trained_on_other_bits_says_with_what_to_restart() {
    let plain = (None, Precision::F32);
    let nf4 = (Some(Quantization::Nf4), Precision::F32);
    let bf16 = (None, Precision::Bf16);
    for (there, here, restart) in [
        (plain, nf4, "restart it without --weights"),
        (nf4, plain, "restart it with --weights nf4"),
        (plain, bf16, "restart it without --precision"),
        (
            nf4,
            bf16,
            "restart it with --weights nf4 and without --precision",
        ),
        (bf16, plain, "restart it with --precision bf16"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let server = open_with(home.path(), there.0, there.1);
        let said = server.get("/get_server_capabilities").await.json();
        assert_eq!(said.get("weights"), there.0.map(|_| json!("nf4")).as_ref());
        assert_eq!(said["precision"], there.1.name());
        assert_eq!(said["device"], "cpu");
        let session = server.session().await;
        let run = create(&server, &session, 0).await;
        step(&server, &run, 1).await;
        let path = save(&server, &run, 3, "x").await;
        let id = server
            .submit("/unload_model", json!({"model_id": run}))
            .await;
        server.result(&id).await;
        drop(server);

        let server = open_with(home.path(), here.0, here.1);
        let body =
            json!({"session_id": session, "model_seq_id": 1, "path": path, "optimizer": true});
        let loaded = server.submit("/load_weights", body).await;
        let continued = server.optim_step(&run, 4).await;
        for id in [loaded, continued] {
            let failure = server.failure(&id).await;
            assert!(failure.contains(restart), "{failure}");
        }
        drop(server);

        let server = open_with(home.path(), there.0, there.1);
        step(&server, &run, 5).await;
    }
}

/// A model directory that is a copy of the tiny one with another `config.json`, and a tokenizer of so many
/// tokens if it has one.
fn copied(
    home: &Path,
    change: impl FnOnce(&mut serde_json::Value),
    n_tokens: Option<u32>,
) -> PathBuf {
    let dir = home.join("copied");
    std::fs::create_dir_all(&dir).unwrap();
    let weights = "model.safetensors";
    std::fs::copy(tiny_model().join(weights), dir.join(weights)).unwrap();
    let config = std::fs::read(tiny_model().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    change(&mut config);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    if let Some(n_tokens) = n_tokens {
        let vocab: serde_json::Map<String, serde_json::Value> = (0..n_tokens)
            .map(|id| (format!("t{id}"), json!(id)))
            .collect();
        let tokenizer = json!({"version": "1.0", "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}});
        std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    }
    dir.canonicalize().unwrap()
}

/// What creating a run on a model directory fails with.
async fn refused(server: &Harness, model: &Path) -> String {
    let session = server.session().await;
    let body = json!({"session_id": session, "model_seq_id": 0, "base_model": model,
        "lora_config": {"rank": 4}});
    let id = server.submit("/create_model", body).await;
    server.failure(&id).await
}

#[tokio::test]
async fn a_model_that_cannot_be_served_says_what_was_found_and_what_is_supported() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());

    let model = copied(
        home.path(),
        |config| config["architectures"] = json!(["MambaForCausalLM"]),
        None,
    );
    let why = refused(&server, &model).await;
    assert!(why.contains("MambaForCausalLM"), "{why}");
    assert!(
        why.contains("LlamaForCausalLM") && why.contains("Qwen3ForCausalLM"),
        "{why}"
    );

    let quantized = |config: &mut serde_json::Value| {
        config["quantization_config"] = json!({"quant_method": "awq", "bits": 4});
    };
    let why = refused(&server, &copied(home.path(), quantized, None)).await;
    assert!(
        why.contains("awq") && why.contains("supported: F32, F16, BF16"),
        "{why}"
    );
}

#[tokio::test]
async fn a_tokenizer_of_another_model_is_refused_with_both_sizes() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let config = std::fs::read(tiny_model().join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let n_rows = config["vocab_size"].as_u64().unwrap();

    let model = copied(home.path(), |_| {}, Some(n_rows as u32 + 5));
    let why = refused(&server, &model).await;
    let expected = format!(
        "token ids up to {}, and its weights have {n_rows} tokens",
        n_rows + 4
    );
    assert!(why.contains(&expected), "{why}");

    let model = copied(home.path(), |_| {}, Some(n_rows as u32));
    let session = server.session().await;
    let body = json!({"session_id": session, "model_seq_id": 0, "base_model": model,
        "lora_config": {"rank": 4}});
    let id = server.submit("/create_model", body).await;
    assert_eq!(server.result(&id).await.json()["type"], "create_model");
}

#[tokio::test]
async fn values_that_are_not_finite_are_named_and_leave_every_byte_as_it_was() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let (run, undisturbed) = (
        create(&server, &session, 0).await,
        create(&server, &session, 1).await,
    );
    for run in [&run, &undisturbed] {
        step(&server, run, 1).await;
        // A gradient that waits for its step is part of the state.
        let pass = server.forward_backward(run, 3, &[5, 4, 3]).await;
        server.output(&pass).await;
    }
    save(&server, &run, 4, "before").await;

    let tokens = [1, 2, 3];
    let targets = || ("target_tokens", TensorData::ints(vec![2, 3, 4]));
    let floats = |name: &'static str, bad: Option<f32>| {
        let mut values = vec![-1.0, -1.0, -1.0];
        values[2] = bad.unwrap_or(-1.0);
        (name, TensorData::floats(values))
    };
    let policy = |q: Option<f32>, a: Option<f32>| {
        vec![targets(), floats("logprobs", q), floats("advantages", a)]
    };
    let (nan, inf) = (Some(f32::NAN), Some(f32::INFINITY));
    let cases = [
        (
            LossFn::CrossEntropy,
            vec![targets(), floats("weights", nan)],
            "weights is NaN",
        ),
        (
            LossFn::CrossEntropy,
            vec![targets(), floats("weights", inf)],
            "weights is inf",
        ),
        (
            LossFn::ImportanceSampling,
            policy(None, nan),
            "advantages is NaN",
        ),
        (LossFn::Ppo, policy(None, inf), "advantages is inf"),
        (LossFn::Cispo, policy(nan, None), "logprobs is NaN"),
        (LossFn::Dro, policy(inf, None), "logprobs is inf"),
    ];
    let mut seq = 4;
    for (loss_fn, inputs, expected) in cases {
        seq += 1;
        let mut request = fb(&run, seq, vec![datum(&tokens), raw_datum(&tokens, inputs)]);
        if loss_fn != LossFn::CrossEntropy {
            request.data.remove(0);
        }
        let at = request.data.len() - 1;
        request.loss_fn = loss_fn;
        let answer = server.post_proto(&request).await;
        let id = answer.json()["request_id"].as_str().unwrap().to_owned();
        let why = server.failure(&id).await;
        assert_eq!(
            why,
            format!("datum {at}: {expected} at position 2: it must be finite")
        );
    }
    // So large that the loss has no number: found while it is computed.
    let huge = vec![
        targets(),
        ("weights", TensorData::floats(vec![f32::MAX; 3])),
    ];
    seq += 1;
    let answer = server
        .post_proto(&fb(
            &run,
            seq,
            vec![datum(&tokens), raw_datum(&tokens, huge)],
        ))
        .await;
    let id = answer.json()["request_id"].as_str().unwrap().to_owned();
    let why = server.failure(&id).await;
    assert!(why.contains("sequence 1"), "{why}");
    let rate = json!({"model_id": run, "seq_id": seq + 1, "adam_params": {"learning_rate": 1e39}});
    let id = server.submit("/optim_step", rate).await;
    server.failure(&id).await;

    save(&server, &run, seq + 2, "after").await;
    assert!(files(home.path(), &run, "before") == files(home.path(), &run, "after"));
    for (run, seq) in [(&run, seq + 3), (&undisturbed, 4)] {
        let step = server.optim_step(run, seq).await;
        server.result(&step).await;
        save(&server, run, seq + 1, "end").await;
    }
    assert!(files(home.path(), &run, "end") == files(home.path(), &undisturbed, "end"));
}
