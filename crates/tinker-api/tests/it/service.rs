//! Sessions: laziness, heartbeat, end, and numbers that samplers and runs share.

use std::time::Duration;

use serde_json::json;
use tinker_api::{FinishReason, LoraConfig, SamplerKind, SamplingSource};

use crate::support::*;

#[tokio::test]
async fn nothing_is_sent_before_it_is_needed_and_one_session_serves_all() {
    let server = server().await;
    let service = builder(&server)
        .tags(["b".into(), "a".into(), "b".into()])
        .project("p1".parse().unwrap())
        .build()
        .unwrap();
    assert!(server.received_requests().await.unwrap().is_empty());

    let twin = service.clone();
    let (one, two) = tokio::join!(
        service.create_lora_training_client("tinker/nano", LoraConfig::default()),
        twin.create_lora_training_client("tinker/nano", LoraConfig::default()),
    );

    one.unwrap();
    two.unwrap();
    let sent = requests(&server, "create_session").await;
    assert_eq!(sent.len(), 1);
    let session = body(&sent[0]);
    assert_eq!(session["tags"], json!(["a", "b"]));
    assert_eq!(session["project_id"], "p1");
    let mut numbers: Vec<u64> = requests(&server, "create_model")
        .await
        .iter()
        .map(|request| body(request)["model_seq_id"].as_u64().unwrap())
        .collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [0, 1]);
}

#[tokio::test]
async fn samplers_of_the_service_and_of_a_run_share_their_numbers() {
    let server = server().await;
    let service = service(&server);
    let trainer = service
        .create_lora_training_client("tinker/nano", LoraConfig::default())
        .await
        .unwrap();

    service
        .create_sampling_client(SamplingSource::BaseModel("tinker/nano".into()))
        .await
        .unwrap();
    trainer
        .save_weights_and_get_sampling_client(SamplerKind::Inflight)
        .await
        .unwrap();

    let created = body(&requests(&server, "create_sampling_session").await[0]);
    let saved = body(&requests(&server, "save_weights_for_sampler").await[0]);
    assert_eq!(created["sampling_session_seq_id"], 0);
    assert_eq!(saved["sampling_session_seq_id"], 1);
    assert_eq!(saved["kind"], "inflight");
}

/// Waits until a route was asked at least `n` times.
async fn asked(server: &wiremock::MockServer, route: &str, n: usize) {
    while requests(server, route).await.len() < n {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_session_is_kept_alive_by_any_client_and_through_failures() {
    let server = server().await;
    answer_with(&server, "session_heartbeat", Some(1), refusal(500)).await;
    answer_with(&server, "session_heartbeat", None, ok(json!({}))).await;
    let service = builder(&server)
        .heartbeat_interval(Duration::from_millis(2))
        .build()
        .unwrap();
    let _trainer = service
        .create_lora_training_client("tinker/nano", LoraConfig::default())
        .await
        .unwrap();

    drop(service);

    let n_before = requests(&server, "session_heartbeat").await.len();
    asked(&server, "session_heartbeat", n_before + 3).await;
}

#[tokio::test]
async fn closing_tells_the_reason_once() {
    let server = server().await;
    answer_with(&server, "sessions/S1/finish", None, ok(json!({}))).await;
    let service = service(&server);
    service.close(FinishReason::Success, None).await.unwrap();
    assert!(server.received_requests().await.unwrap().is_empty());
    service.session_id().await.unwrap();

    let detail = Some("ctrl-c".to_owned());
    service
        .close(FinishReason::Interrupted, detail)
        .await
        .unwrap();
    service.close(FinishReason::Success, None).await.unwrap();

    let sent = requests(&server, "sessions/S1/finish").await;
    assert_eq!(sent.len(), 1);
    let reason = json!({"reason": {"type": "interrupted"}, "detail": "ctrl-c"});
    assert_eq!(body(&sent[0]), reason);
}

#[tokio::test]
async fn an_adapter_that_trains_nothing_is_refused_before_a_session_is_opened() {
    let server = server().await;
    let nothing = LoraConfig {
        train_attn: false,
        train_mlp: false,
        train_unembed: false,
        ..LoraConfig::default()
    };

    let error = service(&server)
        .create_lora_training_client("tinker/nano", nothing)
        .await
        .unwrap_err();

    assert!(error.to_string().starts_with("nothing to train"), "{error}");
    assert!(server.received_requests().await.unwrap().is_empty());
}
