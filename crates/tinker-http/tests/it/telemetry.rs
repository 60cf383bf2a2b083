//! Reports of failures, for programs that agreed to them.

use serde_json::{Map, Value, json};
use tinker_http::{Client, RetryPolicy};
use tinker_types::{AdamParams, OptimStepRequest, OptimStepTag, RequestId, Severity};
use wiremock::MockServer;

use crate::support::*;

const TELEMETRY: &str = "/api/v1/telemetry";
const OPTIM_STEP: &str = "/api/v1/optim_step";

async fn accepting() -> MockServer {
    let server = server().await;
    script(
        &server,
        "POST",
        TELEMETRY,
        [ok(json!({"status": "accepted"}))],
    )
    .await;
    server
}

async fn reporting(server: &MockServer) -> Client {
    let client = builder(&server.uri())
        .header("cf-access-client-secret", "gateway-secret")
        .telemetry(true)
        .build()
        .unwrap();
    // Reports follow a connection; they do not make one.
    client.config().await.unwrap();
    client
}

/// The bodies of all reports.
async fn reports(server: &MockServer) -> Vec<Value> {
    let sent = requests(server, TELEMETRY).await;
    sent.iter()
        .map(|r| serde_json::from_slice(&r.body).unwrap())
        .collect()
}

async fn events(server: &MockServer) -> Vec<Value> {
    let reports = reports(server).await.into_iter();
    let events = reports.flat_map(|report| report["events"].as_array().unwrap().clone());
    events.collect()
}

async fn fail(client: &Client) {
    let step = OptimStepRequest {
        model_id: "S1:train:0".parse().unwrap(),
        seq_id: 1,
        adam_params: Some(AdamParams::default()),
        optimizer_params: None,
        tag: OptimStepTag,
    };
    client.optim_step(&step).await.unwrap_err();
}

#[tokio::test]
async fn nothing_is_reported_unless_the_program_agrees() {
    let server = accepting().await;
    script(&server, "POST", OPTIM_STEP, [status(422)]).await;
    let client = client(&server);

    client.note_session("S1");
    fail(&client).await;
    client.drain_reports().await;

    assert_eq!(reports(&server).await, Vec::<Value>::new());
}

#[tokio::test]
async fn a_report_has_the_official_form() {
    let server = accepting().await;
    script(
        &server,
        "POST",
        OPTIM_STEP,
        [answer(422, json!({"detail": "no such run"}))],
    )
    .await;
    let client = reporting(&server).await;

    client.note_session("S1");
    fail(&client).await;
    client.drain_reports().await;

    let report = reports(&server).await.remove(0);
    assert_eq!(report["session_id"], "S1");
    assert_eq!(report["sdk_version"], tinker_http::PROTOCOL_VERSION);
    assert_eq!(report["process_uuid"].as_str().unwrap().len(), 36);
    assert!(report["platform"].is_string());
    let events = events(&server).await;
    let kinds: Vec<_> = events.iter().map(|event| event["event"].clone()).collect();
    assert_eq!(kinds, ["SESSION_START", "GENERIC_EVENT"]);
    let failed = &events[1];
    assert_eq!(failed["event_session_index"], 1);
    assert_eq!(failed["severity"], "ERROR");
    assert_eq!(failed["event_id"].as_str().unwrap().len(), 36);
    assert!(failed["timestamp"].as_str().unwrap().ends_with('Z'));
    let name = "InternalClientHolder.execute_with_retries.exception";
    assert_eq!(failed["event_name"], name);
    let data = &failed["event_data"];
    assert_eq!(data["status_code"], 422);
    assert_eq!(data["exception"], "InvalidRequest");
    assert!(data["message"].as_str().unwrap().starts_with("no such run"));
}

#[tokio::test]
async fn failed_operations_are_reported_by_the_official_names() {
    let server = accepting().await;
    let refusal = answer(404, json!({"detail": "gone"}));
    let failure = json!({"error": "NaN", "category": "user"});
    script(
        &server,
        "POST",
        "/api/v1/retrieve_future",
        [refusal, ok(failure)],
    )
    .await;
    let client = reporting(&server).await;
    let id: RequestId = "r1".parse().unwrap();

    client.retrieve_optim_step(&id, None).await.unwrap_err();
    client.retrieve_optim_step(&id, None).await.unwrap();
    client.drain_reports().await;

    let events = events(&server).await;
    let said: Vec<_> = events
        .iter()
        .map(|event| (event["event_name"].as_str().unwrap(), &event["event_data"]))
        .collect();
    assert_eq!(said[0].0, "APIFuture.result_async.api_status_error");
    assert_eq!(said[1].0, "APIFuture.result_async.application_error");
    assert_eq!(said[1].1["message"], "NaN");
    assert_eq!(said[1].1["error_category"], "user");
    assert_eq!(
        (&said[0].1["request_id"], &said[0].1["request_type"]),
        (&json!("r1"), &json!("OptimStep"))
    );
}

#[tokio::test]
async fn no_secret_is_reported() {
    let server = accepting().await;
    let detail = "tml-secret gateway-secret tml-somebody-elses https://s/a?sig=signed-secret";
    script(
        &server,
        "POST",
        OPTIM_STEP,
        [answer(403, json!({"detail": detail}))],
    )
    .await;
    let client = reporting(&server).await;

    fail(&client).await;
    let data: Map<_, _> = [("headers".to_owned(), json!({"x-api-key": "tml-secret"}))]
        .into_iter()
        .collect();
    client.report(Severity::Warning, "own", data);
    client.drain_reports().await;

    let text = serde_json::to_string(&reports(&server).await).unwrap();
    assert!(text.contains("PermissionDenied"), "{text}");
    for secret in ["tml-", "gateway-secret", "signed-secret"] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
}

#[tokio::test]
async fn a_fatal_failure_ends_the_session_in_the_reports() {
    let server = accepting().await;
    let client = reporting(&server).await;

    client.note_session("S1");
    client.report_fatal("RequestFailed", "out of luck", false);
    client.drain_reports().await;

    let events = events(&server).await;
    assert_eq!(events[1]["event"], "UNHANDLED_EXCEPTION");
    assert_eq!(events[1]["error_type"], "RequestFailed");
    assert_eq!(events[1]["error_message"], "out of luck");
    assert_eq!(events[2]["event"], "SESSION_END");
    let duration = events[2]["duration"].as_str().unwrap();
    assert!(duration.starts_with("0:00:0"), "{duration}");
}

#[tokio::test]
async fn a_users_mistake_without_a_session_is_reported_as_that_alone() {
    let server = accepting().await;
    let client = reporting(&server).await;

    client.report_fatal("InvalidRequest", "no data", true);
    client.drain_reports().await;

    let events = events(&server).await;
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["event_name"], "user_error");
    assert_eq!(events[0]["event_data"]["error_type"], "InvalidRequest");
    let session = reports(&server).await[0]["session_id"].clone();
    assert!(session.as_str().unwrap().starts_with("sessionless-"));
}

#[tokio::test]
async fn refused_reports_are_dropped_and_not_reported() {
    let server = server().await;
    script(&server, "POST", TELEMETRY, [status(500)]).await;
    let client = reporting(&server).await;

    client.note_session("S1");
    client.drain_reports().await;
    client.drain_reports().await;

    assert_eq!(events(&server).await.len(), 1);
}

#[tokio::test]
async fn many_events_go_in_reports_of_a_hundred() {
    let server = accepting().await;
    let client = reporting(&server).await;

    for n in 0..250 {
        client.report(
            Severity::Info,
            "n",
            [("n".to_owned(), json!(n))].into_iter().collect(),
        );
    }
    client.drain_reports().await;

    let sizes: Vec<_> = reports(&server)
        .await
        .iter()
        .map(|report| report["events"].as_array().unwrap().len())
        .collect();
    assert_eq!(sizes.iter().sum::<usize>(), 250);
    assert!(sizes.iter().all(|&size| size <= 100), "{sizes:?}");
}

#[tokio::test]
async fn failures_that_are_repeated_away_are_not_reported() {
    let server = accepting().await;
    let taken = ok(json!({"request_id": "r1"}));
    script(&server, "POST", OPTIM_STEP, [status(503), taken]).await;
    let client = builder(&server.uri())
        .telemetry(true)
        .retry_policy(RetryPolicy {
            backoff: quick(),
            ..RetryPolicy::default()
        })
        .build()
        .unwrap();
    let step = OptimStepRequest {
        model_id: "S1:train:0".parse().unwrap(),
        seq_id: 1,
        adam_params: Some(AdamParams::default()),
        optimizer_params: None,
        tag: OptimStepTag,
    };

    client.optim_step(&step).await.unwrap();
    client.drain_reports().await;

    assert_eq!(reports(&server).await, Vec::<Value>::new());
}
