//! Telemetry of a session, where the program agreed to it.

use serde_json::{Value, json};
use tinker_api::{AdamParams, FinishReason, LoraConfig};
use wiremock::MockServer;

use crate::support::*;

async fn reports(server: &MockServer) -> Vec<Value> {
    let sent = server.received_requests().await.unwrap().into_iter();
    sent.filter(|request| request.url.path() == "/api/v1/telemetry")
        .map(|request| serde_json::from_slice(&request.body).unwrap())
        .collect()
}

/// A session in which one step fails; the paths asked for at its end.
async fn run(server: &MockServer, agreed: bool) -> Vec<String> {
    answer_with(server, "telemetry", None, |_: &_| {
        ok(json!({"status": "accepted"}))
    })
    .await;
    answer_with(server, "optim_step", None, |_: &_| refusal(422)).await;
    let service = builder(server).telemetry(agreed).build().unwrap();
    let trainer = service
        .create_lora_training_client("tinker/nano", LoraConfig::default())
        .await
        .unwrap();
    trainer.optim_step(AdamParams::default()).await.unwrap_err();
    service.close(FinishReason::Errored, None).await.ok();
    let asked = server.received_requests().await.unwrap().into_iter();
    asked.map(|request| request.url.path().to_owned()).collect()
}

#[tokio::test]
async fn a_session_reports_its_start_and_its_failures_before_it_ends() {
    let server = server().await;

    let asked = run(&server, true).await;

    let reports = reports(&server).await;
    assert!(reports.iter().all(|report| report["session_id"] == "S1"));
    let events = reports
        .iter()
        .flat_map(|report| report["events"].as_array().unwrap());
    let events: Vec<_> = events.collect();
    assert_eq!(events[0]["event"], "SESSION_START");
    assert_eq!(events[1]["event_data"]["status_code"], 422);
    assert_eq!(events[2]["event_name"], "user_error");
    assert_eq!(events[2]["event_data"]["error_type"], "Transport");
    assert_eq!(events[3]["event"], "SESSION_END");
    let last = asked.iter().rposition(|path| path.ends_with("/telemetry"));
    let end = asked.iter().position(|path| path.ends_with("/finish"));
    assert!(last < end, "{asked:?}");
}

#[tokio::test]
async fn a_run_that_cannot_be_created_is_reported() {
    let server = server().await;
    answer_with(&server, "telemetry", None, |_: &_| {
        ok(json!({"status": "accepted"}))
    })
    .await;
    let failed = json!({"error": "out of memory", "category": "server"});
    answer_with(&server, "retrieve_future", None, ok(failed)).await;
    answer_with(&server, "sessions/S1/finish", None, ok(json!({}))).await;
    let service = builder(&server).telemetry(true).build().unwrap();

    let created = service.create_lora_training_client("tinker/nano", LoraConfig::default());
    created.await.unwrap_err();
    service.close(FinishReason::Errored, None).await.unwrap();

    let reports = reports(&server).await;
    let events = reports
        .iter()
        .flat_map(|report| report["events"].as_array().unwrap());
    let fatal: Vec<_> = events
        .filter(|event| event["event"] == "UNHANDLED_EXCEPTION")
        .collect();
    assert_eq!(fatal.len(), 1);
    assert_eq!(fatal[0]["error_type"], "RequestFailed");
}

#[tokio::test]
async fn a_session_reports_nothing_by_itself() {
    let server = server().await;

    run(&server, false).await;

    assert_eq!(reports(&server).await, Vec::<Value>::new());
}
