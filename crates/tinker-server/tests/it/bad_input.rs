//! Requests that cannot be served: each gets a status that is not retried and a text that helps.

use axum::body::Body;
use axum::http::{Method, Request};
use serde_json::json;

use crate::harness::{Harness, TOKEN, create_body, optim};

#[tokio::test]
async fn unknown_paths_and_methods_are_explained_in_json() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());

    let unknown = server.get("/nothing/here").await;
    assert_eq!(unknown.status, 404);
    assert_eq!(
        unknown.detail(),
        "GET /api/v1/nothing/here is not part of this server"
    );
    let method = server.get("/create_model").await;
    assert_eq!(method.status, 405);
    assert_eq!(method.detail(), "/api/v1/create_model does not take GET");
}

#[tokio::test]
async fn everything_but_healthz_needs_the_token() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let bare = |path: &str, key: &str| {
        Request::builder()
            .uri(path)
            .header("host", "localhost:1")
            .header("x-api-key", key)
            .body(Body::empty())
            .unwrap()
    };

    assert_eq!(server.send(bare("/api/v1/healthz", "")).await.status, 200);
    for path in [
        "/api/v1/training_runs",
        "/api/v1/get_server_capabilities",
        "/",
        "/api/v1/x",
    ] {
        let answer = server.send(bare(path, "tml-other")).await;
        assert_eq!(answer.status, 401, "{path}");
        assert!(
            answer.detail().contains("TINKER_API_KEY"),
            "{}",
            answer.detail()
        );
    }
    assert_eq!(
        server
            .send(bare("/api/v1/training_runs", TOKEN))
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn web_pages_and_rebound_names_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let page = Harness::request(Method::GET, "/training_runs")
        .header("origin", "http://evil.example")
        .body(Body::empty());
    let rebound = Request::builder()
        .uri("/api/v1/healthz")
        .header("host", "evil.example:80")
        .body(Body::empty());

    assert_eq!(server.send(page.unwrap()).await.status, 403);
    assert_eq!(server.send(rebound.unwrap()).await.status, 403);
}

#[tokio::test]
async fn malformed_bodies_say_what_is_wrong() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let send = |path: &'static str, body: &'static str| {
        server.post_bytes(path, "application/json", body.into())
    };

    let cut = send("/optim_step", "{\"model_id\":").await;
    assert_eq!(cut.status, 400);
    assert!(
        cut.detail().starts_with("request body: EOF"),
        "{}",
        cut.detail()
    );
    let missing = send("/optim_step", "{}").await;
    assert_eq!(missing.status, 422);
    assert!(
        missing.detail().contains("missing field `model_id`"),
        "{}",
        missing.detail()
    );
    let proto = server
        .post_bytes("/forward_backward", "application/x-protobuf", vec![0xff; 9])
        .await;
    assert_eq!(proto.status, 400);
    assert!(
        proto.detail().contains("not a ForwardBackwardRequest"),
        "{}",
        proto.detail()
    );
    let zstd = Harness::request(Method::POST, "/forward_backward")
        .header("content-encoding", "zstd")
        .body(Body::from("no zstd"));
    assert_eq!(server.send(zstd.unwrap()).await.status, 400);
}

#[tokio::test]
async fn a_large_body_is_read_and_refused_as_a_small_one() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let padded = |body: &str| format!("{}{body}", " ".repeat(100_000)).into_bytes();
    let send = |body: String| server.post_bytes("/optim_step", "application/json", padded(&body));

    assert_eq!(send("{".into()).await.status, 400);
    assert_eq!(send("{}".into()).await.status, 422);
    assert_eq!(send(optim(&run, 1).to_string()).await.status, 200);
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused_even_if_compressed() {
    let home = tempfile::tempdir().unwrap();
    let mut options = crate::harness::options(home.path());
    options.limits.max_body_bytes = 1 << 20;
    let server = Harness::with(options);
    let large = vec![0; 2 << 20];

    let plain = server
        .post_bytes("/forward_backward", "application/x-protobuf", large.clone())
        .await;
    assert_eq!(plain.status, 413);
    assert!(
        plain.detail().contains("larger than 1 MB"),
        "{}",
        plain.detail()
    );
    let bomb = zstd::encode_all(&large[..], 1).unwrap();
    assert!(bomb.len() < 10_000);
    let request = Harness::request(Method::POST, "/forward_backward")
        .header("content-encoding", "zstd")
        .body(Body::from(bomb));
    assert_eq!(server.send(request.unwrap()).await.status, 413);
}

#[tokio::test]
async fn routes_that_need_little_take_little() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let spaces = vec![b' '; 3 << 20];
    let bomb = zstd::encode_all(&spaces[..], 1).unwrap();

    for path in [
        "/telemetry",
        "/create_session",
        "/retrieve_future",
        "/optim_step",
    ] {
        let plain = server.post_bytes(path, "application/json", spaces.clone());
        assert_eq!(plain.await.status, 413, "{path}");
        let compressed = Harness::request(Method::POST, path)
            .header("content-encoding", "zstd")
            .body(Body::from(bomb.clone()));
        assert_eq!(server.send(compressed.unwrap()).await.status, 413, "{path}");
    }
    // These are read, and are no JSON.
    for path in ["/asample", "/create_custom_loss"] {
        let plain = server.post_bytes(path, "application/json", spaces.clone());
        assert_eq!(plain.await.status, 400, "{path}");
    }
}

#[tokio::test]
async fn a_frame_that_asks_for_a_large_window_is_refused_before_it_is_read() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let compressed = |window_log| {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(window_log).unwrap();
        std::io::Write::write_all(&mut encoder, b"{}").unwrap();
        encoder.finish().unwrap()
    };
    let send = |window_log| {
        let request = Harness::request(Method::POST, "/client/config")
            .header("content-encoding", "zstd")
            .body(Body::from(compressed(window_log)));
        server.send(request.unwrap())
    };

    assert_eq!(send(23).await.status, 200);
    let refused = send(27).await;
    assert_eq!(refused.status, 400);
    assert!(refused.detail().contains("zstd"), "{}", refused.detail());
}

#[tokio::test]
async fn unknown_things_are_named() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;

    let mut body = create_body(&session, 0);
    body["base_model"] = json!("meta-llama/Llama-3.2-1B");
    let model = server.post("/create_model", body).await;
    assert_eq!(model.status, 404);
    let text = model.detail();
    assert!(
        text.contains("\"meta-llama/Llama-3.2-1B\" is unknown: there is tinker/nano"),
        "{text}"
    );

    let run = server.post("/optim_step", optim("nobody:train:0", 1)).await;
    assert_eq!(run.status, 404);
    assert!(
        run.detail()
            .contains("training run nobody:train:0 is unknown")
    );
    let session = server.post("/create_model", create_body("nobody", 0)).await;
    assert_eq!(
        (session.status, session.detail().as_str()),
        (404, "session nobody is unknown to this server")
    );
    let future = server.poll("nothing:op:1").await;
    assert_eq!(future.status, 404);
    let beat = server
        .post("/session_heartbeat", json!({"session_id": "nobody"}))
        .await;
    assert_eq!(beat.status, 404);
}

#[tokio::test]
async fn an_adapter_that_cannot_be_made_says_why_again_and_again() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let mut body = create_body(&session, 0);
    body["lora_config"]["rank"] = json!(64);
    let id = server.submit("/create_model", body.clone()).await;
    let failure = server.failure(&id).await;
    assert_eq!(failure, "rank 64 is above the hidden size 8");

    let step = server
        .submit("/optim_step", optim(&format!("{session}:train:0"), 1))
        .await;
    assert!(server.failure(&step).await.contains("rank 64 is above"));
    assert_eq!(server.submit("/create_model", body).await, id);
    let listed = server.get("/training_runs").await.json();
    assert_eq!(listed["training_runs"][0]["corrupted"], true);

    let nothing = json!({"session_id": session, "model_seq_id": 1, "base_model": "tinker/nano",
        "lora_config": {"rank": 2, "train_mlp": false, "train_attn": false, "train_unembed": false}});
    let refused = server.post("/create_model", nothing).await;
    assert_eq!(refused.status, 400);
    assert!(refused.detail().contains("trains nothing"));
}

#[tokio::test]
async fn operations_without_a_number_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;

    let answer = server.post("/optim_step", optim(&run, 0)).await;

    assert_eq!(answer.status, 400);
    assert!(
        answer.detail().contains("numbered from 1"),
        "{}",
        answer.detail()
    );
}

#[tokio::test]
async fn a_full_queue_pushes_back() {
    let home = tempfile::tempdir().unwrap();
    let mut options = crate::harness::options(home.path());
    options.limits.max_pending_operations = 2;
    let server = Harness::with(options);
    let run = server.run(&server.session().await, 0).await;
    let second = server.optim_step(&run, 2).await;
    let third = server.optim_step(&run, 3).await;

    let refused = server.post("/optim_step", optim(&run, 7)).await;

    assert_eq!(refused.status, 429);
    assert!(
        refused.detail().contains("2 unfinished operations"),
        "{}",
        refused.detail()
    );
    assert_eq!(
        server.post("/optim_step", optim(&run, 3)).await.status,
        200,
        "known ones stay known"
    );
    let first = server.optim_step(&run, 1).await;
    for (id, step) in [(first, 1.0), (second, 2.0), (third, 3.0)] {
        assert_eq!(server.result(&id).await.json()["metrics"]["step"], step);
    }
}

#[tokio::test]
async fn exactly_one_set_of_hyper_parameters_is_taken() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;

    let none = server
        .submit("/optim_step", json!({"model_id": run, "seq_id": 1}))
        .await;
    assert!(server.failure(&none).await.contains("exactly one of"));
    let dimuon = json!({"model_id": run, "seq_id": 2, "optimizer_params": {"type": "dimuon", "learning_rate": 0.1}});
    let dimuon = server.submit("/optim_step", dimuon).await;
    assert_eq!(
        server.failure(&dimuon).await,
        "the training run was created with optimizer adamw, and this is a step of dimuon"
    );
    let good = server.optim_step(&run, 3).await;
    assert_eq!(server.result(&good).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn a_malformed_request_uses_its_number_up_and_nothing_waits_for_it() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let rate = json!({"model_id": run, "seq_id": 1, "adam_params": {"learning_rate": null}});
    let path = json!({"model_id": run, "seq_id": 2, "path": "no/path", "optimizer": true});
    let ttl = json!({"model_id": run, "seq_id": 3, "ttl_seconds": "soon"});

    let rate = server.submit("/optim_step", rate).await;
    let path = server.submit("/load_weights", path).await;
    let ttl = server.submit("/save_weights", ttl).await;

    assert!(server.failure(&rate).await.contains("invalid type: null"));
    assert!(
        server
            .failure(&path)
            .await
            .contains("must start with tinker://")
    );
    assert!(server.failure(&ttl).await.contains("invalid type: string"));
    let good = server.optim_step(&run, 4).await;
    assert_eq!(server.result(&good).await.json()["metrics"]["step"], 1.0);
    let neither = server
        .post(
            "/load_weights",
            json!({"path": "tinker://a/weights/b", "optimizer": true}),
        )
        .await;
    assert_eq!(neither.status, 422);
    assert!(
        neither.detail().contains("load_weights takes session_id"),
        "{}",
        neither.detail()
    );
}

/// Bodies that no route can do anything with, but for those that need none.
const WRONG: [&str; 6] = [
    "",
    "{",
    "[]",
    "{\"model_id\":7,\"session_id\":{},\"request_id\":[],\"path\":1}",
    "{\"model_id\":\"\",\"session_id\":\"\",\"request_id\":\"\",\"sampling_session_id\":\"\",\"seq_id\":-1}",
    "{\"model_id\":\"nobody:train:0\",\"session_id\":\"nobody\",\"request_id\":\"nobody:op:1\",\"seq_id\":1}",
];

const ROUTES: [&str; 31] = [
    "/api/v1/create_session",
    "/api/v1/session_heartbeat",
    "/api/v1/sessions/nobody/finish",
    "/api/v1/sessions/search",
    "/api/v1/checkpoints/search",
    "/api/v1/retrieve_future",
    "/api/v1/retrieve_futures",
    "/api/v1/cancel_future",
    "/api/v1/get_info",
    "/api/v1/weights_info",
    "/api/v1/create_model",
    "/api/v1/unload_model",
    "/api/v1/forward_backward",
    "/api/v1/forward",
    "/api/v1/optim_step",
    "/api/v1/extensions/zero_grad",
    "/api/v1/extensions/gradient_stats",
    "/api/v1/save_weights",
    "/api/v1/save_weights_for_sampler",
    "/api/v1/save_weights_external",
    "/api/v1/load_weights",
    "/api/v1/copy_weights",
    "/api/v1/external_weights_upload_start",
    "/api/v1/external_weights_upload_finish",
    "/api/v1/create_custom_loss",
    "/api/v1/create_sampling_session",
    "/api/v1/join_sampling_session",
    "/api/v1/asample",
    "/oai/api/v1/completions",
    "/oai/api/v1/chat/completions",
    "/anthropic/api/v1/messages",
];

#[tokio::test]
async fn what_is_wrong_for_good_is_never_answered_as_if_it_could_pass() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());

    for route in ROUTES {
        for body in WRONG {
            for content_type in ["application/json", "application/x-protobuf"] {
                let request = Request::post(route)
                    .header("host", "127.0.0.1")
                    .header("x-api-key", TOKEN)
                    .header("content-type", content_type)
                    .body(Body::from(body));
                let answer = server.send(request.unwrap()).await;

                let of = format!("{route} {content_type} {body:?}: {}", answer.status);
                // Clients repeat 408, 409, 429 and 5xx for minutes, and an empty 400 as a proxy's.
                let is_final = matches!(answer.status, 200 | 204 | 400 | 404 | 405 | 415 | 422);
                assert!(is_final, "{of} {}", String::from_utf8_lossy(&answer.body));
                assert!(answer.status < 400 || answer.json().is_object(), "{of}");
                let is_known =
                    answer.status != 404 || !answer.json().to_string().contains("is not part of");
                assert!(is_known, "{of}: no such route");
            }
        }
    }
    // Nothing of it left anything behind.
    assert_eq!(
        server.get("/training_runs").await.json()["training_runs"],
        json!([])
    );
}
