//! Samples: numbers, back-pressure, forgotten futures, abandonment.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use tinker_api::{
    Error, Event, LoraConfig, ModelInput, SampleOptions, SamplingClient, SamplingParams,
    SamplingSource,
};
use wiremock::{MockServer, Request, ResponseTemplate};

use crate::support::*;

async fn sampler(server: &MockServer) -> SamplingClient {
    service(server)
        .create_sampling_client(SamplingSource::BaseModel("tinker/nano".into()))
        .await
        .unwrap()
}

fn prompt() -> ModelInput {
    ModelInput::from_tokens(vec![1, 2])
}

fn seq_ids(requests: &[Request]) -> Vec<u64> {
    requests
        .iter()
        .map(|r| body(r)["seq_id"].as_u64().unwrap())
        .collect()
}

#[tokio::test]
async fn samples_are_numbered_from_zero_and_named_by_the_future() {
    let server = server().await;
    let future = ok(json!({"request_id": "sample-1", "sample_sequence_ids": ["q7"]}));
    answer_with(&server, "asample", Some(1), future).await;
    let sampler = sampler(&server).await;

    let first = sampler
        .sample(
            prompt(),
            SamplingParams::default(),
            SampleOptions::default(),
        )
        .await
        .unwrap();
    let logprobs = sampler.compute_logprobs(prompt()).await.unwrap();

    assert_eq!(first.sequences[0].tokens, [5, 6]);
    assert_eq!(first.sequences[0].sequence_id.as_deref(), Some("q7"));
    assert_eq!(logprobs, [None, Some(-0.5)]);
    let sent = requests(&server, "asample").await;
    assert_eq!(seq_ids(&sent), [0, 1]);
    assert_eq!(body(&sent[1])["sampling_params"]["max_tokens"], 1);
    assert_eq!(sent[0].headers["x-tinker-sampling-backpressure"], "1");
}

#[tokio::test]
async fn back_pressure_resends_the_same_number_after_a_pause() {
    let server = server().await;
    answer_with(&server, "asample", Some(1), refusal(429)).await;
    let waits = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&waits);
    let service = builder(&server)
        .observer(move |event| {
            if let Event::SamplingPaused { wait, .. } = event {
                heard.lock().unwrap().push(*wait);
            }
        })
        .build()
        .unwrap();
    let source = SamplingSource::BaseModel("tinker/nano".into());
    let sampler = service.create_sampling_client(source).await.unwrap();

    sampler
        .sample(
            prompt(),
            SamplingParams::default(),
            SampleOptions::default(),
        )
        .await
        .unwrap();

    assert_eq!(seq_ids(&requests(&server, "asample").await), [0, 0]);
    assert_eq!(*waits.lock().unwrap(), [Duration::from_secs(1)]);
}

#[tokio::test]
async fn a_failed_submission_is_repeated_under_its_number() {
    let server = server().await;
    answer_with(&server, "asample", Some(2), refusal(503)).await;
    let sampler = sampler(&server).await;

    sampler
        .sample(
            prompt(),
            SamplingParams::default(),
            SampleOptions::default(),
        )
        .await
        .unwrap();

    assert_eq!(seq_ids(&requests(&server, "asample").await), [0, 0, 0]);
}

#[tokio::test]
async fn a_forgotten_sample_is_submitted_anew_under_numbers_that_no_call_has() {
    let server = server().await;
    answer_with(&server, "retrieve_future", Some(2), refusal(410)).await;
    let sampler = sampler(&server).await;

    for _ in 0..2 {
        sampler
            .sample(
                prompt(),
                SamplingParams::default(),
                SampleOptions::default(),
            )
            .await
            .unwrap();
    }

    let sent = seq_ids(&requests(&server, "asample").await);
    assert_eq!(sent, [0, 90_909_090, 181_818_180, 1]);
}

/// Takes a number for one request only, as servers do, and forgets one sample that it had taken.
fn strict_about_numbers() -> impl Fn(&Request) -> ResponseTemplate {
    let known = Mutex::new(HashMap::new());
    move |request: &Request| {
        let seq_id = body(request)["seq_id"].clone();
        let number = seq_id.as_u64().unwrap();
        let mut known = known.lock().unwrap();
        let first = known.entry(number).or_insert_with(|| request.body.clone());
        if *first != request.body {
            return ResponseTemplate::new(422)
                .set_body_json(json!({"detail": format!("{number} is of another request")}));
        }
        ok(json!({"request_id": format!("sample-{seq_id}")}))
    }
}

/// A program that draws a sample of each of the prompts, which differ, and has a ledger.
async fn draw_each(server: &MockServer, ledger: &Path, prompts: std::ops::Range<u32>) {
    let service = builder(server).ledger(ledger).build().unwrap();
    let run = service.create_lora_training_client("tinker/nano", LoraConfig::default());
    let _run = run.await.unwrap();
    let source = SamplingSource::BaseModel("tinker/nano".into());
    let sampler = service.create_sampling_client(source).await.unwrap();
    for token in prompts {
        let prompt = ModelInput::from_tokens(vec![token]);
        let (params, options) = (SamplingParams::default(), SampleOptions::default());
        let sample = sampler.sample(prompt, params, options);
        sample
            .await
            .unwrap_or_else(|error| panic!("prompt {token}: {error}"));
    }
}

/// Runs a program on a runtime of its own, with which all that it began ends.
fn process(program: impl Future<Output = ()> + Send) {
    std::thread::scope(|scope| {
        let run = || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(program);
        };
        scope.spawn(run).join().unwrap();
    });
}

#[tokio::test]
async fn a_restarted_program_samples_on_after_one_was_submitted_anew() {
    let (server, folder) = (server().await, tempfile::TempDir::new().unwrap());
    answer_with(&server, "asample", None, strict_about_numbers()).await;
    let forgets = |request: &Request| body(request)["request_id"] == "sample-1";
    wiremock::Mock::given(wiremock::matchers::path("/api/v1/retrieve_future"))
        .and(forgets)
        .respond_with(refusal(410))
        .with_priority(1)
        .mount(&server)
        .await;
    let ledger = folder.path().join("ledger.jsonl");

    process(draw_each(&server, &ledger, 0..2));
    process(draw_each(&server, &ledger, 0..4));

    let sent = seq_ids(&requests(&server, "asample").await);
    let anew = 90_909_091;
    assert_eq!(sent, [0, 1, anew, 0, 1, anew, 2, 3]);
}

#[tokio::test]
async fn servers_may_turn_repetitions_off() {
    let server = server().await;
    answer_with(
        &server,
        "client/config",
        None,
        ok(json!({"sample_no_retries": true})),
    )
    .await;
    answer_with(&server, "asample", None, refusal(500)).await;
    let sampler = sampler(&server).await;

    let error = sampler
        .sample(
            prompt(),
            SamplingParams::default(),
            SampleOptions::default(),
        )
        .await
        .unwrap_err();

    assert!(error.is_server_lost());
    assert_eq!(requests(&server, "asample").await.len(), 1);
}

#[tokio::test]
async fn many_samples_at_once_have_unique_numbers() {
    let server = server().await;
    let sampler = sampler(&server).await;

    let samples: Vec<_> = (0..50)
        .map(|_| {
            sampler.sample(
                prompt(),
                SamplingParams::default(),
                SampleOptions::default(),
            )
        })
        .collect();
    for sample in samples {
        sample.await.unwrap();
    }

    let mut sent = seq_ids(&requests(&server, "asample").await);
    sent.sort_unstable();
    assert_eq!(sent, (0..50).collect::<Vec<u64>>());
}

#[tokio::test]
async fn a_dropped_sample_is_cancelled_where_the_server_wants_to_know() {
    let server = server().await;
    let dynamic = ok(json!({"sample_cancel_enabled": true}));
    answer_with(&server, "client/dynamic_config", None, dynamic).await;
    answer_with(&server, "retrieve_future", None, ResponseTemplate::new(408)).await;
    let sampler = sampler(&server).await;

    let sample = sampler.sample(
        prompt(),
        SamplingParams::default(),
        SampleOptions::default(),
    );
    while requests(&server, "retrieve_future").await.is_empty() {
        tokio::task::yield_now().await;
    }
    drop(sample);
    while requests(&server, "cancel_future").await.is_empty() {
        tokio::task::yield_now().await;
    }

    let asked = body(&requests(&server, "retrieve_future").await[0]);
    let cancelled = body(&requests(&server, "cancel_future").await[0]);
    assert_eq!(cancelled["request_id"], asked["request_id"]);
}

#[tokio::test]
async fn too_few_samples_are_an_error() {
    let server = server().await;
    let sampler = sampler(&server).await;
    let options = SampleOptions {
        num_samples: 2,
        ..SampleOptions::default()
    };

    let error = sampler
        .sample(prompt(), SamplingParams::default(), options)
        .await
        .unwrap_err();

    assert_eq!(
        error.to_string(),
        "the server returned 1 samples for 2 asked for"
    );
}

#[tokio::test]
async fn what_cannot_be_right_is_not_sent() {
    let server = server().await;
    let sampler = sampler(&server).await;
    let cold = SamplingParams {
        temperature: -1.0,
        ..SamplingParams::default()
    };
    let none = SampleOptions {
        num_samples: 0,
        ..SampleOptions::default()
    };
    let nothing = ModelInput::from_tokens(vec![]);

    for (sample, part) in [
        (
            sampler.sample(prompt(), cold, SampleOptions::default()),
            "temperature -1",
        ),
        (
            sampler.sample(prompt(), SamplingParams::default(), none),
            "num_samples is 0",
        ),
        (
            sampler.sample(nothing, SamplingParams::default(), SampleOptions::default()),
            "the prompt is empty",
        ),
    ] {
        let error = sample.await.unwrap_err();
        assert!(matches!(error, Error::InvalidRequest(_)));
        assert!(error.to_string().contains(part), "{error}");
    }
    assert!(requests(&server, "asample").await.is_empty());
}

#[tokio::test]
async fn a_sampler_of_a_checkpoint_asks_for_its_base_model() {
    let server = server().await;
    let service = service(&server);
    let path = "tinker://S1:train:0/sampler_weights/final".parse().unwrap();

    let sampler = service.create_sampling_client(&path).await.unwrap();

    assert_eq!(sampler.base_model(), "tinker/nano");
    let sent = body(&requests(&server, "create_sampling_session").await[0]);
    assert_eq!(
        sent["model_path"],
        "tinker://S1:train:0/sampler_weights/final"
    );
    let wrong = "tinker://S1:train:0/weights/final".parse().unwrap();
    let error = service.create_sampling_client(&wrong).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "tinker://S1:train:0/weights/final is not a sampler checkpoint; \
         did you mean tinker://S1:train:0/sampler_weights/final?"
    );
}
