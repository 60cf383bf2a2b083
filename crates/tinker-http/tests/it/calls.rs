//! Retries, headers, redirects and errors of single calls.

use std::io::{Read, Write};
use std::time::Duration;

use serde_json::json;
use tinker_http::{AccessScope, ErrorKind, Event, Page, RetryPolicy};
use tinker_types::{AdamParams, OptimStepRequest, OptimStepTag};
use wiremock::ResponseTemplate;

use crate::support::*;

const CAPABILITIES: &str = "/api/v1/get_server_capabilities";
const OPTIM_STEP: &str = "/api/v1/optim_step";

fn step() -> OptimStepRequest {
    OptimStepRequest {
        model_id: "S1:train:0".parse().unwrap(),
        seq_id: 3,
        adam_params: Some(AdamParams::default()),
        optimizer_params: None,
        tag: OptimStepTag,
    }
}

fn models() -> ResponseTemplate {
    ok(json!({"supported_models": [{"model_name": "tinker/nano"}]}))
}

#[tokio::test]
async fn repeats_the_same_bytes_under_one_idempotency_key() {
    let server = server().await;
    let taken = ok(json!({"request_id": "r1"}));
    script(
        &server,
        "POST",
        OPTIM_STEP,
        [status(503), status(409), status(408), taken],
    )
    .await;

    let future = client(&server).optim_step(&step()).await.unwrap();

    assert_eq!(future.request_id.as_str(), "r1");
    let sent = requests(&server, OPTIM_STEP).await;
    assert_eq!(sent.len(), 4);
    assert!(sent.iter().all(|r| r.body == sent[0].body));
    assert!(
        sent.iter()
            .all(|r| { header(r, "x-idempotency-key") == header(&sent[0], "x-idempotency-key") })
    );
    let counts: Vec<_> = sent
        .iter()
        .map(|r| header(r, "x-stainless-retry-count"))
        .collect();
    assert_eq!(counts, [Some("0"), Some("1"), Some("2"), Some("3")]);
    assert_eq!(header(&sent[0], "x-api-key"), Some("tml-secret"));
    assert_eq!(header(&sent[0], "content-type"), Some("application/json"));
    assert!(
        header(&sent[0], "user-agent")
            .unwrap()
            .starts_with("tinker-rust/")
    );
}

#[tokio::test]
async fn reads_carry_no_idempotency_key() {
    let server = server().await;
    script(&server, "GET", CAPABILITIES, [status(502), models()]).await;

    let answer = client(&server).get_server_capabilities().await.unwrap();

    assert_eq!(answer.supported_models.len(), 1);
    let sent = requests(&server, CAPABILITIES).await;
    assert_eq!(header(&sent[1], "x-idempotency-key"), None);
}

#[tokio::test]
async fn waits_as_long_as_the_server_asks() {
    let server = server().await;
    let later = status(429).insert_header("retry-after-ms", "30");
    script(&server, "GET", CAPABILITIES, [later, models()]).await;
    let heard = Heard::default();
    let client = heard.attach(builder(&server.uri())).build().unwrap();

    client.get_server_capabilities().await.unwrap();

    let waits: Vec<Duration> = heard
        .events()
        .iter()
        .filter_map(|event| match event {
            Event::Retrying { wait, .. } => Some(*wait),
            _ => None,
        })
        .collect();
    assert_eq!(waits, [Duration::from_millis(30)]);
}

#[tokio::test]
async fn the_servers_word_on_retrying_wins_over_the_status() {
    let server = server().await;
    let never = status(503).insert_header("x-should-retry", "false");
    script(&server, "GET", CAPABILITIES, [never]).await;
    let always = answer(400, json!({"detail": "later"})).insert_header("x-should-retry", "true");
    script(
        &server,
        "POST",
        OPTIM_STEP,
        [always, ok(json!({"request_id": "r"}))],
    )
    .await;
    let client = client(&server);

    let error = client.get_server_capabilities().await.unwrap_err();
    client.optim_step(&step()).await.unwrap();

    assert_eq!((error.status(), error.attempts()), (Some(503), 1));
}

#[tokio::test]
async fn a_refusal_is_sent_once_and_names_the_reason() {
    let server = server().await;
    let refusal = answer(
        400,
        json!({"detail": "seq_id must be positive", "category": "user"}),
    );
    script(&server, "POST", OPTIM_STEP, [refusal]).await;

    let error = client(&server).optim_step(&step()).await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::InvalidRequest);
    assert!(
        error
            .to_string()
            .starts_with("seq_id must be positive (POST /api/v1/optim_step: 400, 1 attempt, "),
        "{error}"
    );
    assert_eq!(requests(&server, OPTIM_STEP).await.len(), 1);
}

#[tokio::test]
async fn attempts_end_at_the_maximum() {
    let server = server().await;
    script(&server, "GET", CAPABILITIES, [status(500)]).await;
    let policy = RetryPolicy {
        max_attempts: 3,
        backoff: quick(),
        ..RetryPolicy::default()
    };
    let client = builder(&server.uri()).retry_policy(policy).build().unwrap();

    let error = client.get_server_capabilities().await.unwrap_err();

    assert_eq!((error.kind(), error.attempts()), (&ErrorKind::Server, 3));
    assert_eq!(requests(&server, CAPABILITIES).await.len(), 3);
}

#[tokio::test]
async fn the_key_does_not_follow_a_redirect() {
    let elsewhere = wiremock::MockServer::start().await;
    let server = server().await;
    let redirect = status(302).insert_header("location", format!("{}/x", elsewhere.uri()).as_str());
    script(&server, "GET", CAPABILITIES, [redirect]).await;

    let error = client(&server).get_server_capabilities().await.unwrap_err();

    assert!(
        error.message().contains("unexpected redirect (302)"),
        "{error}"
    );
    assert!(elsewhere.received_requests().await.unwrap().is_empty());
}

#[tokio::test]
async fn an_answer_that_is_not_json_names_its_type() {
    let server = server().await;
    let html = ResponseTemplate::new(200).set_body_raw("<html>", "text/html");
    script(&server, "GET", CAPABILITIES, [html]).await;

    let error = client(&server).get_server_capabilities().await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Decode);
    assert!(error.message().contains("(200, text/html)"), "{error}");
}

#[tokio::test]
async fn a_corrupt_gzip_body_is_a_decode_error() {
    let server = server().await;
    let corrupt = ResponseTemplate::new(200)
        .insert_header("content-encoding", "gzip")
        .set_body_raw("not gzip", "application/json");
    script(&server, "GET", CAPABILITIES, [corrupt]).await;

    let error = client(&server).get_server_capabilities().await.unwrap_err();

    assert_eq!((error.kind(), error.attempts()), (&ErrorKind::Decode, 1));
}

/// An address of this machine where nobody listens.
fn unused_address() -> std::net::SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

#[tokio::test]
async fn a_server_that_is_gone_is_waited_for_and_its_loss_and_return_are_told_once() {
    let address = unused_address();
    let heard = Heard::default();
    let client = heard
        .attach(builder(&format!("http://{address}")))
        .build()
        .unwrap();
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.get_server_capabilities().await }
    });
    while !heard
        .events()
        .iter()
        .any(|e| matches!(e, Event::Retrying { .. }))
    {
        tokio::task::yield_now().await;
    }

    let listener = std::net::TcpListener::bind(address).unwrap();
    let server = wiremock::MockServer::builder()
        .listener(listener)
        .start()
        .await;
    wiremock::Mock::given(wiremock::matchers::any())
        .respond_with(models())
        .mount(&server)
        .await;

    // A 404 is possible in the moment before the script is in place.
    let outcome = call.await.unwrap();
    assert!(outcome.is_ok() || outcome.unwrap_err().status() == Some(404));
    let events = heard.events();
    let n_lost = events
        .iter()
        .filter(|e| matches!(e, Event::ServerLost { .. }))
        .count();
    let n_back = events
        .iter()
        .filter(|e| matches!(e, Event::ServerBack { .. }))
        .count();
    assert_eq!((n_lost, n_back), (1, 1), "{events:?}");
}

#[tokio::test]
async fn a_server_that_never_comes_back_is_given_up() {
    let client = builder(&format!("http://{}", unused_address()))
        .wait_for_server(Duration::from_millis(20))
        .build()
        .unwrap();

    let error = client.get_server_capabilities().await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Connect);
    assert!(error.attempts() > 1);
    assert!(!format!("{error:?}").contains("tml-secret"));
}

/// Serves raw answers, one connection each.
pub(crate) fn serve_raw(answers: Vec<&'static str>) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                if stream.read(&mut request).unwrap() == 0 {
                    break;
                }
            }
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    format!("http://{address}")
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_asked_for_again() {
    let uri = serve_raw(vec![
        "",
        "HTTP/1.1 200 OK\r\ncontent-length: 90\r\ncontent-type: application/json\r\n\r\n{",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}",
    ]);
    let policy = RetryPolicy {
        backoff: quick(),
        reconnect_timeout: Duration::from_secs(5),
        ..RetryPolicy::default()
    };
    let client = builder(&uri).retry_policy(policy).build().unwrap();

    client.config().await.unwrap();
}

/// Sends a step to a server that answers so, one attempt that counts; whether it may have arrived.
async fn may_have_arrived(answers: &[&'static str]) -> bool {
    let settings = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
    let uri = serve_raw([&[settings, settings], answers].concat());
    let policy = RetryPolicy {
        max_attempts: 1,
        backoff: quick(),
        reconnect_timeout: Duration::from_secs(5),
        ..RetryPolicy::default()
    };
    let client = builder(&uri).retry_policy(policy).build().unwrap();
    let error = client.optim_step(&step()).await.unwrap_err();
    assert_eq!(error.attempts() as usize, answers.len(), "{error}");
    error.may_have_arrived()
}

#[tokio::test]
async fn a_refusal_after_an_attempt_that_may_have_arrived_says_so() {
    const INTERRUPTED: &str = "";
    const REFUSED: &str = "HTTP/1.1 401 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const THROTTLED: &str = "HTTP/1.1 429 Later\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const FAILED: &str = "HTTP/1.1 500 Oh\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

    for (answers, expected) in [
        (&[REFUSED][..], false),
        (&[THROTTLED], false),
        (&[FAILED], true),
        (&[INTERRUPTED, REFUSED], true),
        (&[INTERRUPTED, THROTTLED], true),
        (&[INTERRUPTED, INTERRUPTED, REFUSED], true),
    ] {
        assert_eq!(may_have_arrived(answers).await, expected, "{answers:?}");
    }
}

#[tokio::test]
async fn lists_are_paged_and_scoped_and_ids_keep_their_colons() {
    let server = server().await;
    let run = json!({"training_run_id": "S1:train:0", "base_model": "m", "model_owner": "me",
        "is_lora": true, "last_request_time": "2026-01-01T00:00:00Z"});
    script(
        &server,
        "GET",
        "/api/v1/training_runs/S1:train:0",
        [ok(run.clone())],
    )
    .await;
    let rows =
        json!({"training_runs": [run], "cursor": {"offset": 40, "limit": 20, "total_count": 41}});
    script(&server, "GET", "/api/v1/training_runs", [ok(rows)]).await;
    let client = client(&server);

    let page = Page {
        limit: 20,
        offset: 40,
    };
    let runs = client
        .list_training_runs(page, AccessScope::Accessible, None)
        .await
        .unwrap();
    let id = &runs.training_runs[0].training_run_id;
    client
        .get_training_run(id, AccessScope::Owned)
        .await
        .unwrap();

    let listed = &requests(&server, "/api/v1/training_runs").await[0];
    assert_eq!(
        listed.url.query(),
        Some("limit=20&offset=40&access_scope=accessible")
    );
}

#[tokio::test]
async fn a_deletion_whose_answer_was_lost_is_done() {
    let server = server().await;
    let route = "/api/v1/training_runs/S1:train:0/checkpoints/weights/0001";
    script(&server, "DELETE", route, [status(500), status(404)]).await;
    let gone = "/api/v1/training_runs/S1:train:0/checkpoints/weights/0002";
    script(&server, "DELETE", gone, [status(404)]).await;
    let client = client(&server);

    let path = "tinker://S1:train:0/weights/0001".parse().unwrap();
    client.delete_checkpoint(&path).await.unwrap();
    let path = "tinker://S1:train:0/weights/0002".parse().unwrap();
    let error = client.delete_checkpoint(&path).await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::NotFound);
}
