//! Recording what is said, and saying it again.

use std::path::PathBuf;

use serde_json::json;
use tempfile::TempDir;
use tinker_http::{
    Cassette, Client, ErrorKind, Event, Outcome, Pace, Page, Recorder, Replay, RequestType,
    Resolved,
};
use tinker_types::{AdamParams, AuditEventType, OptimStepRequest, OptimStepTag, RequestId};
use wiremock::MockServer;

use crate::support::*;

const OPTIM_STEP: &str = "/api/v1/optim_step";
const RETRIEVE: &str = "/api/v1/retrieve_future";
const CHECKPOINTS: &str = "/api/v1/checkpoints";

struct Tape {
    recorder: Recorder,
    path: PathBuf,
    _dir: TempDir,
}

fn tape() -> Tape {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("tape.jsonl");
    let recorder = Recorder::create(&path).unwrap();
    Tape {
        recorder,
        path,
        _dir: dir,
    }
}

fn recording(uri: &str, tape: &Tape) -> Client {
    builder(uri).record(tape.recorder.clone()).build().unwrap()
}

async fn play(tape: &Tape) -> (Replay, Client) {
    tape.recorder.finish().await.unwrap();
    let cassette = Cassette::open(&tape.path).unwrap();
    let replay = Replay::start(cassette, Pace::Instant).await.unwrap();
    let client = Client::builder(replay.base_url().to_string())
        .api_key("tml-another-key".parse().unwrap())
        .retry_policy(
            builder("http://unused")
                .build()
                .unwrap()
                .retry_policy()
                .clone(),
        )
        .poll_policy(
            builder("http://unused")
                .build()
                .unwrap()
                .poll_policy()
                .clone(),
        )
        .build()
        .unwrap();
    (replay, client)
}

fn step(seq_id: u64) -> OptimStepRequest {
    OptimStepRequest {
        model_id: "S1:train:0".parse().unwrap(),
        seq_id,
        adam_params: Some(AdamParams::default()),
        optimizer_params: None,
        tag: OptimStepTag,
    }
}

/// One step, sent until it is taken, and its result.
async fn train(client: &Client) -> String {
    let future = client.optim_step(&step(1)).await.unwrap();
    let result = client.retrieve_optim_step(&future.request_id, None).await;
    let result = result.unwrap();
    assert!(matches!(&result, Resolved::Ready(step) if step.metrics.is_some()));
    format!("{}: {result:?}", future.request_id)
}

async fn training_server() -> MockServer {
    let server = server().await;
    let taken = ok(json!({"request_id": "r1"}));
    script(&server, "POST", OPTIM_STEP, [status(503), taken]).await;
    let waiting = json!({"type": "try_again", "request_id": "r1", "queue_state": "active"});
    let result = json!({"metrics": {"grad_norm": 0.1}});
    script(&server, "POST", RETRIEVE, [ok(waiting), ok(result)]).await;
    server
}

#[tokio::test]
async fn a_recording_says_again_what_the_server_said() {
    let (server, tape) = (training_server().await, tape());
    let first = train(&recording(&server.uri(), &tape)).await;

    let (replay, client) = play(&tape).await;
    let second = train(&client).await;

    assert_eq!(first, second);
    let report = replay.report();
    assert_eq!((report.unmatched.len(), report.unused.len()), (0, 0));
    // Settings twice (the dynamic ones are a 404), the step twice, the poll twice.
    assert_eq!(report.n_replayed, 6);
    assert_eq!(
        client
            .optim_step(&step(1))
            .await
            .unwrap()
            .request_id
            .as_str(),
        "r1"
    );
    assert_eq!(replay.report().n_repeated, 1);
}

#[tokio::test]
async fn a_cassette_can_be_looked_into() {
    let (server, tape) = (training_server().await, tape());
    train(&recording(&server.uri(), &tape)).await;
    let stats = tape.recorder.finish().await.unwrap();

    let cassette = Cassette::open(&tape.path).unwrap();

    assert_eq!(stats.n_exchanges, cassette.exchanges().len() as u64);
    assert_eq!(stats.n_bytes, std::fs::metadata(&tape.path).unwrap().len());
    let steps: Vec<_> = cassette
        .exchanges()
        .iter()
        .filter(|exchange| exchange.path == OPTIM_STEP)
        .map(|exchange| (exchange.retry_count, exchange.outcome.status()))
        .collect();
    assert_eq!(steps, [(0, Some(503)), (1, Some(200))]);
    let route = &cassette.summary().routes[&format!("POST {OPTIM_STEP}")];
    assert_eq!((route.n_requests, route.n_retries), (2, 1));
    let sent = cassette.exchanges().iter().find(|e| e.path == OPTIM_STEP);
    assert_eq!(
        sent.unwrap().body.as_ref().unwrap().json().unwrap()["seq_id"],
        1
    );
}

#[tokio::test]
async fn no_secret_gets_into_the_file_and_the_replay_needs_none() {
    let server = server_with(json!({"pjwt_auth_enabled": true})).await;
    let token = json!({"jwt": "eyJtoken.of.secrets"});
    script(&server, "POST", "/api/v1/auth/token", [ok(token)]).await;
    let listed = json!({
        "checkpoints": [],
        "note": "eyJtoken.of.secrets tml-secret gateway-secret",
        "url": "https://store/a?X-Amz-Signature=signed-secret",
    });
    script(&server, "GET", CHECKPOINTS, [ok(listed)]).await;
    let refusal = json!({"detail": "key tml-secret may not, see https://store/?sig=signed-secret"});
    script(&server, "POST", OPTIM_STEP, [answer(403, refusal)]).await;
    let tape = tape();
    let client = builder(&server.uri())
        .header("cf-access-client-secret", "gateway-secret")
        .record(tape.recorder.clone())
        .build()
        .unwrap();
    client.list_user_checkpoints(Page::first(20)).await.unwrap();
    client.optim_step(&step(1)).await.unwrap_err();

    let (replay, client) = play(&tape).await;
    client.list_user_checkpoints(Page::first(20)).await.unwrap();
    let refused = client.optim_step(&step(1)).await.unwrap_err();

    let text = std::fs::read_to_string(&tape.path).unwrap();
    for secret in [
        "eyJtoken",
        "tml-secret",
        "gateway-secret",
        "signed-secret",
        "x-api-key",
    ] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
    assert!(text.contains("https://store/a?***"), "{text}");
    assert_eq!(refused.message(), "key *** may not, see https://store/?***");
    assert_eq!(replay.report().unmatched, []);
}

#[cfg(unix)]
#[tokio::test]
async fn a_cassette_is_its_owners_and_never_overwritten() {
    use std::os::unix::fs::PermissionsExt as _;
    let tape = tape();

    let mode = std::fs::metadata(&tape.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = Recorder::create(&tape.path).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::File);
    assert!(
        error.message().contains("tape.jsonl cannot be made"),
        "{error}"
    );
}

#[tokio::test]
async fn a_program_that_says_otherwise_is_told_where() {
    let (server, tape) = (training_server().await, tape());
    train(&recording(&server.uri(), &tape)).await;

    let (replay, client) = play(&tape).await;
    let error = client.optim_step(&step(2)).await.unwrap_err();
    let unknown = client
        .list_user_checkpoints(Page::first(20))
        .await
        .unwrap_err();

    assert_eq!(error.status(), Some(422));
    assert!(
        error.message().ends_with(".seq_id was 1 and is 2"),
        "{error}"
    );
    assert_eq!(unknown.message(), "the cassette holds no such request");
    let report = replay.report();
    assert_eq!(report.unmatched.len(), 2);
    assert_eq!(report.unmatched[0].path, OPTIM_STEP);
    // The step and its polls were never asked for.
    assert_eq!(report.unused.len(), 4);
}

#[tokio::test]
async fn broken_connections_break_again() {
    let answers = [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}",
        "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 90\r\n\r\n{",
        "HTTP/1.1 200 OK\r\ncontent-length: 19\r\nconnection: close\r\n\r\n{\"request_id\":\"r1\"}",
    ];
    let tape = tape();
    let client = recording(&crate::calls::serve_raw(answers.to_vec()), &tape);
    client.optim_step(&step(1)).await.unwrap();
    tape.recorder.finish().await.unwrap();
    let outcomes = Cassette::open(&tape.path).unwrap();
    let broken = &outcomes.exchanges()[2].outcome;
    assert!(matches!(broken, Outcome::Failure { reason } if reason.contains("broke")));

    let cassette = Cassette::open(&tape.path).unwrap();
    let replay = Replay::start(cassette, Pace::Instant).await.unwrap();
    let heard = Heard::default();
    let client = heard.attach(builder(&replay.base_url().to_string()));
    client.build().unwrap().optim_step(&step(1)).await.unwrap();

    let lost = |event: &Event| matches!(event, Event::ServerLost { .. });
    assert!(heard.events().iter().any(lost), "{:?}", heard.events());
    assert_eq!(replay.report().unused, Vec::<u64>::new());
}

#[tokio::test]
async fn a_call_that_is_dropped_counts_as_abandoned() {
    let (server, tape) = (server().await, tape());
    let slow = ok(json!({})).set_delay(std::time::Duration::from_secs(600));
    script(&server, "POST", RETRIEVE, [slow]).await;
    let client = recording(&server.uri(), &tape);
    let id: RequestId = "r1".parse().unwrap();
    let waiting = tokio::spawn(async move { client.retrieve_optim_step(&id, None).await });
    while requests(&server, RETRIEVE).await.is_empty() {
        tokio::task::yield_now().await;
    }

    waiting.abort();
    let _ = waiting.await;
    tape.recorder.finish().await.unwrap();

    let cassette = Cassette::open(&tape.path).unwrap();
    let last = cassette.exchanges().last().unwrap().clone();
    assert_eq!(
        (last.path.as_str(), &last.outcome),
        (RETRIEVE, &Outcome::Abandoned)
    );
    let kind = RequestType::OptimStep.as_str();
    assert_eq!(last.headers["x-tinker-request-type"], kind);

    // Nor is it answered when it is asked again.
    let (replay, client) = play(&tape).await;
    let id: RequestId = "r1".parse().unwrap();
    let asking = tokio::spawn(async move { client.retrieve_optim_step(&id, None).await });
    while !replay.report().unused.is_empty() {
        tokio::task::yield_now().await;
    }
    assert!(!asking.is_finished());
    asking.abort();
}

#[tokio::test]
async fn the_recorded_pace_is_kept_when_asked_for() {
    let line = json!({
        "number": 0, "at_ms": 0, "took_ms": 30, "method": "POST", "path": "/api/v1/client/config",
        "body": {"text": r#"{"sdk_version":"0.38.0"}"#},
        "outcome": {"answer": {"status": 200, "body": {"text": "{}"}}},
    });
    let head = r#"{"tinker_cassette":1,"client":"c","started_unix_s":0}"#;
    let cassette = Cassette::read(format!("{head}\n{line}\n").as_bytes(), "c").unwrap();
    let replay = Replay::start(cassette, Pace::Recorded).await.unwrap();

    let client = builder(&replay.base_url().to_string()).build().unwrap();
    client.config().await.unwrap();

    assert!(client.now() >= std::time::Duration::from_millis(30));
    assert_eq!(replay.report().n_replayed, 1);
}

#[tokio::test]
async fn web_pages_may_not_read_a_cassette() {
    let (server, tape) = (training_server().await, tape());
    train(&recording(&server.uri(), &tape)).await;
    let (replay, _) = play(&tape).await;

    let page = builder(&replay.base_url().to_string()).header("origin", "https://page.example");
    let error = page.build().unwrap().config().await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::PermissionDenied);
    assert_eq!(replay.report().n_replayed, 0);
}

#[tokio::test]
async fn a_document_elsewhere_is_on_the_cassette_without_its_signature() {
    let (server, elsewhere, tape) = (server().await, server().await, tape());
    let entries = ok(json!({"entries": []}));
    script(&elsewhere, "GET", "/log", [entries]).await;
    let place = format!("{}/log?sig=signed-secret", elsewhere.uri());
    let moved = status(302).insert_header("location", place.as_str());
    script(&server, "GET", "/api/v1/audit", [moved]).await;
    let client = recording(&server.uri(), &tape);
    let recorded = client
        .get_audit_log(&AuditEventType::All, None)
        .await
        .unwrap();
    drop((server, elsewhere));

    let (replay, client) = play(&tape).await;
    let replayed = client
        .get_audit_log(&AuditEventType::All, None)
        .await
        .unwrap();

    assert_eq!(format!("{replayed:?}"), format!("{recorded:?}"));
    assert_eq!(replay.report().unmatched, []);
    assert!(
        !std::fs::read_to_string(&tape.path)
            .unwrap()
            .contains("signed-secret")
    );
}
