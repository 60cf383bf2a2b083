//! Opening sessions, keeping them alive, ending them, and following the server's settings.

use std::time::Duration;

use serde_json::{Value, json};
use tinker_api::{
    ErrorKind, Event, FinishReason, LoraConfig, LossFn, ModelInput, SampleOptions, SamplingParams,
    SamplingSource, ServiceClient,
};
use tinker_contract::mock::{Mock, Reply, json as reply, lost_connection, refusal};
use tinker_types::{
    ASAMPLE, CLIENT_CONFIG, CREATE_SESSION, DYNAMIC_CONFIG, FORWARD_BACKWARD, SESSION_HEARTBEAT,
};

use crate::support::{Events, KEY, datum, ms, service, until};

/// A client whose heart beats every few milliseconds, with its session open.
async fn beating(mock: &Mock) -> ServiceClient {
    let service = service(&mock.base_url(), KEY)
        .heartbeat_interval(ms(2))
        .build()
        .unwrap();
    service.session_id().await.unwrap();
    service
}

/// Gives every session an id of its own: `S0`, `S1`, …
fn number_sessions(mock: &Mock) {
    let mut n = 0;
    mock.answer(CREATE_SESSION, move |_| {
        n += 1;
        Some(reply(200, &json!({ "session_id": format!("S{}", n - 1) })))
    });
}

fn n_beats(mock: &Mock, session: &str) -> usize {
    let beats = mock.seen_at(SESSION_HEARTBEAT);
    beats
        .iter()
        .filter(|seen| seen.json()["session_id"] == session)
        .count()
}

/// The session's heart goes on beating after these answers.
async fn check_beats_on(replies: Vec<Reply>) {
    let mock = Mock::start().await;
    let n = replies.len();
    mock.script(SESSION_HEARTBEAT, replies);
    let _service = beating(&mock).await;

    until(|| n_beats(&mock, "S1") > n + 3).await;
}

// Heartbeats.

#[tokio::test]
async fn a_heartbeat_names_its_session() {
    let mock = Mock::start().await;
    let _service = beating(&mock).await;

    until(|| n_beats(&mock, "S1") > 0).await;

    let beat = &mock.seen_at(SESSION_HEARTBEAT)[0];
    assert_eq!(
        beat.json(),
        json!({ "session_id": "S1", "type": "session_heartbeat" })
    );
    assert_eq!(beat.method, "POST");
}

#[tokio::test]
async fn heartbeats_go_on_after_a_401() {
    check_beats_on(vec![refusal(401, "not now"); 3]).await;
}

#[tokio::test]
async fn heartbeats_go_on_after_server_errors() {
    check_beats_on(vec![
        refusal(500, "a"),
        refusal(503, "b"),
        refusal(429, "c"),
    ])
    .await;
}

#[tokio::test]
async fn heartbeats_go_on_after_a_404() {
    check_beats_on(vec![refusal(404, "no such session")]).await;
}

#[tokio::test]
async fn heartbeats_go_on_after_lost_connections() {
    check_beats_on(vec![lost_connection(), lost_connection()]).await;
}

#[tokio::test]
async fn a_failed_heartbeat_is_not_repeated_before_its_time() {
    let mock = Mock::start().await;
    mock.script(SESSION_HEARTBEAT, vec![refusal(503, "busy"); 3]);
    let _service = beating(&mock).await;

    until(|| n_beats(&mock, "S1") > 3).await;

    let beats = mock.seen_at(SESSION_HEARTBEAT);
    let repeated =
        |seen: &&tinker_contract::mock::Seen| seen.header("x-stainless-retry-count") != Some("0");
    assert_eq!(beats.iter().filter(repeated).count(), 0);
}

#[tokio::test]
async fn a_session_that_is_over_is_left_in_peace() {
    let mock = Mock::start().await;
    number_sessions(&mock);
    mock.answer(SESSION_HEARTBEAT, |seen| {
        (seen.json()["session_id"] == "S0").then(|| refusal(410, "over"))
    });
    let (_over, _alive) = (beating(&mock).await, beating(&mock).await);

    until(|| n_beats(&mock, "S1") > 10).await;

    assert_eq!(n_beats(&mock, "S0"), 1);
}

#[tokio::test]
async fn the_heart_stops_with_the_last_client() {
    let mock = Mock::start().await;
    number_sessions(&mock);
    let gone = beating(&mock).await;
    let clone = gone.clone();
    drop(gone);
    until(|| n_beats(&mock, "S0") > 2).await;

    drop(clone);
    let _alive = beating(&mock).await;
    let before = n_beats(&mock, "S0");
    until(|| n_beats(&mock, "S1") > 10).await;

    // One may have been on its way.
    assert!(n_beats(&mock, "S0") <= before + 1);
}

#[tokio::test]
async fn a_training_client_alone_keeps_the_session_alive() {
    let mock = Mock::start().await;
    let service = beating(&mock).await;
    let trainer = service
        .create_lora_training_client("test/base", LoraConfig::default())
        .await
        .unwrap();

    drop(service);
    let before = n_beats(&mock, "S1");
    until(|| n_beats(&mock, "S1") > before + 3).await;

    assert_eq!(trainer.training_run_id().as_str(), "S1:train:0");
}

#[tokio::test]
async fn one_slow_session_does_not_hold_up_the_hearts_of_others() {
    let (slow, quick) = (Mock::start().await, Mock::start().await);
    let stalled = reply(200, &json!({})).map(|t| t.set_delay(Duration::from_secs(8)));
    slow.script(SESSION_HEARTBEAT, [stalled]);
    let _first = beating(&slow).await;
    let _others = (beating(&quick).await, beating(&quick).await);
    until(|| n_beats(&slow, "S1") == 1).await;

    until(|| n_beats(&quick, "S1") > 20).await;

    assert_eq!(n_beats(&slow, "S1"), 1, "it waits for its answer");
}

#[tokio::test]
async fn hearts_beat_while_a_poll_is_held() {
    let mock = Mock::start().await;
    let service = beating(&mock).await;
    let held = reply(200, &json!({})).map(|t| t.set_delay(Duration::from_secs(8)));
    mock.script(tinker_types::RETRIEVE_FUTURE, [held]);
    let creation = tokio::spawn({
        let service = service.clone();
        async move {
            service
                .create_lora_training_client("test/base", LoraConfig::default())
                .await
        }
    });
    until(|| !mock.seen_at(tinker_types::RETRIEVE_FUTURE).is_empty()).await;
    let before = n_beats(&mock, "S1");

    until(|| n_beats(&mock, "S1") > before + 10).await;

    assert!(!creation.is_finished());
    creation.abort();
}

#[tokio::test]
async fn a_finished_session_has_no_heart() {
    let mock = Mock::start().await;
    number_sessions(&mock);
    let finished = beating(&mock).await;
    until(|| n_beats(&mock, "S0") > 0).await;

    finished.close(FinishReason::Success, None).await.unwrap();
    let before = n_beats(&mock, "S0");
    let _alive = beating(&mock).await;
    until(|| n_beats(&mock, "S1") > 10).await;

    assert!(n_beats(&mock, "S0") <= before + 1);
}

// Opening and ending.

#[tokio::test]
async fn a_servers_messages_do_not_stop_a_session() {
    let mock = Mock::start().await;
    let answer = json!({
        "session_id": "S9", "info_message": "hello", "warning_message": "old",
        "error_message": "very old", "unknown": [1, 2],
    });
    mock.script(CREATE_SESSION, [reply(200, &answer)]);
    let service = service(&mock.base_url(), KEY).build().unwrap();

    assert_eq!(service.session_id().await.unwrap().as_str(), "S9");
}

#[tokio::test]
async fn every_reason_to_finish_is_told_with_its_detail() {
    for (reason, text) in [
        (FinishReason::Success, "success"),
        (FinishReason::Errored, "errored"),
        (FinishReason::Interrupted, "interrupted"),
    ] {
        let mock = Mock::start().await;
        let service = service(&mock.base_url(), KEY).build().unwrap();
        service.session_id().await.unwrap();

        service.close(reason, Some("why".into())).await.unwrap();

        assert_eq!(
            mock.seen_at("/api/v1/sessions/S1/finish")[0].json(),
            json!({ "reason": { "type": text }, "detail": "why" })
        );
    }
}

#[tokio::test]
async fn a_session_that_could_not_be_opened_is_opened_by_the_next_call() {
    let mock = Mock::start().await;
    mock.script(CREATE_SESSION, [refusal(403, "not yet")]);
    let service = service(&mock.base_url(), KEY).build().unwrap();

    let refused = service.session_id().await.unwrap_err();
    let opened = service.session_id().await.unwrap();

    assert_eq!(refused.kind(), Some(&ErrorKind::PermissionDenied));
    assert_eq!(opened.as_str(), "S1");
}

#[tokio::test]
async fn clones_open_one_session_between_them() {
    let mock = Mock::start().await;
    let service = service(&mock.base_url(), KEY).build().unwrap();
    let clones: Vec<_> = (0..10).map(|_| service.clone()).collect();

    let ids = futures_util::future::join_all(clones.iter().map(ServiceClient::session_id)).await;

    assert!(ids.into_iter().all(|id| id.unwrap().as_str() == "S1"));
    assert_eq!(mock.seen_at(CREATE_SESSION).len(), 1);
}

// Settings.

#[tokio::test]
async fn a_start_that_meets_trouble_is_repeated() {
    let mock = Mock::start().await;
    mock.script(
        CLIENT_CONFIG,
        [
            refusal(503, "starting"),
            lost_connection(),
            refusal(429, "slow"),
        ],
    );
    let service = service(&mock.base_url(), KEY).build().unwrap();

    service.session_id().await.unwrap();

    assert_eq!(mock.seen_at(CLIENT_CONFIG).len(), 4);
}

#[tokio::test]
async fn a_start_that_was_refused_is_tried_again_by_the_next_call() {
    let mock = Mock::start().await;
    mock.script(CLIENT_CONFIG, [refusal(401, "unknown key")]);
    let service = service(&mock.base_url(), KEY).build().unwrap();

    let refused = service.get_server_capabilities().await.unwrap_err();
    let models = service.get_server_capabilities().await.unwrap();

    assert_eq!(refused.kind(), Some(&ErrorKind::Unauthenticated));
    assert_eq!(models.supported_models.len(), 1);
}

#[tokio::test]
async fn the_start_tells_the_version_of_the_protocol() {
    let mock = Mock::start().await;
    let service = service(&mock.base_url(), KEY).build().unwrap();

    service.session_id().await.unwrap();

    for path in [CLIENT_CONFIG, DYNAMIC_CONFIG] {
        assert_eq!(
            mock.seen_at(path)[0].json(),
            json!({ "sdk_version": "0.38.0" }),
            "{path}"
        );
    }
}

#[tokio::test]
async fn settings_of_tomorrow_are_ignored() {
    let mock = Mock::with_config(json!({
        "a_flag_of_tomorrow": true, "nested": { "x": [1] }, "fwdbwd_max_chunk_len": 2,
    }))
    .await;

    assert_eq!(n_requests(&mock, 3).await, 2, "two data and one");
}

#[tokio::test]
async fn a_broken_refresh_of_settings_changes_nothing() {
    let mock = Mock::start().await;
    mock.script(DYNAMIC_CONFIG, [refusal(500, "broken")]);
    let service = service(&mock.base_url(), KEY).build().unwrap();

    service.session_id().await.unwrap();

    assert_eq!(mock.seen_at(DYNAMIC_CONFIG).len(), 1, "one attempt");
}

/// How many requests this many data travel in.
async fn n_requests(mock: &Mock, n_data: u32) -> usize {
    let trainer = crate::support::trainer(mock).await;
    let data = (1..=n_data).map(|i| datum(i, 4)).collect();
    let output = trainer.forward(data, LossFn::CrossEntropy).await.unwrap();
    assert_eq!(output.loss_fn_outputs.len(), n_data as usize);
    mock.seen_at(FORWARD_BACKWARD).len()
}

#[tokio::test]
async fn the_server_says_how_many_data_a_request_holds() {
    let mock = Mock::with_config(json!({ "fwdbwd_max_chunk_len": 3 })).await;

    assert_eq!(n_requests(&mock, 7).await, 3);
}

#[tokio::test]
async fn the_server_says_how_many_bytes_a_request_holds() {
    // A datum of four tokens counts 64 bytes.
    let mock = Mock::with_config(json!({ "fwdbwd_max_chunk_bytes_count": 128 })).await;

    assert_eq!(n_requests(&mock, 7).await, 4);
}

#[tokio::test]
async fn limits_of_zero_send_one_datum_at_a_time() {
    for limits in [
        json!({ "fwdbwd_max_chunk_len": 0 }),
        json!({ "fwdbwd_max_chunk_bytes_count": 0 }),
    ] {
        let mock = Mock::with_config(limits).await;

        assert_eq!(n_requests(&mock, 3).await, 3);
    }
}

#[tokio::test]
async fn budgets_of_one_byte_slow_down_and_do_not_stop() {
    let mock = Mock::with_config(json!({
        "sample_dispatch_bytes_semaphore_size": 1, "inflight_response_bytes_semaphore_size": 1,
        "fwdbwd_dispatch_bytes_semaphore_size": 1, "sample_max_concurrent_requests": 1,
        "fwdbwd_max_chunk_len": 1,
    }))
    .await;
    assert_eq!(n_requests(&mock, 4).await, 4);

    assert_eq!(n_samples(&mock, 5).await, 5);
}

/// Samples at once; how many submissions they took.
async fn n_samples(mock: &Mock, n: usize) -> usize {
    let service = service(&mock.base_url(), KEY).build().unwrap();
    let source = SamplingSource::BaseModel("test/base".into());
    let sampler = service.create_sampling_client(source).await.unwrap();
    let params = SamplingParams {
        max_tokens: Some(3),
        ..SamplingParams::default()
    };
    let samples = (0..n).map(|_| {
        sampler.sample(
            ModelInput::from_tokens(vec![5; 4]),
            params.clone(),
            SampleOptions::default(),
        )
    });
    for sample in futures_util::future::join_all(samples).await {
        sample.unwrap();
    }
    mock.seen_at(ASAMPLE).len()
}

#[tokio::test]
async fn no_sample_at_once_means_one_at_a_time() {
    let mock = Mock::with_config(json!({ "sample_max_concurrent_requests": 0 })).await;

    assert_eq!(n_samples(&mock, 3).await, 3);
}

#[tokio::test]
async fn settings_that_are_no_settings_are_a_clear_error() {
    for body in [
        Value::Null,
        json!([1]),
        json!({ "fwdbwd_max_chunk_len": "many" }),
    ] {
        let mock = Mock::with_config(body).await;
        let service = service(&mock.base_url(), KEY).build().unwrap();

        let error = service.session_id().await.unwrap_err();

        assert_eq!(error.kind(), Some(&ErrorKind::Decode), "{error}");
        assert!(error.to_string().contains(CLIENT_CONFIG), "{error}");
    }
}

#[tokio::test]
async fn a_lost_server_and_its_return_are_told() {
    let mock = Mock::start().await;
    let events = Events::default();
    let service = service(&mock.base_url(), KEY)
        .observer(events.observe())
        .build()
        .unwrap();
    mock.script(CREATE_SESSION, [lost_connection()]);

    service.session_id().await.unwrap();

    let all = events.all();
    let lost = all
        .iter()
        .position(|event| matches!(event, Event::ServerLost { .. }));
    let back = all
        .iter()
        .position(|event| matches!(event, Event::ServerBack { .. }));
    assert!(lost.is_some() && lost < back, "{all:?}");
}
