//! Requests and answers below the futures: retries, headers, bodies, redirects, secrets.

use std::time::{Duration, SystemTime};

use serde_json::json;
use tinker_contract::mock::{Mock, Reply, empty, json as reply, lost_connection, refusal};
use tinker_http::machine::{Backoff, parse_retry_after};
use tinker_http::{Client, ErrorKind, Event, RetryPolicy};
use tinker_types::{
    AUTH_TOKEN, CAPABILITIES, CLIENT_CONFIG, CREATE_SESSION, CreateSessionRequest,
    CreateSessionTag, DYNAMIC_CONFIG, ErrorCategory, TRAINING_RUNS,
};
use wiremock::ResponseTemplate;

use crate::support::{KEY, Rig, builder, ms, retry_policy};

fn create_session() -> CreateSessionRequest {
    CreateSessionRequest {
        tags: vec![],
        user_metadata: Default::default(),
        sdk_version: "0.38.0".into(),
        project_id: None,
        display_name: None,
        tag: CreateSessionTag,
    }
}

/// The call succeeds after these answers, with one request for each and one more.
async fn check_retried(replies: Vec<Reply>) -> Rig {
    let rig = Rig::start().await;
    let n = replies.len();
    rig.mock.script(CREATE_SESSION, replies);

    let session = rig.client.create_session(&create_session()).await.unwrap();

    assert_eq!(session.session_id.as_str(), "S1");
    assert_eq!(rig.mock.seen_at(CREATE_SESSION).len(), n + 1);
    rig
}

/// The call fails at the first answer.
async fn check_final(answer: Reply, kind: ErrorKind) -> tinker_http::Error {
    let rig = Rig::start().await;
    rig.mock.script(CREATE_SESSION, [answer]);

    let error = rig
        .client
        .create_session(&create_session())
        .await
        .unwrap_err();

    assert_eq!(*error.kind(), kind, "{error}");
    assert_eq!(rig.mock.seen_at(CREATE_SESSION).len(), 1);
    assert_eq!(error.attempts(), 1);
    error
}

#[tokio::test]
async fn passing_troubles_are_retried() {
    for status in [408, 409, 429, 500, 502, 503, 504] {
        check_retried(vec![refusal(status, "later")]).await;
    }
}

#[tokio::test]
async fn retries_503_twice_then_succeeds() {
    let rig = check_retried(vec![refusal(503, "a"), refusal(503, "b")]).await;

    let retries = rig.events.all();
    assert_eq!(retries.len(), 2);
    assert!(
        matches!(&retries[1], Event::Retrying { attempts: 2, route, .. } if route == CREATE_SESSION)
    );
}

#[tokio::test]
async fn a_broken_connection_is_retried() {
    check_retried(vec![lost_connection(), lost_connection()]).await;
}

#[tokio::test]
async fn an_empty_400_of_a_proxy_is_retried() {
    check_retried(vec![empty(400)]).await;
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_with_the_effort() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let client = builder(&format!("http://{address}")).retry_policy(RetryPolicy::never());

    let error = client
        .build()
        .unwrap()
        .create_session(&create_session())
        .await
        .unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Connect);
    assert!(
        error
            .to_string()
            .starts_with("cannot connect to the server (POST /api/v1/client/config, 1 attempt"),
        "{error}"
    );
    assert!(error.is_retryable());
}

#[tokio::test]
async fn the_servers_wish_for_milliseconds_is_granted() {
    let rig = check_retried(vec![refusal(429, "slow").header("retry-after-ms", "30")]).await;

    let seen = rig.mock.seen_at(CREATE_SESSION);
    assert!(seen[1].at - seen[0].at >= ms(30));
}

#[tokio::test]
async fn the_servers_wish_for_seconds_is_granted_in_any_case_of_letters() {
    let rig = check_retried(vec![refusal(429, "slow").header("Retry-After", "1")]).await;

    let seen = rig.mock.seen_at(CREATE_SESSION);
    assert!(seen[1].at - seen[0].at >= Duration::from_secs(1));
}

#[test]
fn wishes_may_be_dates_and_absurd_ones_are_capped() {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
    let parsed = |text| parse_retry_after(None, Some(text), now);

    assert_eq!(
        parsed("Sun, 06 Nov 1994 08:49:47 GMT"),
        Some(Duration::from_secs(10))
    );
    assert_eq!(parsed("Sun, 06 Nov 1994 08:49:27 GMT"), None, "the past");
    assert_eq!(parsed("-3"), None);
    assert_eq!(parsed("1e9"), Some(Duration::from_secs(60)));
    assert_eq!(parsed("NaN"), None);
    assert_eq!(parsed("soon"), None);
}

#[test]
fn delays_stay_within_their_jitter() {
    let backoff = RetryPolicy::default().backoff;
    let bounds = |n| (backoff.delay(n, 1.0), backoff.delay(n, 0.0));

    assert_eq!(bounds(0), (ms(375), ms(500)));
    for n in 5..40 {
        assert_eq!(bounds(n), (ms(7500), ms(10_000)));
    }
    assert_eq!(
        Backoff {
            jitter: 9.0,
            ..backoff
        }
        .delay(0, 1.0),
        Duration::ZERO
    );
}

#[tokio::test]
async fn a_server_may_forbid_retries() {
    check_final(
        refusal(503, "no").header("x-should-retry", "false"),
        ErrorKind::Server,
    )
    .await;
}

#[tokio::test]
async fn a_server_may_ask_for_retries() {
    check_retried(vec![refusal(400, "race").header("x-should-retry", "true")]).await;
}

#[tokio::test]
async fn final_statuses_are_not_retried() {
    for (status, kind) in [
        (400, ErrorKind::InvalidRequest),
        (401, ErrorKind::Unauthenticated),
        (403, ErrorKind::PermissionDenied),
        (404, ErrorKind::NotFound),
        (410, ErrorKind::Expired),
        (413, ErrorKind::InvalidRequest),
        (422, ErrorKind::InvalidRequest),
        (501, ErrorKind::Unsupported),
        (505, ErrorKind::Server),
    ] {
        check_final(refusal(status, "no"), kind).await;
    }
}

#[tokio::test]
async fn an_unsettled_bill_is_an_error_of_its_own() {
    check_final(refusal(402, "pay"), ErrorKind::BillingPaused).await;
}

#[tokio::test]
async fn endless_errors_end_at_the_most_attempts() {
    let rig = Rig::with(|builder| {
        builder.retry_policy(RetryPolicy {
            max_attempts: 3,
            ..retry_policy()
        })
    })
    .await;
    rig.mock
        .script(CREATE_SESSION, vec![refusal(500, "broken"); 10]);

    let error = rig
        .client
        .create_session(&create_session())
        .await
        .unwrap_err();

    assert_eq!(error.attempts(), 3);
    assert_eq!(rig.mock.seen_at(CREATE_SESSION).len(), 3);
    assert!(
        error
            .to_string()
            .contains("broken (POST /api/v1/create_session: 500, 3 attempts"),
        "{error}"
    );
}

#[tokio::test]
async fn the_category_of_an_error_is_taken_from_its_body() {
    let answer = reply(505, &json!({ "detail": "your fault", "category": "USER" }));

    let error = check_final(answer, ErrorKind::Server).await;

    assert_eq!(error.category(), Some(&ErrorCategory::User));
    assert_eq!(error.message(), "your fault");
}

#[tokio::test]
async fn the_servers_request_id_is_in_the_error() {
    let error = check_final(
        refusal(404, "no").header("x-request-id", "9f2c"),
        ErrorKind::NotFound,
    )
    .await;

    assert_eq!(error.request_id(), Some("9f2c"));
    assert!(error.to_string().contains("request id 9f2c"), "{error}");
}

#[tokio::test]
async fn a_success_that_is_not_json_names_status_and_type() {
    let html = ResponseTemplate::new(200).set_body_raw("<html>", "text/html");

    let error = check_final(html.into(), ErrorKind::Decode).await;

    assert!(
        error
            .to_string()
            .contains("the answer (200, text/html) was not understood"),
        "{error}"
    );
}

#[tokio::test]
async fn a_success_without_a_body_is_enough_where_none_is_read() {
    let rig = Rig::start().await;

    let deleted = rig
        .client
        .delete_checkpoint(&"tinker://S1:train:0/weights/a".parse().unwrap())
        .await;

    assert!(deleted.is_ok());
    let seen = rig.mock.seen();
    assert_eq!(
        seen[0].path,
        "/api/v1/training_runs/S1:train:0/checkpoints/weights/a"
    );
    assert_eq!(seen[0].method, "DELETE");
}

#[tokio::test]
async fn a_repeated_delete_that_finds_nothing_has_succeeded() {
    let rig = Rig::start().await;
    let path = "/api/v1/training_runs/S1:train:0/checkpoints/weights/a";
    rig.mock.script(
        path,
        [lost_connection(), refusal(404, "no such checkpoint")],
    );

    let deleted = rig
        .client
        .delete_checkpoint(&"tinker://S1:train:0/weights/a".parse().unwrap())
        .await;

    assert!(deleted.is_ok(), "{deleted:?}");
    assert_eq!(rig.mock.seen().len(), 2);
}

#[tokio::test]
async fn compressed_answers_are_read() {
    let body = serde_json::to_vec(&json!({ "session_id": "S-zstd" })).unwrap();
    let zstd = zstd::encode_all(&body[..], 1).unwrap();
    let rig = Rig::start().await;
    let template = ResponseTemplate::new(200).set_body_raw(zstd, "application/json");
    rig.mock.script(
        CREATE_SESSION,
        [Reply::from(template).header("content-encoding", "zstd")],
    );

    let session = rig.client.create_session(&create_session()).await.unwrap();

    assert_eq!(session.session_id.as_str(), "S-zstd");
}

#[tokio::test]
async fn a_corrupt_compressed_answer_is_a_clear_error() {
    let template = ResponseTemplate::new(200).set_body_raw("not gzip", "application/json");

    let error = check_final(
        Reply::from(template).header("content-encoding", "gzip"),
        ErrorKind::Decode,
    )
    .await;

    assert!(
        error.to_string().starts_with("the answer is corrupt"),
        "{error}"
    );
}

#[tokio::test]
async fn a_redirect_is_an_error_and_the_key_stays_here() {
    let elsewhere = Mock::start().await;
    let target = format!("{}/api/v1/create_session", elsewhere.base_url());

    let error = check_final(empty(302).header("location", &target), ErrorKind::Decode).await;

    assert!(
        error
            .to_string()
            .starts_with("unexpected redirect (302) to 127.0.0.1"),
        "{error}"
    );
    assert!(elsewhere.seen().is_empty());
}

#[tokio::test]
async fn repeated_requests_keep_their_idempotency_key_and_count_up() {
    let rig = check_retried(vec![refusal(503, "a"), lost_connection()]).await;

    let seen = rig.mock.seen_at(CREATE_SESSION);
    let keys: Vec<_> = seen
        .iter()
        .map(|s| s.header("x-idempotency-key").unwrap())
        .collect();
    assert!(
        keys.iter().all(|key| *key == keys[0] && !key.is_empty()),
        "{keys:?}"
    );
    let counts: Vec<_> = seen
        .iter()
        .filter_map(|s| s.header("x-stainless-retry-count"))
        .collect();
    assert_eq!(counts, ["0", "1", "2"]);
    let bodies: Vec<_> = seen.iter().map(|s| s.body.clone()).collect();
    assert!(bodies.iter().all(|body| *body == bodies[0]));
}

#[tokio::test]
async fn two_calls_have_two_idempotency_keys_and_reads_have_none() {
    let rig = Rig::start().await;

    for _ in 0..2 {
        rig.client.create_session(&create_session()).await.unwrap();
    }
    rig.client.get_server_capabilities().await.unwrap();

    let seen = rig.mock.seen();
    let key = |i: usize| seen[i].header("x-idempotency-key");
    assert!(key(0).is_some() && key(0) != key(1), "{seen:?}");
    assert_eq!(key(2), None);
}

#[tokio::test]
async fn what_a_call_says_of_itself_wins_over_headers_of_the_program() {
    let rig = Rig::with(|builder| {
        builder
            .header("Accept", "text/plain")
            .header("X-Api-Key", "tml-another")
            .header("X-Team", "first")
            .header("x-team", "second")
    })
    .await;

    rig.client.get_server_capabilities().await.unwrap();

    let seen = &rig.mock.seen()[0];
    assert_eq!(seen.header("x-api-key"), Some(KEY));
    assert_eq!(seen.header("accept"), Some("application/json"));
    assert_eq!(seen.header("x-team"), Some("second"));
}

#[tokio::test]
async fn an_archive_that_is_being_made_is_asked_for_until_it_is_there() {
    let rig = Rig::start().await;
    let path = "tinker://S1:train:0/weights/0001".parse().unwrap();
    let route = format!("{TRAINING_RUNS}/S1:train:0/checkpoints/weights/0001/archive");
    let address = "https://store/a.tar?sig=s";
    let busy = refusal(503, "it is being made");
    let moved = empty(302)
        .header("location", address)
        .header("expires", "Fri, 01 Jan 2100 00:00:00 GMT");
    rig.mock.script(&route, [busy.clone(), busy, moved]);

    let archive = rig.client.get_checkpoint_archive(&path).await.unwrap();

    assert_eq!(archive.url.expose(), address);
    assert_eq!(rig.mock.seen_at(&route).len(), 3);
}

#[tokio::test]
async fn extra_headers_are_sent_where_they_were_given() {
    let bare = Rig::start().await;
    bare.client.get_server_capabilities().await.unwrap();
    assert_eq!(bare.mock.seen()[0].header("cf-access-client-id"), None);

    let rig = Rig::with(|builder| {
        builder
            .header("CF-Access-Client-Id", "id")
            .header("CF-Access-Client-Secret", "hidden")
            .user_agent("suite/1")
    })
    .await;
    rig.client.get_server_capabilities().await.unwrap();

    let seen = &rig.mock.seen()[0];
    assert_eq!(seen.header("cf-access-client-id"), Some("id"));
    assert_eq!(seen.header("cf-access-client-secret"), Some("hidden"));
    assert_eq!(seen.header("x-api-key"), Some(KEY));
    assert!(
        seen.header("user-agent")
            .unwrap()
            .starts_with("suite/1 tinker-rust/")
    );
}

#[tokio::test]
async fn secrets_are_in_no_debug_output_and_no_error() {
    let builder = builder("http://127.0.0.1:9")
        .header("cf-access-client-secret", "s3cret-gateway")
        .proxy("http://user:s3cret-proxy@127.0.0.1:9")
        .retry_policy(RetryPolicy::never());
    let shown = format!("{builder:?}");
    let client = builder.build().unwrap();
    let error = client.create_session(&create_session()).await.unwrap_err();

    for text in [
        shown,
        format!("{client:?}"),
        format!("{error:?}"),
        error.to_string(),
    ] {
        for secret in [KEY, "s3cret"] {
            assert!(!text.contains(secret), "{text}");
        }
    }
}

#[tokio::test]
async fn requests_go_through_the_proxy_of_their_client() {
    // The double is the proxy: it answers whatever host is asked for.
    let proxy = Mock::start().await;
    let client = builder("http://service.invalid/base")
        .proxy(proxy.base_url())
        .build()
        .unwrap();

    let session = client.get_server_capabilities().await;

    // The path has the base's prefix, which the double does not know.
    assert_eq!(*session.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(proxy.seen()[0].path, "/base/api/v1/client/config");
}

#[tokio::test]
async fn twenty_calls_at_once_all_succeed() {
    let rig = Rig::start().await;

    let calls = (0..20).map(|_| {
        let client = rig.client.clone();
        tokio::spawn(async move { client.get_server_capabilities().await })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap().unwrap();
    }

    assert_eq!(rig.mock.seen_at(CAPABILITIES).len(), 20);
}

#[tokio::test]
async fn start_up_happens_once_for_all_calls() {
    let mock = Mock::start().await;
    let client = builder(&mock.base_url()).build().unwrap();
    assert!(mock.seen().is_empty(), "building sends nothing");

    let (a, b) = tokio::join!(
        client.get_server_capabilities(),
        client.get_server_capabilities()
    );

    assert!(a.is_ok() && b.is_ok());
    assert_eq!(mock.seen_at(CLIENT_CONFIG).len(), 1);
    assert_eq!(mock.seen_at(DYNAMIC_CONFIG).len(), 1);
    assert!(mock.seen_at(AUTH_TOKEN).is_empty());
    assert_eq!(mock.seen()[0].json()["sdk_version"], "0.38.0");
}

#[tokio::test]
async fn a_server_without_dynamic_settings_means_the_defaults() {
    let mock = Mock::start().await;
    mock.script(DYNAMIC_CONFIG, [refusal(404, "no")]);
    let client = builder(&mock.base_url()).build().unwrap();

    let config = client.dynamic_config().await.unwrap();

    assert_eq!(config, tinker_types::DynamicConfig::default());
}

#[tokio::test]
async fn where_asked_for_the_key_is_exchanged_before_anything_else() {
    let mock = Mock::with_config(json!({ "pjwt_auth_enabled": true })).await;
    let client = builder(&mock.base_url()).build().unwrap();

    client.create_session(&create_session()).await.unwrap();

    let seen: Vec<_> = mock
        .seen()
        .iter()
        .map(|s| (s.path.clone(), s.header("x-api-key").unwrap().to_owned()))
        .collect();
    let token = "eyJh.e30.x".to_owned();
    assert_eq!(
        seen,
        [
            (CLIENT_CONFIG.to_owned(), KEY.to_owned()),
            (AUTH_TOKEN.to_owned(), KEY.to_owned()),
            (DYNAMIC_CONFIG.to_owned(), token.clone()),
            (CREATE_SESSION.to_owned(), token),
        ]
    );
}

#[tokio::test]
async fn a_refused_token_is_exchanged_once_and_the_call_repeated() {
    let mock = Mock::with_config(json!({ "pjwt_auth_enabled": true })).await;
    let client = builder(&mock.base_url()).build().unwrap();
    client.config().await.unwrap();
    mock.forget();
    let refused = refusal(401, "old").header("www-authenticate", "Bearer error=\"invalid_token\"");
    mock.script(CREATE_SESSION, [refused.clone()]);
    mock.script(AUTH_TOKEN, [reply(200, &json!({ "jwt": "eyJh.e30.new" }))]);

    client.create_session(&create_session()).await.unwrap();

    let keys: Vec<_> = mock
        .seen_at(CREATE_SESSION)
        .iter()
        .map(|s| s.header("x-api-key").unwrap().to_owned())
        .collect();
    assert_eq!(keys, ["eyJh.e30.x", "eyJh.e30.new"]);

    mock.script(CREATE_SESSION, vec![refused; 2]);
    let error = client.create_session(&create_session()).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Unauthenticated);
}

#[test]
fn malformed_settings_are_refused_before_anything_is_sent() {
    let refused = |base_url: &str| builder(base_url).build().unwrap_err().to_string();

    assert!(
        refused("127.0.0.1:8000").contains("base URL"),
        "{}",
        refused("127.0.0.1:8000")
    );
    assert!(refused("ftp://host").contains("must start with http"));
    let keyless = Client::builder("http://127.0.0.1:1").build().unwrap_err();
    assert_eq!(*keyless.kind(), ErrorKind::Unauthenticated);
    assert_eq!(
        keyless.to_string(),
        "no API key was given for http://127.0.0.1:1"
    );
    let header = builder("http://127.0.0.1:1")
        .header("a b", "c")
        .build()
        .unwrap_err();
    assert_eq!(header.to_string(), "header \"a b\" is malformed");
}
