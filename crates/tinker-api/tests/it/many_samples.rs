//! Many samples at once: order, limits, one poll for all, what is under way, cancellation.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tinker_api::{
    ApiFuture, Error, Event, FlightState, ModelInput, PollPolicy, SampleOptions, SampleResponse,
    SamplingClient, SamplingParams, SamplingSource,
};
use wiremock::{MockServer, Request, ResponseTemplate};

use crate::support::*;

async fn sampler(server: &MockServer) -> SamplingClient {
    sampler_of(&service(server)).await
}

async fn sampler_of(service: &tinker_api::ServiceClient) -> SamplingClient {
    let source = SamplingSource::BaseModel("tinker/nano".into());
    service.create_sampling_client(source).await.unwrap()
}

fn ask(sampler: &SamplingClient, token: u32) -> ApiFuture<SampleResponse> {
    let prompt = ModelInput::from_tokens(vec![token]);
    sampler.sample(prompt, SamplingParams::default(), SampleOptions::default())
}

/// Futures are named after the first token of the prompt.
fn named_by_prompt(request: &Request) -> ResponseTemplate {
    let token = &body(request)["prompt"]["chunks"][0]["tokens"][0];
    ok(json!({"request_id": format!("sample-{token}"), "sample_sequence_ids": [token.to_string()]}))
}

/// Settings with which one poll waits for all samples.
fn session_poller() -> ResponseTemplate {
    ok(json!({"sample_use_retrieve_futures": true}))
}

/// A server's list of what is done, and the polls that asked for it.
#[derive(Clone, Default)]
struct Completions {
    done: Arc<Mutex<Vec<Value>>>,
    polls: Arc<Mutex<Vec<Value>>>,
}

impl Completions {
    /// Accepts a sample, which is done at once; `state` is `finished` or `failed`.
    fn accept(&self, request: &Request, state: &str) -> ResponseTemplate {
        let token = &body(request)["prompt"]["chunks"][0]["tokens"][0];
        let id = format!("sample-{token}");
        let done = json!({
            "state": state, "request_id": id, "response_payload_uncompressed_size": 100,
        });
        self.done.lock().unwrap().push(done);
        ok(json!({"request_id": id}))
    }

    fn answer(&self, request: &Request) -> ResponseTemplate {
        let poll = body(request);
        let cursor = poll["prev_cursor"].as_u64().unwrap() as usize;
        self.polls.lock().unwrap().push(poll);
        let done = self.done.lock().unwrap();
        ok(json!({"completions": done[cursor..], "cursor": done.len()}))
    }

    /// Every id that was reported as fetched.
    fn fetched(&self) -> Vec<String> {
        let polls = self.polls.lock().unwrap();
        let ids = polls
            .iter()
            .flat_map(|poll| poll["retrieved_request_ids"].as_array().unwrap().clone());
        let mut ids: Vec<_> = ids.map(|id| id.as_str().unwrap().to_owned()).collect();
        ids.sort();
        ids.dedup();
        ids
    }

    async fn mount(&self, server: &MockServer, state: &'static str) {
        let (accepting, answering) = (self.clone(), self.clone());
        answer_with(server, "client/config", None, session_poller()).await;
        let accept = move |request: &Request| accepting.accept(request, state);
        answer_with(server, "asample", None, accept).await;
        let answer = move |request: &Request| answering.answer(request);
        answer_with(server, "retrieve_futures", None, answer).await;
    }
}

#[tokio::test]
async fn each_future_brings_its_own_result_however_results_come() {
    let server = server().await;
    answer_with(&server, "asample", None, named_by_prompt).await;
    // The earlier it was asked for, the later it comes.
    let backwards = |request: &Request| {
        let id = body(request)["request_id"].as_str().unwrap().to_owned();
        let token: u64 = id.trim_start_matches("sample-").parse().unwrap();
        sample_result(1).set_delay(Duration::from_millis(60 - token))
    };
    answer_with(&server, "retrieve_future", None, backwards).await;
    let sampler = sampler(&server).await;

    let samples: Vec<_> = (0..60).map(|token| ask(&sampler, token)).collect();

    for (token, sample) in samples.into_iter().enumerate() {
        let name = sample.await.unwrap().sequences[0].sequence_id.clone();
        assert_eq!(name, Some(token.to_string()));
    }
    let sent = requests(&server, "asample").await;
    assert!(sent.iter().all(|request| {
        let request = body(request);
        request["seq_id"] == request["prompt"]["chunks"][0]["tokens"][0]
    }));
}

#[tokio::test]
async fn no_more_samples_are_in_flight_than_the_server_allows() {
    let server = server().await;
    let config = ok(json!({"sample_max_concurrent_requests": 3}));
    answer_with(&server, "client/config", None, config).await;
    answer_with(&server, "retrieve_future", None, ResponseTemplate::new(408)).await;
    let sampler = sampler(&server).await;

    let mut samples: Vec<_> = (0..9).map(|token| ask(&sampler, token)).collect();
    while requests(&server, "retrieve_future").await.len() < 12 {
        tokio::task::yield_now().await;
    }
    assert_eq!(requests(&server, "asample").await.len(), 3);

    // Those given up while they wait are never sent.
    drop(samples.drain(3..8));
    drop(samples.remove(0));
    while requests(&server, "asample").await.len() < 4 {
        tokio::task::yield_now().await;
    }
    let last = requests(&server, "asample").await.pop().unwrap();
    assert_eq!(body(&last)["prompt"]["chunks"][0]["tokens"], json!([8]));
}

#[tokio::test]
async fn refused_samples_lower_the_limit_that_all_samplers_share() {
    let server = server().await;
    answer_with(&server, "asample", Some(1), refusal(429)).await;
    let limits = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&limits);
    let first = builder(&server)
        .observer(move |event| {
            if let Event::SamplingLimit { limit } = event {
                heard.lock().unwrap().push(*limit);
            }
        })
        .build()
        .unwrap();
    let (first, second) = (sampler_of(&first).await, sampler(&server).await);
    assert_eq!(second.concurrency_limit(), 10_000);

    ask(&first, 1).await.unwrap();
    assert_eq!(second.concurrency_limit(), 4);
    for sample in [ask(&first, 2), ask(&first, 3)] {
        sample.await.unwrap();
    }

    let limits = limits.lock().unwrap().clone();
    assert!(
        limits.len() == 2 && limits[0] == 4 && limits[1] >= 8,
        "{limits:?}"
    );
}

#[tokio::test]
async fn one_poll_waits_for_all_samples_and_each_result_is_fetched_once() {
    let server = server().await;
    let completions = Completions::default();
    completions.mount(&server, "finished").await;
    let sampler = sampler(&server).await;

    let samples: Vec<_> = (0..20).map(|token| ask(&sampler, token)).collect();
    for sample in samples {
        sample.await.unwrap();
    }
    while completions.fetched().len() < 20 {
        tokio::task::yield_now().await;
    }

    let fetches = requests(&server, "retrieve_future").await;
    assert_eq!(fetches.len(), 20);
    assert!(
        fetches
            .iter()
            .all(|r| body(r)["allow_metadata_only"] == false)
    );
    let polls = completions.polls.lock().unwrap().clone();
    let target = json!({
        "type": "sampling_session", "sampling_session_id": "S1:sample:0", "cloned_sampler_id": 0,
    });
    assert!(polls.iter().all(|poll| poll["target"] == target));
    // The last one only reports, so the server need not hold it.
    assert_eq!(polls.last().unwrap()["timeout"], 0.0);
}

#[tokio::test]
async fn a_failure_that_the_poll_announces_is_asked_for() {
    let server = server().await;
    let failure = ok(json!({"error": "the prompt is too long", "category": "user"}));
    answer_with(&server, "retrieve_future", None, failure).await;
    Completions::default().mount(&server, "failed").await;

    let error = ask(&sampler(&server).await, 1).await.unwrap_err();

    assert!(matches!(&error, Error::RequestFailed { message, .. } if message.contains("too long")));
}

#[tokio::test]
async fn servers_without_the_poll_are_asked_for_each_sample() {
    let server = server().await;
    answer_with(&server, "client/config", None, session_poller()).await;
    answer_with(
        &server,
        "retrieve_futures",
        None,
        ResponseTemplate::new(404),
    )
    .await;
    let sampler = sampler(&server).await;

    let samples: Vec<_> = (0..5).map(|token| ask(&sampler, token)).collect();
    for sample in samples {
        sample.await.unwrap();
    }

    assert_eq!(requests(&server, "retrieve_future").await.len(), 5);
    assert_eq!(requests(&server, "retrieve_futures").await.len(), 1);
}

#[tokio::test]
async fn a_server_that_forgot_its_list_is_asked_for_each_sample() {
    let server = server().await;
    answer_with(&server, "client/config", None, session_poller()).await;
    // The list is behind the cursor that the first poll was told.
    let forgets = |request: &Request| {
        let cursor = body(request)["prev_cursor"].as_u64().unwrap();
        ok(json!({"completions": [], "cursor": if cursor == 0 { 7 } else { 0 }}))
    };
    answer_with(&server, "retrieve_futures", None, forgets).await;

    ask(&sampler(&server).await, 1).await.unwrap();

    assert_eq!(requests(&server, "retrieve_future").await.len(), 1);
}

/// A list that has grown beyond the cursor of its client, and tells only what is new in it.
async fn list_that_grew(server: &MockServer) {
    answer_with(server, "client/config", None, session_poller()).await;
    let grown = |request: &Request| {
        let cursor = body(request)["prev_cursor"].as_u64().unwrap();
        ok(json!({"completions": [], "cursor": if cursor == 0 { 3 } else { 5 }}))
    };
    answer_with(server, "retrieve_futures", None, grown).await;
}

#[tokio::test]
async fn a_server_that_lost_its_list_unseen_while_it_was_away_loses_no_answer() {
    let server = server().await;
    let is_second = |request: &Request| body(request)["prev_cursor"] == 3;
    wiremock::Mock::given(wiremock::matchers::path("/api/v1/retrieve_futures"))
        .and(is_second)
        .respond_with(refusal(502))
        .up_to_n_times(1)
        .with_priority(1)
        .mount(&server)
        .await;
    list_that_grew(&server).await;

    ask(&sampler(&server).await, 1).await.unwrap();

    // Once to learn that it is done, once for the result.
    assert_eq!(requests(&server, "retrieve_future").await.len(), 2);
}

#[tokio::test]
async fn a_sample_that_no_poll_tells_of_is_asked_for_again_and_again() {
    let server = server().await;
    list_that_grew(&server).await;
    let not_yet = ResponseTemplate::new(408);
    answer_with(&server, "retrieve_future", Some(3), not_yet).await;
    let service = builder(&server)
        .poll_policy(PollPolicy {
            min_interval: Duration::from_millis(1),
            unheard_interval: Duration::from_millis(1),
            ..PollPolicy::default()
        })
        .build()
        .unwrap();

    ask(&sampler_of(&service).await, 1).await.unwrap();

    assert_eq!(requests(&server, "retrieve_future").await.len(), 5);
}

#[tokio::test]
async fn samples_under_way_are_shown() {
    let server = server().await;
    answer_with(&server, "asample", None, named_by_prompt).await;
    let full = json!({"type": "try_again", "queue_state": "paused_capacity"});
    let full = ResponseTemplate::new(408).set_body_json(full);
    answer_with(&server, "retrieve_future", None, full).await;
    let service = service(&server);
    let sampler = sampler_of(&service).await;
    assert_eq!(service.in_flight(), []);

    let sample = ask(&sampler, 7);
    let is_paused = |state: &FlightState| matches!(state, FlightState::Waiting { queue: Some(queue), .. } if queue.as_str() == "paused_capacity");
    while !service.in_flight().iter().any(|row| is_paused(&row.state)) {
        tokio::task::yield_now().await;
    }

    let rows = service.in_flight();
    let id = rows[0].request_id.as_ref().map(ToString::to_string);
    assert_eq!(
        (rows[0].operation.as_ref(), id.as_deref()),
        ("Sample", Some("sample-7"))
    );
    drop(sample);
    while !service.in_flight().is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn abandoned_samples_are_cancelled_only_where_servers_want_to_know() {
    for (wanted, expected) in [
        (true, vec!["sample-0", "sample-1", "sample-2"]),
        (false, vec![]),
    ] {
        let server = server().await;
        let dynamic = ok(json!({
            "sample_cancel_enabled": wanted, "sample_cancel_max_batch_size": 2,
        }));
        answer_with(&server, "client/dynamic_config", None, dynamic).await;
        answer_with(&server, "asample", None, named_by_prompt).await;
        // The last one is not abandoned, and is answered after the others were given up.
        let result = |request: &Request| match body(request)["request_id"].as_str() {
            Some("sample-3") => sample_result(1),
            _ => ResponseTemplate::new(408),
        };
        answer_with(&server, "retrieve_future", None, result).await;
        let sampler = sampler(&server).await;

        let samples: Vec<_> = (0..3).map(|token| ask(&sampler, token)).collect();
        while requests(&server, "retrieve_future").await.len() < 3 {
            tokio::task::yield_now().await;
        }
        drop(samples);
        ask(&sampler, 3).await.unwrap();
        while requests(&server, "cancel_future").await.len() < expected.len() {
            tokio::task::yield_now().await;
        }

        let cancelled = requests(&server, "cancel_future").await;
        let mut ids: Vec<_> = cancelled
            .iter()
            .map(|r| body(r)["request_id"].as_str().unwrap().to_owned())
            .collect();
        ids.sort();
        assert_eq!(ids, expected);
    }
}

#[tokio::test]
async fn samples_fail_when_none_of_them_comes_back() {
    for (detection, is_stuck) in [(true, true), (false, false)] {
        let server = server().await;
        let config = ok(json!({"sample_enable_stuck_detection": detection}));
        answer_with(&server, "client/config", None, config).await;
        answer_with(
            &server,
            "retrieve_future",
            Some(40),
            ResponseTemplate::new(408),
        )
        .await;
        let service = builder(&server)
            .poll_policy(PollPolicy {
                min_interval: Duration::from_millis(1),
                progress_timeout: Duration::from_millis(10),
                ..PollPolicy::default()
            })
            .build()
            .unwrap();

        let outcome = ask(&sampler_of(&service).await, 1).await;

        assert_eq!(
            matches!(outcome, Err(Error::TimedOut { .. })),
            is_stuck,
            "{outcome:?}"
        );
    }
}

#[tokio::test]
async fn a_handle_opens_the_sampler_in_another_process_with_numbers_of_its_own() {
    let server = server().await;
    let handle = sampler(&server).await.get_sampler_handle().await.unwrap();
    let text = handle.to_string();
    assert!(!text.contains("tml-secret") && !format!("{handle:?}").contains("tml-secret"));

    let other = service(&server);
    let handle = text.parse().unwrap();
    let client = other
        .create_sampling_client_from_handle(&handle)
        .await
        .unwrap();
    ask(&client, 1).await.unwrap();

    let number = body(&requests(&server, "asample").await[0])["seq_id"]
        .as_u64()
        .unwrap();
    assert!(
        number >= 1_000_000_000 && number.is_multiple_of(1_000_000_000),
        "{number}"
    );
    assert_eq!(client.base_model(), "tinker/nano");
    assert_eq!(requests(&server, "create_session").await.len(), 1);
    assert_eq!(requests(&server, "create_sampling_session").await.len(), 1);
}

#[tokio::test]
async fn servers_may_number_the_clients_of_a_sampler() {
    let server = server().await;
    let config = ok(json!({"sample_join_sampling_session": true}));
    answer_with(&server, "client/config", None, config).await;
    let counter = ok(json!({"client_counter": 3, "type": "join_sampling_session"}));
    answer_with(&server, "join_sampling_session", None, counter).await;
    let handle = sampler(&server).await.get_sampler_handle().await.unwrap();

    let client = service(&server)
        .create_sampling_client_from_handle(&handle)
        .await
        .unwrap();
    ask(&client, 1).await.unwrap();

    let number = &body(&requests(&server, "asample").await[0])["seq_id"];
    assert_eq!(number, 3_000_000_000_u64);
}
