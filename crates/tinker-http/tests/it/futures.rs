//! Waiting for results.

use std::time::Duration;

use prost::Message;
use serde_json::{Value, json};
use tinker_http::{ErrorKind, Event, RequestType, Resolved, Timeouts};
use tinker_types::{ErrorCategory, ForwardBackwardOutput, PROTOBUF, QueueState, RequestId, proto};
use wiremock::{MockServer, ResponseTemplate};

use crate::support::*;

const RETRIEVE: &str = "/api/v1/retrieve_future";

fn id() -> RequestId {
    "r1".parse().unwrap()
}

fn done() -> ResponseTemplate {
    ok(json!({"metrics": {"grad_norm": 1.5}}))
}

fn not_yet(state: &str, reason: &str) -> ResponseTemplate {
    let body = json!({"type": "try_again", "queue_state": state, "queue_state_reason": reason});
    answer(408, body)
}

async fn answers(answers: impl IntoIterator<Item = ResponseTemplate>) -> MockServer {
    let server = server().await;
    script(&server, "POST", RETRIEVE, answers).await;
    server
}

/// Polls an optimizer step to its end.
async fn check(script: impl IntoIterator<Item = ResponseTemplate>, n_expected: usize) {
    let server = answers(script).await;

    let resolved = client(&server)
        .retrieve_optim_step(&id(), None)
        .await
        .unwrap();

    assert!(matches!(resolved, Resolved::Ready(r) if r.metrics.is_some()));
    assert_eq!(requests(&server, RETRIEVE).await.len(), n_expected);
}

#[tokio::test]
async fn keeps_asking_through_whatever_passes() {
    let again = ok(json!({"type": "try_again"}));
    check([done()], 1).await;
    check([answer(408, json!({})), status(408), again, done()], 4).await;
    check([status(500), status(503), status(429), done()], 4).await;
    check([status(400), status(400), done()], 3).await;
}

#[tokio::test]
async fn a_third_empty_400_too_many_is_refused() {
    let server = answers([status(400)]).await;

    let error = client(&server)
        .retrieve_optim_step(&id(), None)
        .await
        .unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::InvalidRequest);
    assert_eq!(error.request_id(), Some("r1"));
    assert_eq!(requests(&server, RETRIEVE).await.len(), 4);
}

#[tokio::test]
async fn the_size_is_reserved_before_the_result_is_fetched() {
    let size = json!({"status": "complete_metadata", "response_payload_size": 512});
    let server = answers([ok(size), done()]).await;

    client(&server)
        .retrieve_optim_step(&id(), None)
        .await
        .unwrap();

    let allowed: Vec<Value> = requests(&server, RETRIEVE)
        .await
        .iter()
        .map(|r| r.body_json::<Value>().unwrap()["allow_metadata_only"].clone())
        .collect();
    assert_eq!(allowed, [json!(true), json!(false)]);
}

#[tokio::test]
async fn a_size_announced_twice_is_an_error() {
    let size = json!({"status": "complete_metadata", "response_payload_size": 512});
    let server = answers([ok(size)]).await;

    let error = client(&server)
        .retrieve_optim_step(&id(), None)
        .await
        .unwrap_err();

    assert!(error.message().contains("twice"), "{error}");
    assert_eq!(requests(&server, RETRIEVE).await.len(), 2);
}

#[tokio::test]
async fn failures_keep_their_message_and_category() {
    let server = answers([ok(json!({"error": "boom", "category": "server"}))]).await;

    let resolved = client(&server)
        .retrieve_optim_step(&id(), None)
        .await
        .unwrap();

    let Resolved::Failed(failure) = resolved else {
        panic!("{resolved:?}");
    };
    assert_eq!(
        (failure.error.as_str(), failure.category),
        ("boom", ErrorCategory::Server)
    );
}

#[tokio::test]
async fn a_forgotten_future_is_expired() {
    let server = answers([answer(410, json!({"detail": "promise lost"}))]).await;

    let error = client(&server)
        .retrieve_optim_step(&id(), None)
        .await
        .unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Expired);
    assert!(error.to_string().contains("promise lost"), "{error}");
}

#[tokio::test]
async fn queue_news_reaches_the_observer_once() {
    let throttled = not_yet("paused_rate_limit", "server throttle");
    let server = answers([
        throttled.clone(),
        throttled,
        not_yet("PAUSED_CAPACITY", "busy"),
        ok(json!({"type": "try_again", "queue_state": "paused_capacity", "queue_state_reason": "busy"})),
        done(),
    ])
    .await;
    let heard = Heard::default();
    let client = heard.attach(builder(&server.uri())).build().unwrap();

    client.retrieve_optim_step(&id(), None).await.unwrap();

    let news = |state, reason: &str| Event::Queue {
        request_id: id(),
        request_type: RequestType::OptimStep,
        state,
        reason: Some(reason.into()),
    };
    let heard: Vec<Event> = heard
        .events()
        .into_iter()
        .filter(|event| matches!(event, Event::Queue { .. }))
        .collect();
    assert_eq!(
        heard,
        [
            news(QueueState::PausedRateLimit, "server throttle"),
            news(QueueState::PausedCapacity, "busy"),
        ]
    );
}

#[tokio::test]
async fn a_hung_server_is_told_and_waited_for() {
    let hung = done().set_delay(Duration::from_secs(600));
    let server = answers([hung.clone(), hung.clone(), hung, done()]).await;
    let heard = Heard::default();
    let timeouts = Timeouts {
        retrieve: Duration::from_millis(50),
        ..Timeouts::default()
    };
    let builder = heard.attach(builder(&server.uri())).timeouts(timeouts);
    let client = builder.build().unwrap();

    client.retrieve_optim_step(&id(), None).await.unwrap();

    let events = heard.events();
    assert!(
        matches!(events[0], Event::ServerSilent { .. }),
        "{events:?}"
    );
    assert!(
        matches!(events[1], Event::ServerAnswers { .. }),
        "{events:?}"
    );
    assert_eq!(events.len(), 2, "{events:?}");
}

#[tokio::test]
async fn asks_are_numbered_and_the_round_trip_is_told_once() {
    let server = answers([status(408), status(408), done()]).await;
    let took = Duration::from_millis(250);

    client(&server)
        .retrieve_optim_step(&id(), Some(took))
        .await
        .unwrap();

    let sent = requests(&server, RETRIEVE).await;
    let all = |name| sent.iter().map(|r| header(r, name)).collect::<Vec<_>>();
    assert_eq!(
        all("x-tinker-request-iteration"),
        [Some("0"), Some("1"), Some("2")]
    );
    assert_eq!(all("x-tinker-request-type"), [Some("OptimStep"); 3]);
    assert_eq!(
        all("x-tinker-create-promise-roundtrip-time"),
        [Some("0.25"), None, None]
    );
}

#[tokio::test]
async fn passes_are_asked_for_in_protobuf_and_understood_in_json_too() {
    let output = ForwardBackwardOutput {
        metrics: [("loss:sum".to_owned(), 2.0)].into(),
        ..ForwardBackwardOutput::default()
    };
    let bytes = proto::ForwardBackwardOutput::from(&output).encode_to_vec();
    let proto = ResponseTemplate::new(200).set_body_raw(bytes, PROTOBUF);
    let json = ok(serde_json::to_value(&output).unwrap());
    let server = answers([proto, json]).await;
    let client = client(&server);

    for _ in 0..2 {
        let resolved = client.retrieve_forward_backward(&id(), None).await.unwrap();
        assert_eq!(resolved, Resolved::Ready(output.clone()));
    }

    let sent = requests(&server, RETRIEVE).await;
    assert_eq!(header(&sent[0], "accept"), Some(PROTOBUF));
}

#[tokio::test]
async fn dropping_the_wait_ends_the_asking() {
    let server = answers([status(408)]).await;
    let client = client(&server);
    let polling = tokio::spawn({
        let client = client.clone();
        async move { client.retrieve_optim_step(&id(), None).await }
    });
    while requests(&server, RETRIEVE).await.len() < 2 {
        tokio::task::yield_now().await;
    }

    polling.abort();
    polling.await.unwrap_err();

    // A hundred round trips leave time for dozens of asks; one may have been on its way.
    let n_before = requests(&server, RETRIEVE).await.len();
    for _ in 0..100 {
        client.healthz().await.unwrap_err();
    }
    let n_after = requests(&server, RETRIEVE).await.len();
    assert!(n_after <= n_before + 1, "{n_before} {n_after}");
}
