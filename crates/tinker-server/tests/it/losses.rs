//! Losses and optimizers from the wire to the gradient, over the real engine and a tiny model.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tinker_server::{ApiToken, AppOptions};
use tinker_types::{ForwardBackwardRequest, LossConfigValue, LossFn, TensorData};

use crate::harness::{Harness, TOKEN, fb, raw_datum};

fn fixtures(path: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    root.join(path).canonicalize().unwrap()
}

fn open(home: &Path) -> Harness {
    Harness::with(AppOptions {
        threads: 2,
        ..AppOptions::new(home.to_owned(), ApiToken::new(TOKEN).unwrap())
    })
}

async fn create(server: &Harness, session: &str, number: u64, optimizer: Value) -> String {
    let body = json!({"session_id": session, "model_seq_id": number,
        "base_model": fixtures("numerics/qwen3"), "lora_config": {"rank": 4, "seed": 3},
        "optimizer_config": optimizer});
    let id = server.submit("/create_model", body).await;
    server.result(&id).await.json()["model_id"]
        .as_str()
        .unwrap()
        .to_owned()
}

fn adamw() -> Value {
    json!({"type": "adamw"})
}

fn dimuon() -> Value {
    json!({"type": "dimuon", "version": 1})
}

const TOKENS: [u32; 6] = [3, 1, 4, 1, 5, 9];

/// A pass over one datum with the inputs of all policy losses that `loss` takes.
fn pass(run: &str, seq: u64, loss: LossFn, others: &[(&str, &[f32])]) -> ForwardBackwardRequest {
    let targets = TOKENS.iter().map(|t| i64::from(*t) + 7).collect();
    let mut inputs = vec![
        ("target_tokens", TensorData::ints(targets)),
        (
            "logprobs",
            TensorData::floats(vec![-5.0, -6.5, -5.5, -6.0, -7.0, -4.0]),
        ),
        (
            "advantages",
            TensorData::floats(vec![1.0, -0.5, 0.25, 0.0, 2.0, -1.0]),
        ),
    ];
    inputs.extend(
        others
            .iter()
            .map(|(name, values)| (*name, TensorData::floats(values.to_vec()))),
    );
    let mut request = fb(run, seq, vec![raw_datum(&TOKENS, inputs)]);
    request.loss_fn = loss;
    request
}

async fn submit(server: &Harness, request: &ForwardBackwardRequest) -> String {
    let answer = server.post_proto(request).await;
    answer.json()["request_id"].as_str().unwrap().to_owned()
}

async fn stats(server: &Harness, run: &str, seq: u64) -> Value {
    let body = json!({"model_id": run, "seq_id": seq});
    let id = server.submit("/extensions/gradient_stats", body).await;
    server.result(&id).await.json()
}

async fn norm(server: &Harness, run: &str, seq: u64) -> f64 {
    stats(server, run, seq).await["total"]["l2"]
        .as_f64()
        .unwrap()
}

/// A request to create the reference's loss of this name.
pub(crate) fn upload(session: &str, number: u64, name: &str) -> Value {
    let text = std::fs::read_to_string(fixtures("losses/graphs.json")).unwrap();
    let reference: Value = serde_json::from_str(&text).unwrap();
    let losses = reference["losses"].as_array().unwrap();
    let found = losses.iter().find(|loss| loss["name"] == name).unwrap();
    json!({"session_id": session, "custom_loss_seq_id": number, "name": name,
           "inputs": found["inputs"], "graph": found["graph"], "type": "create_custom_loss"})
}

async fn create_loss(server: &Harness, session: &str, number: u64, name: &str) -> String {
    let id = server
        .submit("/create_custom_loss", upload(session, number, name))
        .await;
    let created = server.result(&id).await.json();
    created["loss_id"].as_str().unwrap().to_owned()
}

/// The pass of an uploaded PPO, whose inputs are named `q` and `a`.
fn custom(run: &str, seq: u64, loss_id: &str) -> ForwardBackwardRequest {
    let (q, a) = (
        [-5.0, -6.5, -5.5, -6.0, -7.0, -4.0],
        [1.0, -0.5, 0.25, 0.0, 2.0, -1.0],
    );
    let mut request = pass(run, seq, LossFn::Custom, &[("q", &q), ("a", &a)]);
    let id = LossConfigValue::Text(loss_id.to_owned());
    request.loss_fn_config.insert("loss_id".to_owned(), id);
    request
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-4 * (1.0 + b.abs())
}

#[tokio::test]
async fn an_uploaded_loss_has_the_gradient_of_the_built_in_one_also_after_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let built_in = create(&server, &session, 0, adamw()).await;
    let uploaded = create(&server, &session, 1, adamw()).await;
    let loss = create_loss(&server, &session, 0, "ppo").await;
    assert_eq!(create_loss(&server, &session, 0, "ppo").await, loss);

    let a = submit(&server, &pass(&built_in, 1, LossFn::Ppo, &[])).await;
    let b = submit(&server, &custom(&uploaded, 1, &loss)).await;

    let (a, b) = (server.output(&a).await, server.output(&b).await);
    assert!(
        close(a.metrics["loss:sum"], b.metrics["loss:sum"]),
        "{a:?} {b:?}"
    );
    assert!(
        b.metrics.contains_key("custom/clipped:mean"),
        "{:?}",
        b.metrics
    );
    let logprobs = |output: &tinker_types::ForwardBackwardOutput| {
        output.loss_fn_outputs[0]["logprobs"]
            .as_floats()
            .unwrap()
            .to_vec()
    };
    // A matrix unit adds up in another order where the head's gradient follows at once.
    for (a, b) in logprobs(&a).iter().zip(logprobs(&b)) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    assert_eq!(a.loss_fn_outputs[0]["elementwise_loss"].shape(), [6]);
    assert!(!b.loss_fn_outputs[0].contains_key("elementwise_loss"));
    let wanted = norm(&server, &built_in, 2).await;
    let actual = norm(&server, &uploaded, 2).await;
    assert!(wanted > 0.0 && close(actual, wanted), "{actual} {wanted}");
    // The pass is repeated from the log, for which the loss is needed again.
    drop(server);
    let server = open(home.path());
    assert_eq!(norm(&server, &uploaded, 3).await, actual);
}

#[tokio::test]
async fn what_is_wrong_with_an_uploaded_loss_is_named_and_changes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let run = create(&server, &session, 0, adamw()).await;
    let mut evil = upload(&session, 0, "ppo");
    evil["graph"]["nodes"][3]["target"] = json!("os.system");
    let id = server.submit("/create_custom_loss", evil).await;
    let refused = server.failure(&id).await;
    assert!(
        refused.contains("(os.system): this function is not among"),
        "{refused}"
    );
    let loss = create_loss(&server, &session, 0, "ppo").await;
    let other = server
        .post("/create_custom_loss", upload(&session, 0, "cispo"))
        .await;
    assert_eq!(other.status, 422, "{}", other.detail());
    let nobody = server
        .post("/create_custom_loss", upload("nobody", 0, "ppo"))
        .await;
    assert_eq!(nobody.status, 404);

    let mut unknown = custom(&run, 1, "elsewhere:loss:0");
    let id = submit(&server, &unknown).await;
    let text = server.failure(&id).await;
    assert!(
        text.contains("custom loss \"elsewhere:loss:0\" is unknown to session"),
        "{text}"
    );
    unknown.loss_fn_config.clear();
    unknown.seq_id = 2;
    let id = submit(&server, &unknown).await;
    assert!(server.failure(&id).await.contains("needs the text loss_id"));
    let mut missing = pass(&run, 3, LossFn::Custom, &[("q", &[0.0; 6])]);
    missing.loss_fn_config = custom(&run, 3, &loss).loss_fn_config;
    let id = submit(&server, &missing).await;
    assert_eq!(
        server.failure(&id).await,
        "datum 0: loss ppo needs the input \"a\""
    );
    let a = [0.0, 0.0, 0.0, f32::NAN, 0.0, 0.0];
    let mut nan = pass(&run, 4, LossFn::Custom, &[("q", &[0.0; 6]), ("a", &a)]);
    nan.loss_fn_config = missing.loss_fn_config;
    let id = submit(&server, &nan).await;
    assert_eq!(
        server.failure(&id).await,
        "datum 0: a is NaN at position 3: it must be finite"
    );

    assert_eq!(stats(&server, &run, 5).await["tensors"], json!({}));
}

#[tokio::test]
async fn gspo_and_thresholds_of_data_train() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let run = create(&server, &session, 0, adamw()).await;
    let mask: &[f32] = &[0.0, 1.0, 1.0, 1.0, 0.0, 1.0];
    let mut gspo = pass(&run, 1, LossFn::Gspo, &[("sequence_ratio_mask", mask)]);
    let low = LossConfigValue::Number(0.0);
    let high = LossConfigValue::Number(1e6);
    gspo.loss_fn_config = [
        ("clip_low_threshold".to_owned(), low),
        ("clip_high_threshold".to_owned(), high),
    ]
    .into();

    let first = submit(&server, &gspo).await;

    let output = server.output(&first).await;
    assert!(output.metrics["loss:sum"].is_finite());
    let wide = norm(&server, &run, 2).await;
    assert!(wide > 0.0);
    // Bounds that no ratio is between clip what goes their way.
    let zero = server
        .submit(
            "/extensions/zero_grad",
            json!({"model_id": run, "seq_id": 3}),
        )
        .await;
    assert_eq!(server.result(&zero).await.json()["type"], "zero_grad");
    assert_eq!(norm(&server, &run, 4).await, 0.0);
    let all: &[f32] = &[1e-9; 6];
    let clipped = pass(
        &run,
        5,
        LossFn::Ppo,
        &[
            ("clip_low_threshold", &[0.0; 6]),
            ("clip_high_threshold", all),
        ],
    );
    let second = submit(&server, &clipped).await;
    server.output(&second).await;
    let narrow = norm(&server, &run, 6).await;
    let free = submit(&server, &pass(&run, 7, LossFn::ImportanceSampling, &[])).await;
    server.output(&free).await;
    assert!(narrow > 0.0 && norm(&server, &run, 8).await > narrow);
}

async fn dimuon_step(server: &Harness, run: &str, seq: u64) -> Value {
    let body = json!({"model_id": run, "seq_id": seq, "optimizer_params":
        {"type": "dimuon", "learning_rate": 0.01, "grad_clip_norm": 1.0, "beta1": 0.9}});
    let id = server.submit("/optim_step", body).await;
    server.result(&id).await.json()
}

async fn loss_of(server: &Harness, run: &str, seq: u64) -> f64 {
    let id = submit(server, &pass(run, seq, LossFn::ImportanceSampling, &[])).await;
    server.output(&id).await.metrics["loss:sum"]
}

#[tokio::test]
async fn a_run_keeps_its_optimizer_over_restarts_and_checkpoints() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let run = create(&server, &session, 0, dimuon()).await;
    let first = loss_of(&server, &run, 1).await;
    let step = dimuon_step(&server, &run, 2).await;
    assert!(
        step["metrics"]["unclipped_grad_l2:mean"].as_f64().unwrap() > 0.0,
        "{step}"
    );
    let info = server
        .post("/get_info", json!({"model_id": run}))
        .await
        .json();
    assert_eq!(info["optimizer_config"], dimuon());
    let wrong = json!({"model_id": run, "seq_id": 3, "adam_params": {"learning_rate": 0.1}});
    let wrong = server.submit("/optim_step", wrong).await;
    assert_eq!(
        server.failure(&wrong).await,
        "the training run was created with optimizer dimuon, and this is a step of adamw"
    );
    let saved = json!({"model_id": run, "seq_id": 4, "path": "mid"});
    let saved = server.submit("/save_weights", saved).await;
    let path = server.result(&saved).await.json()["path"].clone();

    drop(server);
    let server = open(home.path());
    let info = json!({"tinker_path": path});
    let info = server.post("/weights_info", info).await.json();
    assert_eq!(info["optimizer_config"], dimuon());
    let before = loss_of(&server, &run, 5).await;
    dimuon_step(&server, &run, 6).await;
    let after = loss_of(&server, &run, 7).await;
    let load = json!({"session_id": session, "model_seq_id": 1, "path": path, "optimizer": true});
    let id = server.submit("/load_weights", load).await;
    let resumed = server.result(&id).await.json()["model_id"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(loss_of(&server, &resumed, 1).await, before);
    dimuon_step(&server, &resumed, 2).await;

    assert_eq!(loss_of(&server, &resumed, 3).await, after);
    assert!(before < first && after < before, "{first} {before} {after}");
    let mut other = json!({"session_id": session, "model_seq_id": 2, "path": path,
        "optimizer": true, "optimizer_config": adamw()});
    let refused = server.post("/load_weights", other.clone()).await;
    assert_eq!(refused.status, 400);
    assert!(
        refused
            .detail()
            .contains("was trained with optimizer dimuon, not with adamw")
    );
    other["optimizer"] = json!(false);
    let id = server.submit("/load_weights", other).await;
    let weights = server.result(&id).await.json()["model_id"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(loss_of(&server, &weights, 1).await, before);
    let step = server.optim_step(&weights, 2).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn unknown_optimizers_are_refused_at_creation() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let body = |config| {
        json!({"session_id": session, "model_seq_id": 0,
        "base_model": fixtures("numerics/qwen3"), "optimizer_config": config})
    };

    let lion = server
        .post("/create_model", body(json!({"type": "lion"})))
        .await;
    let newer = server
        .post(
            "/create_model",
            body(json!({"type": "dimuon", "version": 2})),
        )
        .await;

    assert_eq!((lion.status, newer.status), (400, 400));
    assert_eq!(
        lion.detail(),
        "optimizer \"lion\" is not supported by this server: it has adamw and dimuon"
    );
    assert!(newer.detail().contains("version 2 of optimizer dimuon"));
}

#[tokio::test]
async fn extensions_are_announced() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());

    let capabilities = server.get("/get_server_capabilities").await.json();

    assert_eq!(
        capabilities["extensions"],
        json!(["zero_grad", "gradient_stats"])
    );
}
