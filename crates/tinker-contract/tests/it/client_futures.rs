//! Waiting for results: every answer that a server may give to `retrieve_future`.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tinker_contract::mock::{
    Mock, Reply, empty, failed, json as reply, lost_connection, metadata_only, refusal, try_again,
};
use tinker_http::{ErrorKind, Event, PollPolicy, Resolved, Result};
use tinker_types::{
    AdamParams, ErrorCategory, FailedFuture, ForwardBackwardRequest, LossFn, OPTIM_STEP,
    OptimStepRequest, OptimStepResponse, OptimStepTag, QueueState, RETRIEVE_FUTURE, RequestId,
};

use crate::support::{Rig, ms, poll_policy, until};

type Outcome = Result<Resolved<OptimStepResponse>>;

fn optim_step() -> OptimStepRequest {
    OptimStepRequest {
        model_id: "S1:train:0".parse().unwrap(),
        seq_id: 1,
        adam_params: Some(AdamParams::default()),
        optimizer_params: None,
        tag: OptimStepTag,
    }
}

impl Rig {
    async fn submit(&self) -> RequestId {
        self.client
            .optim_step(&optim_step())
            .await
            .unwrap()
            .request_id
    }

    /// Submits a step and waits for it while the server answers `replies` first.
    async fn poll(&self, replies: impl IntoIterator<Item = Reply>) -> Outcome {
        let id = self.submit().await;
        self.mock.script(RETRIEVE_FUTURE, replies);
        self.client.retrieve_optim_step(&id, None).await
    }

    fn n_polls(&self) -> usize {
        self.mock.seen_at(RETRIEVE_FUTURE).len()
    }

    /// State and reason of the queue, each time the client told a change.
    fn queue(&self) -> Vec<(QueueState, Option<String>)> {
        let queue = self
            .events
            .all()
            .into_iter()
            .filter_map(|event| match event {
                Event::Queue { state, reason, .. } => Some((state, reason)),
                _ => None,
            });
        queue.collect()
    }
}

/// The step is done after these answers, with one request for each and one for the result.
async fn check_done(replies: Vec<Reply>) -> Rig {
    let rig = Rig::start().await;
    let n = replies.len();

    let outcome = rig.poll(replies).await;

    let Resolved::Ready(step) = outcome.unwrap() else {
        panic!("the step failed")
    };
    assert_eq!(step.metrics.unwrap()["grad_norm"], 0.5);
    assert_eq!(rig.n_polls(), n + 1);
    rig
}

/// Waiting ends at the last of these answers, with this kind of error.
async fn check_refused(replies: Vec<Reply>, kind: ErrorKind) -> String {
    let rig = Rig::start().await;
    let n = replies.len();

    let error = rig.poll(replies).await.unwrap_err();

    assert_eq!(*error.kind(), kind, "{error}");
    assert_eq!(rig.n_polls(), n);
    error.to_string()
}

/// The step failed, after one answer.
async fn check_failed(answer: Reply, error: &str, category: ErrorCategory) {
    let rig = Rig::start().await;

    let outcome = rig.poll([answer]).await.unwrap();

    assert_eq!(
        outcome,
        Resolved::Failed(FailedFuture {
            error: error.into(),
            category
        })
    );
    assert_eq!(rig.n_polls(), 1);
}

fn paused(reason: &str) -> Value {
    json!({ "queue_state": "paused_rate_limit", "queue_state_reason": reason })
}

#[tokio::test]
async fn a_finished_future_takes_one_request() {
    check_done(vec![]).await;
}

#[tokio::test]
async fn not_yet_is_asked_again() {
    check_done(vec![try_again(
        200,
        json!({ "request_id": "r", "queue_state": "active" }),
    )])
    .await;
}

#[tokio::test]
async fn not_yet_by_status_408_is_asked_again() {
    check_done(vec![try_again(408, json!({})); 3]).await;
}

#[tokio::test]
async fn not_yet_without_any_detail_is_asked_again() {
    check_done(vec![
        try_again(200, json!({})),
        empty(408),
        refusal(408, "busy"),
    ])
    .await;
}

#[tokio::test]
async fn server_errors_are_waited_out() {
    check_done(vec![
        refusal(500, "a"),
        refusal(502, "b"),
        empty(503),
        refusal(504, "d"),
    ])
    .await;
}

#[tokio::test]
async fn not_yet_and_server_errors_may_alternate() {
    let not_yet = || try_again(408, json!({}));
    check_done(vec![
        not_yet(),
        refusal(500, "a"),
        not_yet(),
        refusal(503, "b"),
        not_yet(),
    ])
    .await;
}

#[tokio::test]
async fn throttled_polls_back_off_and_continue() {
    check_done(vec![refusal(429, "slow"); 5]).await;
}

#[tokio::test]
async fn a_throttled_poll_waits_as_long_as_the_server_asks() {
    let rig = check_done(vec![refusal(429, "slow").header("retry-after-ms", "40")]).await;

    let polls = rig.mock.seen_at(RETRIEVE_FUTURE);
    assert!(polls[1].at - polls[0].at >= ms(40));
}

#[tokio::test]
async fn a_broken_connection_is_tried_again_and_told() {
    let rig = check_done(vec![lost_connection()]).await;

    let events = rig.events.all();
    assert!(matches!(events[0], Event::ServerLost { .. }), "{events:?}");
    assert!(matches!(events[1], Event::ServerBack { .. }), "{events:?}");
}

#[tokio::test]
async fn empty_400s_of_proxies_are_tolerated_twice() {
    check_done(vec![empty(400), empty(400)]).await;
}

#[tokio::test]
async fn the_fourth_empty_400_in_a_row_ends_the_wait() {
    check_refused(vec![empty(400); 4], ErrorKind::InvalidRequest).await;
}

#[tokio::test]
async fn not_yet_between_empty_400s_resets_their_count() {
    let mut replies = vec![empty(400), try_again(408, json!({}))];
    replies.extend(vec![empty(400); 3]);
    check_done(replies).await;
}

#[tokio::test]
async fn a_400_with_a_reason_ends_the_wait_at_once() {
    let text = check_refused(vec![refusal(400, "bad seq")], ErrorKind::InvalidRequest).await;

    assert!(
        text.starts_with("bad seq (POST /api/v1/retrieve_future: 400, request id optim_step-1")
    );
}

#[tokio::test]
async fn final_statuses_end_the_wait_at_once() {
    for (status, kind) in [
        (401, ErrorKind::Unauthenticated),
        (403, ErrorKind::PermissionDenied),
        (404, ErrorKind::NotFound),
        (422, ErrorKind::InvalidRequest),
    ] {
        check_refused(vec![refusal(status, "no")], kind).await;
    }
}

#[tokio::test]
async fn a_forgotten_future_has_expired() {
    check_refused(vec![refusal(410, "gone")], ErrorKind::Expired).await;
}

#[tokio::test]
async fn an_unsettled_bill_ends_the_wait_when_its_pause_is_over() {
    check_refused(vec![refusal(402, "pay")], ErrorKind::BillingPaused).await;
}

#[tokio::test]
async fn a_server_that_stays_broken_is_given_up() {
    let rig = Rig::with(|builder| {
        builder.poll_policy(PollPolicy {
            outage_timeout: ms(20),
            ..poll_policy()
        })
    })
    .await;

    let error = rig.poll(vec![refusal(503, "down"); 200]).await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Server);
    assert!((2..100).contains(&rig.n_polls()), "{} polls", rig.n_polls());
}

#[tokio::test]
async fn a_failure_of_the_user_keeps_its_text() {
    check_failed(
        failed("bad datum", "user"),
        "bad datum",
        ErrorCategory::User,
    )
    .await;
}

#[tokio::test]
async fn a_failure_of_the_server_is_not_polled_for_ever() {
    check_failed(failed("boom", "server"), "boom", ErrorCategory::Server).await;
}

#[tokio::test]
async fn a_failure_of_another_category_is_still_a_failure() {
    let weird = ErrorCategory::Unknown("weird".into());
    check_failed(failed("boom", "weird"), "boom", weird).await;
}

#[tokio::test]
async fn a_failure_needs_no_category() {
    let unknown = ErrorCategory::Unknown("unknown".into());
    check_failed(reply(200, &json!({ "error": "boom" })), "boom", unknown).await;
}

#[tokio::test]
async fn results_are_recognised_by_what_was_asked_not_by_their_fields() {
    for bare in [
        json!({ "metrics": null }),
        json!({ "type": "optim_step" }),
        json!({}),
    ] {
        let rig = Rig::start().await;

        let outcome = rig.poll([reply(200, &bare)]).await.unwrap();

        assert_eq!(
            outcome,
            Resolved::Ready(OptimStepResponse { metrics: None }),
            "{bare}"
        );
    }
}

#[tokio::test]
async fn a_result_in_json_of_an_older_server_is_read() {
    let rig = Rig::start().await;
    let id = rig.submit().await;
    let output = json!({
        "loss_fn_output_type": "TorchLossReturn",
        "loss_fn_outputs": [{ "logprobs": { "data": [-1.5], "dtype": "float32", "shape": [1] } }],
        "metrics": { "loss:sum": 1.5 },
    });
    rig.mock.script(RETRIEVE_FUTURE, [reply(200, &output)]);

    let outcome = rig
        .client
        .retrieve_forward_backward(&id, None)
        .await
        .unwrap();

    let Resolved::Ready(output) = outcome else {
        panic!("failed")
    };
    assert_eq!(
        output.loss_fn_outputs[0]["logprobs"].as_floats().unwrap(),
        [-1.5]
    );
}

#[tokio::test]
async fn a_body_that_is_not_json_names_status_and_type() {
    let html = wiremock::ResponseTemplate::new(200).set_body_raw("<html>", "text/html");
    let text = check_refused(vec![html.into()], ErrorKind::Decode).await;

    assert!(text.contains("text/html"), "{text}");
}

#[tokio::test]
async fn a_large_result_is_announced_and_then_fetched() {
    let rig = check_done(vec![metadata_only("optim_step-1", 512)]).await;

    let allowed: Vec<Value> = rig
        .mock
        .seen_at(RETRIEVE_FUTURE)
        .iter()
        .map(|seen| seen.json()["allow_metadata_only"].clone())
        .collect();
    assert_eq!(allowed, [json!(true), json!(false)]);
}

#[tokio::test]
async fn a_result_announced_twice_is_an_error_not_a_loop() {
    let text = check_refused(vec![metadata_only("r", 5); 2], ErrorKind::Decode).await;

    assert!(
        text.contains("announced the size of a result twice"),
        "{text}"
    );
}

#[tokio::test]
async fn the_queue_is_told_with_its_reason() {
    let rig = check_done(vec![try_again(200, paused("server throttle"))]).await;

    assert_eq!(
        rig.queue(),
        [(QueueState::PausedRateLimit, Some("server throttle".into()))]
    );
}

#[tokio::test]
async fn the_queue_of_a_408_is_told() {
    let body = json!({ "queue_state": "paused_capacity", "queue_state_reason": "full" });
    let rig = check_done(vec![try_again(408, body)]).await;

    assert_eq!(
        rig.queue(),
        [(QueueState::PausedCapacity, Some("full".into()))]
    );
}

#[tokio::test]
async fn an_unchanged_queue_is_told_once() {
    let rig = check_done(vec![try_again(200, paused("a")); 3]).await;

    assert_eq!(rig.queue().len(), 1);
}

#[tokio::test]
async fn a_new_reason_is_told_again() {
    let answers = ["a", "b", "b", "a"].map(|reason| try_again(200, paused(reason)));
    let rig = check_done(answers.into()).await;

    let reasons: Vec<_> = rig
        .queue()
        .into_iter()
        .filter_map(|(_, reason)| reason)
        .collect();
    assert_eq!(reasons, ["a", "b", "a"]);
}

#[tokio::test]
async fn an_unknown_queue_state_is_told_and_polling_goes_on() {
    let rig = check_done(vec![try_again(200, json!({ "queue_state": "warming_up" }))]).await;

    assert_eq!(
        rig.queue(),
        [(QueueState::Unknown("warming_up".into()), None)]
    );
}

#[tokio::test]
async fn queue_states_are_read_in_any_case() {
    let rig = check_done(vec![try_again(
        408,
        json!({ "queue_state": "PAUSED_CAPACITY" }),
    )])
    .await;

    assert_eq!(rig.queue(), [(QueueState::PausedCapacity, None)]);
}

#[tokio::test]
async fn a_panicking_observer_does_not_stop_polling() {
    let rig = Rig::with(|builder| builder.observer(|_| panic!("observer"))).await;

    let outcome = rig.poll([try_again(200, paused("a"))]).await;

    assert!(matches!(outcome, Ok(Resolved::Ready(_))), "{outcome:?}");
}

#[tokio::test]
async fn servers_that_do_not_hold_the_request_are_asked_at_a_steady_pace() {
    let rig = Rig::with(|builder| {
        builder.poll_policy(PollPolicy {
            min_interval: ms(5),
            ..poll_policy()
        })
    })
    .await;

    let outcome = rig
        .poll(vec![try_again(200, json!({ "queue_state": "active" })); 20])
        .await;

    assert!(outcome.is_ok());
    let polls = rig.mock.seen_at(RETRIEVE_FUTURE);
    let total = polls[20].at - polls[0].at;
    // Neither a spin nor a growing delay: doubling from 5 ms would take minutes.
    assert!(
        (ms(95)..Duration::from_secs(5)).contains(&total),
        "{total:?}"
    );
}

#[tokio::test]
async fn a_caller_in_a_hurry_leaves_and_polling_stops() {
    let rig = Rig::start().await;
    let id = rig.submit().await;
    rig.mock
        .answer(RETRIEVE_FUTURE, |_| Some(try_again(408, json!({}))));

    tokio::select! {
        waited = rig.client.retrieve_optim_step(&id, None) => panic!("{waited:?}"),
        () = until(|| rig.n_polls() > 1) => {}
    }

    let n = rig.n_polls();
    // Other calls are the clock: in their time a living loop would have polled on.
    for _ in 0..30 {
        rig.client.healthz().await.unwrap();
    }
    assert!(rig.n_polls() <= n + 1, "{} polls after {n}", rig.n_polls());
}

#[tokio::test]
async fn many_futures_are_awaited_in_any_order() {
    let rig = Rig::start().await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(rig.submit().await);
    }
    rig.mock.answer(RETRIEVE_FUTURE, |seen| {
        (seen.json()["request_id"] == "optim_step-7").then(|| failed("seven", "user"))
    });

    let mut failures = Vec::new();
    for id in ids.iter().rev() {
        if let Resolved::Failed(failure) = rig.client.retrieve_optim_step(id, None).await.unwrap() {
            failures.push((id.to_string(), failure.error));
        }
    }

    assert_eq!(failures, [("optim_step-7".to_owned(), "seven".to_owned())]);
}

#[tokio::test]
async fn concurrent_waits_do_not_wait_for_each_other() {
    let rig = Rig::start().await;
    let slow = rig.submit().await;
    let fast = rig.submit().await;
    let slow_id = slow.to_string();
    rig.mock.answer(RETRIEVE_FUTURE, move |seen| {
        (seen.json()["request_id"] == slow_id.as_str()).then(|| try_again(408, json!({})))
    });
    let client = rig.client.clone();
    let waiting = tokio::spawn(async move { client.retrieve_optim_step(&slow, None).await });

    let outcome = rig.client.retrieve_optim_step(&fast, None).await;

    assert!(matches!(outcome, Ok(Resolved::Ready(_))));
    assert!(!waiting.is_finished());
    waiting.abort();
}

#[tokio::test]
async fn polls_are_numbered_and_say_what_they_wait_for() {
    let rig = Rig::start().await;
    let id = rig.submit().await;
    rig.mock
        .script(RETRIEVE_FUTURE, vec![try_again(408, json!({})); 2]);

    let outcome = rig.client.retrieve_optim_step(&id, Some(ms(250))).await;

    assert!(outcome.is_ok());
    let polls = rig.mock.seen_at(RETRIEVE_FUTURE);
    let header = |name| polls.iter().map(|p| p.header(name)).collect::<Vec<_>>();
    assert_eq!(
        header("x-tinker-request-iteration"),
        [Some("0"), Some("1"), Some("2")]
    );
    assert_eq!(header("x-tinker-request-type"), [Some("OptimStep"); 3]);
    assert_eq!(
        header("x-tinker-create-promise-roundtrip-time"),
        [Some("0.25"), None, None]
    );
    assert_eq!(header("accept"), [Some("application/json"); 3]);
}

#[tokio::test]
async fn results_that_come_in_protobuf_are_asked_for_in_protobuf() {
    let rig = Rig::start().await;
    let request = ForwardBackwardRequest {
        model_id: "S1:train:0".parse().unwrap(),
        seq_id: 1,
        data: vec![],
        loss_fn: LossFn::CrossEntropy,
        loss_fn_config: Default::default(),
        forward_only: true,
    };
    let id = rig
        .client
        .forward_backward(request)
        .await
        .unwrap()
        .request_id;

    let outcome = rig.client.retrieve_forward(&id, None).await.unwrap();

    assert!(matches!(outcome, Resolved::Ready(output) if output.metrics["loss:sum"] == 0.0));
    let polls = rig.mock.seen_at(RETRIEVE_FUTURE);
    assert_eq!(polls[0].header("accept"), Some("application/x-protobuf"));
    assert_eq!(polls[0].header("x-tinker-request-type"), Some("Forward"));
}

#[tokio::test]
async fn large_results_share_a_budget_of_bytes() {
    let config = json!({ "inflight_response_bytes_semaphore_size": 100 });
    let mock = Arc::new(Mock::with_config(config).await);
    let client = crate::support::builder(&mock.base_url()).build().unwrap();
    let first = client.optim_step(&optim_step()).await.unwrap().request_id;
    let second = client.optim_step(&optim_step()).await.unwrap().request_id;
    // Each result is announced with more than the whole budget, so only one can be under way: its
    // fetch is held until the other future was announced as well.
    mock.answer(RETRIEVE_FUTURE, |seen| {
        let body = seen.json();
        (body["allow_metadata_only"] == true)
            .then(|| metadata_only(body["request_id"].as_str().unwrap(), 1000))
    });

    let (a, b) = tokio::join!(
        client.retrieve_optim_step(&first, None),
        client.retrieve_optim_step(&second, None),
    );

    assert!(matches!(
        (a, b),
        (Ok(Resolved::Ready(_)), Ok(Resolved::Ready(_)))
    ));
    assert_eq!(mock.seen_at(OPTIM_STEP).len(), 2);
    assert_eq!(mock.seen_at(RETRIEVE_FUTURE).len(), 4);
}
