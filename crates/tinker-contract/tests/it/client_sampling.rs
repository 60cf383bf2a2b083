//! Sampling through the library: requests, back-pressure, forgotten samples, cancellation.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tinker_api::{
    Error, ErrorKind, Event, ModelInput, SampleOptions, SamplingClient, SamplingParams,
    SamplingSource, Stop, TinkerPath,
};
use tinker_contract::mock::{
    Mock, Reply, failed, json as reply, lost_connection, proto, refusal, sample_response, try_again,
};
use tinker_types::{ASAMPLE, CANCEL_FUTURE, RETRIEVE_FUTURE, proto as pb};

use crate::support::{Events, KEY, ms, service, until};

struct Rig {
    mock: Mock,
    sampler: SamplingClient,
    events: Events,
}

impl Rig {
    async fn start() -> Self {
        Self::with_config(json!({})).await
    }

    async fn with_config(config: Value) -> Self {
        let mock = Mock::with_config(config).await;
        let events = Events::default();
        let service = service(&mock.base_url(), KEY)
            .observer(events.observe())
            .build()
            .unwrap();
        let source = SamplingSource::BaseModel("test/base".into());
        let sampler = service.create_sampling_client(source).await.unwrap();
        mock.forget();
        Self {
            mock,
            sampler,
            events,
        }
    }

    /// One sample of three tokens while the server answers submissions like this first.
    async fn sample_after(&self, replies: impl IntoIterator<Item = Reply>) -> Result<(), Error> {
        self.mock.script(ASAMPLE, replies);
        let response = self
            .sampler
            .sample(prompt(2), params(), SampleOptions::default())
            .await?;
        assert_eq!(response.sequences[0].tokens, [1, 2, 3]);
        Ok(())
    }

    fn numbers(&self) -> Vec<u64> {
        self.mock
            .seen_at(ASAMPLE)
            .iter()
            .map(|seen| seen.seq_id())
            .collect()
    }
}

/// The pauses that the client told.
fn pauses(events: &Events) -> Vec<Duration> {
    let all = events.all().into_iter();
    all.filter_map(|event| match event {
        Event::SamplingPaused { wait, .. } => Some(wait),
        _ => None,
    })
    .collect()
}

fn prompt(n: usize) -> ModelInput {
    ModelInput::from_tokens(vec![5; n])
}

fn params() -> SamplingParams {
    SamplingParams {
        max_tokens: Some(3),
        ..SamplingParams::default()
    }
}

#[tokio::test]
async fn a_sample_is_asked_for_as_the_official_client_does() {
    let rig = Rig::start().await;
    let params = SamplingParams {
        max_tokens: Some(3),
        seed: Some(1),
        stop: Some(Stop::Texts(vec!["\n".into()])),
        temperature: 0.7,
        ..SamplingParams::default()
    };

    let options = SampleOptions {
        num_samples: 2,
        ..SampleOptions::default()
    };
    let response = rig
        .sampler
        .sample(prompt(2), params, options)
        .await
        .unwrap();

    assert_eq!(response.sequences.len(), 2);
    let names: Vec<_> = response
        .sequences
        .iter()
        .filter_map(|s| s.sequence_id.as_deref())
        .collect();
    assert_eq!(names, ["0-0", "0-1"]);
    let seen = &rig.mock.seen_at(ASAMPLE)[0];
    assert_eq!(seen.header("x-tinker-sampling-backpressure"), Some("1"));
    assert_eq!(
        seen.json(),
        json!({
            "num_samples": 2,
            "prompt": { "chunks": [{ "type": "encoded_text", "tokens": [5, 5] }] },
            "sampling_params": {
                "max_tokens": 3, "seed": 1, "stop": ["\n"], "temperature": 0.7, "top_k": -1, "top_p": 1.0,
            },
            "sampling_session_id": "S1:sample:0", "seq_id": 0, "prompt_logprobs": false,
            "topk_prompt_logprobs": 0, "topk_sample_logprobs": 0, "prompt_alt_tokens_k": 0,
            "record_stability_info": false, "type": "sample",
        })
    );
    let poll = &rig.mock.seen_at(RETRIEVE_FUTURE)[0];
    assert_eq!(poll.header("accept"), Some("application/x-protobuf"));
    assert_eq!(poll.header("x-tinker-request-type"), Some("Sample"));
}

#[tokio::test]
async fn no_stops_at_all_differ_from_the_usual_ones() {
    let rig = Rig::start().await;
    for stop in [
        None,
        Some(Stop::Tokens(vec![])),
        Some(Stop::Text("x".into())),
        Some(Stop::Tokens(vec![7])),
    ] {
        let params = SamplingParams { stop, ..params() };
        rig.sampler
            .sample(prompt(1), params, SampleOptions::default())
            .await
            .unwrap();
    }

    let seen = rig.mock.seen_at(ASAMPLE);
    let stops: Vec<Value> = seen
        .iter()
        .map(|s| s.json()["sampling_params"]["stop"].clone())
        .collect();
    assert_eq!(stops, [Value::Null, json!([]), json!("x"), json!([7])]);
}

#[tokio::test]
async fn log_probabilities_of_a_prompt_start_with_none() {
    let rig = Rig::start().await;

    let logprobs = rig.sampler.compute_logprobs(prompt(4)).await.unwrap();

    assert_eq!(logprobs, [None, Some(-1.0), Some(-1.0), Some(-1.0)]);
    let body = rig.mock.seen_at(ASAMPLE)[0].json();
    assert_eq!(body["prompt_logprobs"], true);
    assert_eq!(body["sampling_params"]["max_tokens"], 1);
    assert_eq!(body["sampling_params"]["temperature"], 1.0);
}

#[tokio::test]
async fn top_k_tables_are_read_with_their_padding() {
    let rig = Rig::start().await;
    let table = vec![
        None,
        Some(vec![(4, -0.5), (9, -1.5)]),
        Some(vec![(4, -0.25)]),
    ];
    let response = tinker_types::SampleResponse {
        topk_prompt_logprobs: Some(table.clone()),
        ..sample_response(&json!({}))
    };
    rig.mock.script(
        RETRIEVE_FUTURE,
        [proto(&pb::SampleResponse::from(&response))],
    );

    let options = SampleOptions {
        topk_prompt_logprobs: 2,
        ..SampleOptions::default()
    };
    let answer = rig
        .sampler
        .sample(prompt(3), params(), options)
        .await
        .unwrap();

    assert_eq!(answer.topk_prompt_logprobs, Some(table));
    assert_eq!(
        rig.mock.seen_at(ASAMPLE)[0].json()["topk_prompt_logprobs"],
        2
    );
}

#[tokio::test]
async fn top_k_tables_in_json_are_lists_of_pairs() {
    let rig = Rig::start().await;
    let body = json!({
        "sequences": [{ "stop_reason": "stop", "tokens": [1], "logprobs": [-0.5],
                        "topk_logprobs": [[[1, -0.5], [2, -1.0]]] }],
        "prompt_logprobs": [null, -0.25],
        "topk_prompt_logprobs": [null, []],
    });
    rig.mock.script(RETRIEVE_FUTURE, [reply(200, &body)]);

    let answer = rig
        .sampler
        .sample(prompt(2), params(), SampleOptions::default())
        .await
        .unwrap();

    assert_eq!(answer.prompt_logprobs, Some(vec![None, Some(-0.25)]));
    assert_eq!(answer.topk_prompt_logprobs, Some(vec![None, Some(vec![])]));
    assert_eq!(
        answer.sequences[0].topk_logprobs,
        Some(vec![Some(vec![(1, -0.5), (2, -1.0)])])
    );
}

#[tokio::test]
async fn throttled_samples_are_sent_again_under_their_number_after_a_second() {
    let rig = Rig::start().await;

    rig.sample_after([refusal(429, "slow")]).await.unwrap();

    assert_eq!(rig.numbers(), [0, 0]);
    let seen = rig.mock.seen_at(ASAMPLE);
    assert_eq!(seen[0].body, seen[1].body);
    assert!(seen[1].at - seen[0].at >= Duration::from_secs(1));
    assert_eq!(pauses(&rig.events), [Duration::from_secs(1)]);
}

#[tokio::test]
async fn one_throttled_sample_holds_all_of_the_session_back() {
    let rig = Rig::start().await;
    rig.mock.script(ASAMPLE, [refusal(429, "slow")]);

    let first = rig
        .sampler
        .sample(prompt(2), params(), SampleOptions::default());
    // The pause has begun when it is told.
    until(|| !rig.events.all().is_empty()).await;
    let others = (0..20).map(|_| {
        rig.sampler
            .sample(prompt(2), params(), SampleOptions::default())
    });
    let results = join_all(std::iter::once(first).chain(others)).await;

    assert!(results.iter().all(Result::is_ok));
    let seen = rig.mock.seen_at(ASAMPLE);
    assert_eq!(seen.len(), 22);
    assert!(
        seen[1..]
            .iter()
            .all(|s| s.at - seen[0].at >= Duration::from_secs(1))
    );
    let numbers: BTreeSet<u64> = rig.numbers().into_iter().collect();
    assert_eq!(numbers, (0..21).collect());
}

#[tokio::test]
async fn another_client_is_not_held_back() {
    let rig = Rig::start().await;
    rig.mock.script(ASAMPLE, [refusal(429, "slow")]);
    let held = rig
        .sampler
        .sample(prompt(2), params(), SampleOptions::default());
    until(|| !rig.events.all().is_empty()).await;

    let other = service(&rig.mock.base_url(), "tml-other").build().unwrap();
    let source = SamplingSource::BaseModel("test/base".into());
    let other = other.create_sampling_client(source).await.unwrap();
    other
        .sample(prompt(2), params(), SampleOptions::default())
        .await
        .unwrap();

    let seen = rig.mock.seen_at(ASAMPLE);
    assert_eq!(seen.len(), 2, "the held sample has not been sent again yet");
    assert!(seen[1].at - seen[0].at < Duration::from_secs(1));
    held.await.unwrap();
}

#[tokio::test]
async fn large_prompts_pause_for_longer() {
    let rig = Rig::start().await;
    rig.mock.script(ASAMPLE, [refusal(429, "slow")]);

    let sample = rig
        .sampler
        .sample(prompt(20_000), params(), SampleOptions::default());
    until(|| !rig.events.all().is_empty()).await;
    drop(sample);

    assert_eq!(pauses(&rig.events), [Duration::from_secs(5)]);
}

#[tokio::test]
async fn other_troubles_of_a_submission_are_retried_under_its_number() {
    let rig = Rig::start().await;

    let troubles = [
        refusal(500, "a"),
        refusal(409, "b"),
        lost_connection(),
        refusal(408, "c"),
    ];
    rig.sample_after(troubles).await.unwrap();

    assert_eq!(rig.numbers(), [0; 5]);
}

#[tokio::test]
async fn bad_samples_are_reported_at_once() {
    let rig = Rig::start().await;

    let error = rig
        .sample_after([refusal(400, "top_p must be positive")])
        .await
        .unwrap_err();

    assert_eq!(error.kind(), Some(&ErrorKind::InvalidRequest));
    assert!(
        error.to_string().starts_with("top_p must be positive"),
        "{error}"
    );
    assert_eq!(rig.numbers(), [0]);
}

#[tokio::test]
async fn without_retries_the_first_trouble_surfaces() {
    let rig = Rig::with_config(json!({ "sample_no_retries": true })).await;

    let error = rig
        .sample_after([refusal(500, "broken")])
        .await
        .unwrap_err();

    assert_eq!(error.kind(), Some(&ErrorKind::Server));
    assert_eq!(rig.numbers(), [0]);
}

#[tokio::test]
async fn a_forgotten_sample_is_submitted_under_a_number_that_no_call_gets() {
    let rig = Rig::start().await;
    rig.mock
        .script(RETRIEVE_FUTURE, [refusal(410, "forgotten")]);

    rig.sample_after([]).await.unwrap();
    rig.sample_after([]).await.unwrap();

    let numbers = rig.numbers();
    assert_eq!((numbers[0], numbers[2]), (0, 1), "{numbers:?}");
    assert!(numbers[1] > 1_000_000, "{numbers:?}");
}

#[tokio::test]
async fn a_sample_that_is_always_forgotten_is_given_up() {
    let rig = Rig::start().await;
    rig.mock
        .answer(RETRIEVE_FUTURE, |_| Some(refusal(410, "forgotten")));

    let error = rig.sample_after([]).await.unwrap_err();

    assert_eq!(error.kind(), Some(&ErrorKind::Expired));
    assert!((2..50).contains(&rig.numbers().len()));
}

#[tokio::test]
async fn a_failed_sample_is_not_submitted_again() {
    let rig = Rig::start().await;
    rig.mock
        .script(RETRIEVE_FUTURE, [failed("prompt too long", "user")]);

    let error = rig.sample_after([]).await.unwrap_err();

    assert!(error.is_user_error(), "{error}");
    assert_eq!(rig.numbers(), [0]);
}

#[tokio::test]
async fn samples_finish_in_any_order() {
    let rig = Rig::start().await;
    rig.mock.answer(RETRIEVE_FUTURE, {
        let mut n_asked = 0;
        move |seen| {
            // The first sample is done after everything else.
            let is_first = seen.json()["request_id"] == "sample-1";
            n_asked += usize::from(!is_first);
            (is_first && n_asked < 9).then(|| try_again(408, json!({})))
        }
    });

    let samples = (0..10).map(|_| {
        rig.sampler
            .sample(prompt(1), params(), SampleOptions::default())
    });
    let results = join_all(samples).await;

    assert!(results.iter().all(Result::is_ok));
    assert_eq!(rig.numbers().len(), 10);
}

#[tokio::test]
async fn no_more_samples_are_in_flight_than_the_server_allows() {
    let rig = Rig::with_config(json!({ "sample_max_concurrent_requests": 1 })).await;

    let samples = (0..3).map(|_| {
        rig.sampler
            .sample(prompt(1), params(), SampleOptions::default())
    });
    assert!(join_all(samples).await.iter().all(Result::is_ok));

    let order: Vec<String> = rig.mock.seen().into_iter().map(|seen| seen.path).collect();
    assert_eq!(order, [ASAMPLE, RETRIEVE_FUTURE].repeat(3));
}

#[tokio::test]
async fn abandoned_samples_stop_and_are_cancelled_where_servers_want_to_know() {
    let mock = Mock::start().await;
    mock.script(
        "/api/v1/client/dynamic_config",
        [reply(200, &json!({ "sample_cancel_enabled": true }))],
    );
    mock.answer(RETRIEVE_FUTURE, |_| Some(try_again(408, json!({}))));
    let service = service(&mock.base_url(), KEY).build().unwrap();
    let source = SamplingSource::BaseModel("test/base".into());
    let sampler = service.create_sampling_client(source).await.unwrap();

    let sample = sampler.sample(prompt(1), params(), SampleOptions::default());
    until(|| !mock.seen_at(RETRIEVE_FUTURE).is_empty()).await;
    drop(sample);
    until(|| !mock.seen_at(CANCEL_FUTURE).is_empty()).await;

    assert_eq!(
        mock.seen_at(CANCEL_FUTURE)[0].json(),
        json!({ "request_id": "sample-1" })
    );
    let n = mock.seen_at(RETRIEVE_FUTURE).len();
    for _ in 0..20 {
        service.get_server_capabilities().await.unwrap();
    }
    assert!(mock.seen_at(RETRIEVE_FUTURE).len() <= n + 1);
}

#[tokio::test]
async fn samples_in_a_hurry_time_out() {
    let rig = Rig::start().await;
    rig.mock
        .answer(RETRIEVE_FUTURE, |_| Some(try_again(408, json!({}))));

    let sample = rig
        .sampler
        .sample(prompt(1), params(), SampleOptions::default());
    let error = sample.timeout(ms(30)).await.unwrap_err();

    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
}

#[tokio::test]
async fn answers_that_lack_what_was_asked_for_are_errors() {
    let rig = Rig::start().await;
    let one = || proto(&pb::SampleResponse::from(&sample_response(&json!({}))));
    rig.mock.script(RETRIEVE_FUTURE, [one(), one(), one()]);

    let two = SampleOptions {
        num_samples: 2,
        ..SampleOptions::default()
    };
    let error = rig
        .sampler
        .sample(prompt(2), params(), two)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the server returned 1 samples for 2 asked for"
    );
    let alt = SampleOptions {
        prompt_alt_tokens_k: 2,
        ..SampleOptions::default()
    };
    let error = rig
        .sampler
        .sample(prompt(2), params(), alt)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Protocol(_)), "{error}");
    let error = rig.sampler.compute_logprobs(prompt(2)).await.unwrap_err();
    assert!(matches!(error, Error::Protocol(_)), "{error}");
}

#[tokio::test]
async fn samples_that_cannot_be_right_are_refused_here() {
    let rig = Rig::start().await;
    let options = SampleOptions::default;
    let check = async |prompt, params, options, expected: &str| {
        let error = rig
            .sampler
            .sample(prompt, params, options)
            .await
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };

    check(prompt(0), params(), options(), "prompt is empty").await;
    check(
        prompt(1),
        params(),
        SampleOptions {
            num_samples: 0,
            ..options()
        },
        "num_samples is 0",
    )
    .await;
    check(
        prompt(1),
        SamplingParams {
            temperature: -1.0,
            ..params()
        },
        options(),
        "temperature -1",
    )
    .await;
    check(
        prompt(1),
        SamplingParams {
            top_p: 0.0,
            ..params()
        },
        options(),
        "top_p 0",
    )
    .await;
    assert!(rig.mock.seen().is_empty());
}

#[tokio::test]
async fn a_sampler_of_a_checkpoint_learns_its_base_model() {
    let mock = Mock::start().await;
    let service = service(&mock.base_url(), KEY).build().unwrap();
    let path: TinkerPath = "tinker://S0:train:0/sampler_weights/final".parse().unwrap();

    let sampler = service.create_sampling_client(&path).await.unwrap();

    assert_eq!(sampler.base_model(), "test/base");
    assert_eq!(sampler.sampling_session_id().as_str(), "S1:sample:0");
    let body = mock.seen_at("/api/v1/create_sampling_session")[0].json();
    assert_eq!(
        body["model_path"],
        "tinker://S0:train:0/sampler_weights/final"
    );
    assert_eq!(mock.seen_at("/api/v1/samplers/S1:sample:0").len(), 1);
}
