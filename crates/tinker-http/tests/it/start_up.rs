//! Settings, tokens and their refusal.

use std::time::Duration;

use serde_json::json;
use tinker_http::{ErrorKind, RetryPolicy};
use tinker_types::{FinishReason, FinishSessionRequest};

use crate::support::*;

const CAPABILITIES: &str = "/api/v1/get_server_capabilities";

/// A token of an hour: {"exp":4600,"iat":1000}.
fn jwt(name: &str) -> String {
    format!("eyJ{name}.eyJleHAiOjQ2MDAsImlhdCI6MTAwMH0.x")
}

#[tokio::test]
async fn settings_are_fetched_once_with_the_raw_key() {
    let server = server_with(json!({"fwdbwd_max_chunk_len": 7, "of_tomorrow": true})).await;
    script(
        &server,
        "GET",
        CAPABILITIES,
        [ok(json!({"supported_models": []}))],
    )
    .await;
    let client = client(&server);

    let (a, b) = tokio::join!(
        client.get_server_capabilities(),
        client.get_server_capabilities()
    );

    a.unwrap();
    b.unwrap();
    assert_eq!(client.config().await.unwrap().fwdbwd_max_chunk_len, 7);
    let sent = requests(&server, "/api/v1/client/config").await;
    assert_eq!(sent.len(), 1);
    assert_eq!(header(&sent[0], "x-api-key"), Some("tml-secret"));
    assert_eq!(
        sent[0].body_json::<serde_json::Value>().unwrap()["sdk_version"],
        "0.38.0"
    );
}

#[tokio::test]
async fn a_server_without_dynamic_settings_means_the_defaults() {
    let server = server().await;

    let dynamic = client(&server).dynamic_config().await.unwrap();

    assert_eq!(dynamic.refresh_interval_sec, 300);
}

#[tokio::test]
async fn the_key_is_exchanged_and_a_refused_token_is_replaced_once() {
    let server = server_with(json!({"pjwt_auth_enabled": true})).await;
    let tokens = [ok(json!({"jwt": jwt("a")})), ok(json!({"jwt": jwt("b")}))];
    script(&server, "POST", "/api/v1/auth/token", tokens).await;
    let refused = status(401).insert_header("www-authenticate", "Bearer error=\"invalid_token\"");
    let models = ok(json!({"supported_models": []}));
    script(
        &server,
        "GET",
        CAPABILITIES,
        [models.clone(), refused, models],
    )
    .await;
    let client = client(&server);

    client.get_server_capabilities().await.unwrap();
    client.get_server_capabilities().await.unwrap();

    let sent = requests(&server, CAPABILITIES).await;
    let keys: Vec<_> = sent
        .iter()
        .map(|r| header(r, "x-api-key").unwrap().to_owned())
        .collect();
    assert_eq!(keys, [jwt("a"), jwt("a"), jwt("b")]);
    let exchanges = requests(&server, "/api/v1/auth/token").await;
    assert_eq!(exchanges.len(), 2);
    assert!(
        exchanges
            .iter()
            .all(|r| header(r, "x-api-key") == Some("tml-secret"))
    );
}

/// A token that is due at once and valid for a minute: {"exp":1060,"iat":1000}.
const SHORT: &str = "eyJs.eyJleHAiOjEwNjAsImlhdCI6MTAwMH0.x";

#[tokio::test]
async fn a_failing_refresh_is_tried_once_a_minute_and_the_old_token_serves() {
    let server = server_with(json!({"pjwt_auth_enabled": true})).await;
    let tokens = [ok(json!({"jwt": SHORT})), status(503)];
    script(&server, "POST", "/api/v1/auth/token", tokens).await;
    script(
        &server,
        "GET",
        CAPABILITIES,
        [ok(json!({"supported_models": []}))],
    )
    .await;
    let client = client(&server);

    for _ in 0..4 {
        client.get_server_capabilities().await.unwrap();
    }

    let sent = requests(&server, CAPABILITIES).await;
    assert!(sent.iter().all(|r| header(r, "x-api-key") == Some(SHORT)));
    assert_eq!(requests(&server, "/api/v1/auth/token").await.len(), 2);
}

#[tokio::test]
async fn the_end_of_a_session_is_tried_once_and_not_waited_for() {
    let server = server().await;
    let route = "/api/v1/sessions/S1/finish";
    let slow = status(200).set_delay(Duration::from_secs(600));
    script(&server, "POST", route, [status(503), slow]).await;
    let client = client(&server);
    let session = "S1".parse().unwrap();
    let request = FinishSessionRequest {
        reason: FinishReason::Success,
        detail: None,
    };

    let failed = client.finish_session(&session, &request).await.unwrap_err();
    // Only the client's clock is stopped; it leaps whenever the client waits.
    tokio::time::pause();
    let asked_at = client.now();
    let late = client.finish_session(&session, &request).await.unwrap_err();

    assert_eq!(failed.attempts(), 1);
    assert_eq!(*late.kind(), ErrorKind::Timeout);
    let took = client.now() - asked_at;
    assert!(took < Duration::from_secs(4), "{took:?}");
    assert!(requests(&server, route).await.len() <= 2);
}

#[tokio::test]
async fn a_refused_key_is_an_error_without_the_key() {
    let server = wiremock::MockServer::start().await;
    let refusal = answer(401, json!({"detail": "invalid API key"}));
    script(&server, "POST", "/api/v1/client/config", [refusal]).await;

    let error = client(&server).get_server_capabilities().await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Unauthenticated);
    assert!(!format!("{error} {error:?}").contains("secret"));
}

#[tokio::test]
async fn headers_of_a_gateway_are_sent_and_not_shown() {
    let server = server().await;
    let builder = builder(&server.uri()).header("CF-Access-Client-Secret", "hidden");
    assert!(!format!("{builder:?}").contains("hidden"));
    assert!(!format!("{builder:?}").contains("tml-secret"));

    let client = builder.build().unwrap();
    client.config().await.unwrap();

    let sent = requests(&server, "/api/v1/client/config").await;
    assert_eq!(header(&sent[0], "cf-access-client-secret"), Some("hidden"));
}

#[tokio::test]
async fn malformed_settings_are_refused_before_anything_is_sent() {
    for (builder, part) in [
        (builder("localhost:1"), "must start with http://"),
        (
            builder("http://h").header("a b", "c"),
            "header \"a b\" is malformed",
        ),
        (
            builder("http://h").proxy("::"),
            "proxy address is malformed",
        ),
        (
            tinker_http::Client::builder("http://h"),
            "no API key was given",
        ),
    ] {
        let message = builder.build().unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}

#[tokio::test]
async fn the_server_says_how_long_a_bill_is_waited_for_unless_the_program_does() {
    let unpaid = answer(402, json!({"detail": "no credit"}));
    // Shorter than the 5 s to the next attempt, so that there is none.
    for (said, chosen) in [(4, None), (3600, Some(Duration::from_secs(4)))] {
        let flags = json!({"billing_exception_max_pause_duration_sec": said});
        let server = server_with(flags).await;
        script(&server, "GET", CAPABILITIES, [unpaid.clone()]).await;
        let mut policy = RetryPolicy::default();
        policy.billing_pause = chosen.unwrap_or(policy.billing_pause);
        let client = builder(&server.uri()).retry_policy(policy).build().unwrap();

        let asked = tokio::time::timeout(Duration::from_secs(4), client.get_server_capabilities());
        let error = asked.await.unwrap().unwrap_err();

        assert_eq!(*error.kind(), ErrorKind::BillingPaused);
        assert_eq!(error.attempts(), 1);
    }
}
