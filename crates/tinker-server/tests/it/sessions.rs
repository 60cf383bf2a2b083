//! Sessions and what clients ask for at the start.

use axum::body::Body;
use axum::http::Method;
use serde_json::json;

use crate::harness::Harness;

#[tokio::test]
async fn a_client_can_start_up() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let version = || json!({"sdk_version": "0.38.0"});

    assert_eq!(server.get("/healthz").await.json(), json!({"status": "ok"}));
    assert_eq!(
        server.post("/client/config", version()).await.json()["pjwt_auth_enabled"],
        false
    );
    let dynamic = server
        .post("/client/dynamic_config", version())
        .await
        .json();
    assert_eq!(dynamic["sample_cancel_enabled"], true);
    let models = server.get("/get_server_capabilities").await.json();
    assert_eq!(models["supported_models"][0]["model_name"], "tinker/nano");
    let telemetry = server.post("/telemetry", json!({"events": []})).await;
    assert_eq!(telemetry.json(), json!({"status": "accepted"}));
}

#[tokio::test]
async fn a_session_lives_and_ends_and_is_remembered() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;

    let beat = server
        .post("/session_heartbeat", json!({"session_id": session}))
        .await;
    assert_eq!(beat.json()["type"], "session_heartbeat");
    let finish = json!({"reason": {"type": "success"}, "detail": null});
    let path = format!("/sessions/{session}/finish");
    assert_eq!(server.post(&path, finish.clone()).await.status, 204);
    assert_eq!(server.post(&path, finish).await.status, 204);
    drop(server);

    let again = Harness::open(home.path());
    assert_eq!(
        again.get("/sessions").await.json(),
        json!({"sessions": [session]})
    );
    let info = again.get(&format!("/sessions/{session}")).await.json();
    assert_eq!(info["training_run_ids"], json!([run]));
}

#[tokio::test]
async fn a_repeated_creation_gives_the_same_session() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let create = |key: &'static str| {
        let body = json!({"tags": [], "user_metadata": {}, "sdk_version": "t"});
        Harness::request(Method::POST, "/create_session")
            .header("x-idempotency-key", key)
            .body(Body::from(body.to_string()))
            .unwrap()
    };

    let first = server.send(create("a")).await;
    let again = server.send(create("a")).await;
    let other = server.send(create("b")).await;

    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[tokio::test]
async fn info_names_a_tokenizer_that_can_be_loaded() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;

    let info = server
        .post("/get_info", json!({"model_id": run}))
        .await
        .json();

    assert_eq!(info["model_data"]["model_name"], "tinker/nano");
    let dir = info["model_data"]["tokenizer_id"].as_str().unwrap();
    assert!(std::path::Path::new(dir).join("tokenizer.json").is_file());
    assert_eq!(info["lora_rank"], 2);
}
