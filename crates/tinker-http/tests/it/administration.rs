//! Audit, billing, projects, search, traces, keys and completions: the calls as the SDK makes them.

use serde_json::{Value, json};
use tinker_http::{Client, ErrorKind};
use tinker_types::{
    AuditEventType, CheckpointSearchRequest, Completion, CompletionsTarget, RetrieveFuturesRequest,
    SessionSearchRequest, SessionStatusQuery, Timestamp, TraceStatus, UsageInfo,
};
use wiremock::MockServer;
use wiremock::matchers::{any, path};
use wiremock::{Mock, Request};

use crate::support::*;

async fn serving(verb: &str, route: &str, body: Value) -> (MockServer, Client) {
    let server = server().await;
    script(&server, verb, route, [ok(body)]).await;
    let client = client(&server);
    (server, client)
}

async fn only(server: &MockServer, route: &str) -> Request {
    let mut requests = requests(server, route).await;
    assert_eq!(requests.len(), 1, "{route}");
    requests.remove(0)
}

fn log() -> Value {
    json!({"entries": [{"timestamp": "2026-11-20T00:00:00Z", "event": "checkpoint_read"}]})
}

#[tokio::test]
async fn an_audit_log_elsewhere_is_fetched_without_key_and_gateway_headers() {
    let store = MockServer::start().await;
    Mock::given(path("/log"))
        .respond_with(ok(log()))
        .mount(&store)
        .await;
    let server = server().await;
    let place = format!("{}/log?sig=s", store.uri());
    let moved = status(302).insert_header("location", place.as_str());
    script(&server, "GET", "/api/v1/audit", [moved]).await;
    let client = builder(&server.uri())
        .header("cf-access-client-secret", "hidden")
        .build()
        .unwrap();

    let log = client
        .get_audit_log(&AuditEventType::Checkpoints, Some("2026-11-20"))
        .await
        .unwrap();

    assert_eq!(log.entries[0].event, "checkpoint_read");
    let asked = only(&server, "/api/v1/audit").await;
    let query = asked.url.query();
    assert_eq!(query, Some("event_type=checkpoints&day=2026-11-20"));
    let fetched = only(&store, "/log").await;
    assert_eq!(fetched.url.query(), Some("sig=s"));
    for secret in ["x-api-key", "authorization", "cf-access-client-secret"] {
        assert_eq!(header(&fetched, secret), None, "{secret}");
    }
}

#[tokio::test]
async fn an_audit_log_that_is_the_answer_is_read_and_the_day_may_be_left_out() {
    let (server, client) = serving("GET", "/api/v1/audit", log()).await;

    let log = client.get_audit_log(&AuditEventType::All, None).await;

    assert_eq!(log.unwrap().entries.len(), 1);
    let asked = only(&server, "/api/v1/audit").await;
    assert_eq!(asked.url.query(), Some("event_type=all"));
}

#[tokio::test]
async fn a_redirect_of_any_other_call_is_not_followed() {
    let store = MockServer::start().await;
    Mock::given(any())
        .respond_with(ok(json!({})))
        .mount(&store)
        .await;
    let server = server().await;
    let moved = status(302).insert_header("location", store.uri().as_str());
    script(
        &server,
        "GET",
        "/api/v1/billing/usage/checkpoints/current",
        [moved],
    )
    .await;

    let error = client(&server)
        .get_checkpoint_storage_usage(None)
        .await
        .unwrap_err();

    assert!(error.to_string().contains("unexpected redirect"), "{error}");
    assert!(store.received_requests().await.unwrap().is_empty());
}

#[tokio::test]
async fn usage_is_asked_for_by_the_hour() {
    let route = "/api/v1/billing/usage/events";
    let event = json!({
        "bucket_start": "2026-11-20T00:00:00Z",
        "bucket_end": "2026-11-20T01:00:00Z",
        "event_info": {"type": "training", "token_count": 10},
        "of_tomorrow": 1,
    });
    let (server, client) = serving("GET", route, json!({"data": [event]})).await;
    let hour = |text: &str| Timestamp(text.into());

    let usage = client
        .get_billing_usage(&hour("2026-11-20T00:00:00Z"), &hour("2026-11-20T04:00:00Z"))
        .await
        .unwrap();

    assert_eq!(
        usage.data[0].event_info,
        UsageInfo::Training { token_count: 10 }
    );
    assert_eq!(
        only(&server, route).await.url.query(),
        Some("starting_on=2026-11-20T00%3A00%3A00Z&ending_before=2026-11-20T04%3A00%3A00Z")
    );
}

#[tokio::test]
async fn storage_is_asked_for_by_project() {
    let route = "/api/v1/billing/usage/checkpoints/current";
    let row = json!({"checkpoint_count": 2, "size_bytes": 10, "size_gigabytes": 1e-8});
    let (server, client) = serving("GET", route, json!({"data": [row]})).await;

    let usage = client
        .get_checkpoint_storage_usage(Some(&"p1".parse().unwrap()))
        .await
        .unwrap();

    assert_eq!(usage.data[0].size_bytes, 10);
    assert_eq!(
        only(&server, route).await.url.query(),
        Some("project_id=p1")
    );
}

#[tokio::test]
async fn a_session_is_moved_to_a_project() {
    let route = "/api/v1/sessions/S1/project";
    let server = server().await;
    script(&server, "PUT", route, [status(200)]).await;
    let (session, project) = ("S1".parse().unwrap(), "p2".parse().unwrap());

    client(&server)
        .assign_session_project(&session, &project)
        .await
        .unwrap();

    let body: Value = only(&server, route).await.body_json().unwrap();
    assert_eq!(body, json!({"project_id": "p2"}));
}

#[tokio::test]
async fn sessions_and_checkpoints_are_searched() {
    let (sessions, checkpoints) = ("/api/v1/sessions/search", "/api/v1/checkpoints/search");
    let (server, client) = serving("POST", sessions, json!({"sessions": []})).await;
    script(
        &server,
        "POST",
        checkpoints,
        [ok(json!({"checkpoints": []}))],
    )
    .await;
    let request = SessionSearchRequest {
        display_name: Some("n".into()),
        statuses: Some(vec![SessionStatusQuery::Active]),
        ..SessionSearchRequest::default()
    };

    client.search_sessions(&request).await.unwrap();
    client
        .search_checkpoints(&CheckpointSearchRequest::default())
        .await
        .unwrap();

    let body: Value = only(&server, sessions).await.body_json().unwrap();
    assert_eq!(
        body,
        json!({
            "user_metadata": {},
            "display_name": "n",
            "owner": {"type": "own"},
            "statuses": [{"type": "active"}],
            "limit": 50,
        })
    );
    let body: Value = only(&server, checkpoints).await.body_json().unwrap();
    assert_eq!(
        body,
        json!({"user_metadata": {}, "owner": {"type": "own"}, "limit": 50})
    );
}

#[tokio::test]
async fn a_trace_is_pending_or_has_an_address() {
    let route = "/api/v1/sessions/S1/trace_export";
    let server = server().await;
    let ready = json!({"status": "ready", "url": "https://store/t?sig=s", "error": null});
    script(
        &server,
        "GET",
        route,
        [ok(json!({"status": "pending"})), ok(ready)],
    )
    .await;
    let client = client(&server);
    let session = "S1".parse().unwrap();

    let first = client.session_trace(&session).await.unwrap();
    let second = client.session_trace(&session).await.unwrap();

    assert_eq!((first.status, first.url), (TraceStatus::Pending, None));
    assert_eq!(second.url.unwrap().expose(), "https://store/t?sig=s");
}

#[tokio::test]
async fn a_key_is_described_and_deleted_as_itself() {
    let route = "/api/v1/auth/apikey/me";
    let server = server_with(json!({"pjwt_auth_enabled": true})).await;
    let details = json!({"org_details": {"name": "Org"}, "user_details": {"email": "a@b"}});
    let info = json!({"key_id": 7, "name": "k", "note": "n", "details": details});
    script(&server, "GET", route, [ok(info)]).await;
    script(&server, "DELETE", route, [status(204)]).await;
    let client = client(&server);

    let info = client.api_key_info().await.unwrap();
    client.delete_api_key().await.unwrap();

    assert_eq!(
        (info.key_id, info.details.org_details.name.as_str()),
        (7, "Org")
    );
    let all = requests(&server, route).await;
    assert_eq!(all.len(), 2);
    assert!(
        all.iter()
            .all(|r| header(r, "x-api-key") == Some("tml-secret"))
    );
    assert!(requests(&server, "/api/v1/auth/token").await.is_empty());
}

#[tokio::test]
async fn completions_are_asked_for_by_cursor_and_acknowledged() {
    let route = "/api/v1/retrieve_futures";
    let done = json!({
        "completions": [
            {"state": "finished", "request_id": "r1", "response_payload_uncompressed_size": 123},
            {"state": "failed", "request_id": "r2"},
        ],
        "cursor": 2,
    });
    let (server, client) = serving("POST", route, done).await;
    let request = RetrieveFuturesRequest {
        target: CompletionsTarget::SamplingSession {
            sampling_session_id: "S1:sample:0".parse().unwrap(),
            cloned_sampler_id: 3,
        },
        prev_cursor: 1,
        timeout: None,
        retrieved_request_ids: vec!["r0".parse().unwrap()],
    };

    let answer = client.retrieve_futures(&request).await.unwrap();

    assert_eq!(answer.cursor, 2);
    assert!(matches!(
        &answer.completions[..],
        [
            Completion::Finished {
                response_payload_uncompressed_size: Some(123),
                ..
            },
            Completion::Failed { .. },
        ]
    ));
    let body: Value = only(&server, route).await.body_json().unwrap();
    assert_eq!(
        body,
        json!({
            "target": {
                "type": "sampling_session",
                "sampling_session_id": "S1:sample:0",
                "cloned_sampler_id": 3,
            },
            "prev_cursor": 1,
            "retrieved_request_ids": ["r0"],
        })
    );
}

#[tokio::test]
async fn a_second_client_of_a_sampler_gets_a_number_of_its_own() {
    let route = "/api/v1/join_sampling_session";
    let answer = json!({"type": "join_sampling_session", "client_counter": 3});
    let (server, client) = serving("POST", route, answer).await;

    let number = client
        .join_sampling_session(&"S1:sample:0".parse().unwrap())
        .await
        .unwrap();

    assert_eq!(number, 3);
    let body: Value = only(&server, route).await.body_json().unwrap();
    let expected = json!({"sampling_session_id": "S1:sample:0", "type": "join_sampling_session"});
    assert_eq!(body, expected);
}

#[tokio::test]
async fn somebody_who_may_not_read_the_audit_log_is_told_so() {
    let server = server().await;
    let refusal = answer(403, json!({"detail": "administrators only"}));
    script(&server, "GET", "/api/v1/audit", [refusal]).await;

    let error = client(&server)
        .get_audit_log(&AuditEventType::All, None)
        .await
        .unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::PermissionDenied);
}

#[tokio::test]
async fn telemetry_is_sent_once_and_its_loss_is_an_error() {
    let route = "/api/v1/telemetry";
    let server = server().await;
    let accepted = ok(json!({"status": "accepted"}));
    script(&server, "POST", route, [accepted, status(503)]).await;
    let client = client(&server);
    let batch = json!({
        "events": [{
            "event": "SESSION_START",
            "event_id": "e1",
            "event_session_index": 0,
            "severity": "INFO",
            "timestamp": "2026-11-20T00:00:00Z",
        }],
        "platform": "Linux",
        "sdk_version": "0.38.0",
        "session_id": "S1",
        "process_uuid": "p1",
    });
    let request = serde_json::from_value(batch.clone()).unwrap();

    let answer = client.send_telemetry(&request).await.unwrap();
    let error = client.send_telemetry(&request).await.unwrap_err();

    assert_eq!(answer.status, "accepted");
    assert_eq!(error.attempts(), 1);
    let sent = requests(&server, route).await;
    assert_eq!(sent[0].body_json::<Value>().unwrap(), batch);
}
