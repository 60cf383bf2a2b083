//! Samples under back-pressure, and every recorded request sent as it was recorded.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use tinker_api::{
    Event, ModelInput, SampleOptions, SamplingClient, SamplingParams, SamplingSource,
};
use tinker_contract::mock::{Mock, json as reply, refusal};
use tinker_types::ASAMPLE;

use crate::support::{Events, KEY, service};

async fn sampler(mock: &Mock, events: &Events) -> SamplingClient {
    let service = service(&mock.base_url(), KEY)
        .observer(events.observe())
        .build()
        .unwrap();
    let source = SamplingSource::BaseModel("test/base".into());
    service.create_sampling_client(source).await.unwrap()
}

fn params() -> SamplingParams {
    SamplingParams {
        max_tokens: Some(3),
        ..SamplingParams::default()
    }
}

fn numbers(mock: &Mock) -> Vec<u64> {
    mock.seen_at(ASAMPLE)
        .iter()
        .map(|seen| seen.seq_id())
        .collect()
}

#[tokio::test]
async fn twenty_samples_after_a_429_all_succeed_under_their_own_numbers() {
    let mock = Mock::start().await;
    let sampler = sampler(&mock, &Events::default()).await;
    mock.script(ASAMPLE, [refusal(429, "busy")]);

    let samples = (0..20).map(|_| {
        let prompt = ModelInput::from_tokens(vec![5; 4]);
        sampler.sample(prompt, params(), SampleOptions::default())
    });
    for sample in join_all(samples).await {
        assert_eq!(sample.unwrap().sequences.len(), 1);
    }

    let all = numbers(&mock);
    let distinct: BTreeSet<u64> = all.iter().copied().collect();
    assert_eq!((all.len(), distinct), (21, (0..20).collect()));
}

#[tokio::test]
async fn a_409_of_a_sample_is_repeated_under_its_number() {
    let mock = Mock::start().await;
    let sampler = sampler(&mock, &Events::default()).await;
    mock.script(ASAMPLE, [refusal(409, "two requests met")]);

    let prompt = ModelInput::from_tokens(vec![5; 4]);
    sampler
        .sample(prompt, params(), SampleOptions::default())
        .await
        .unwrap();

    assert_eq!(numbers(&mock), [0, 0]);
}

#[tokio::test]
async fn the_reason_of_a_pause_is_told() {
    let mock = Mock::start().await;
    let events = Events::default();
    let sampler = sampler(&mock, &events).await;
    let body = serde_json::json!({
        "detail": "the fleet is full", "queue_state": "paused_capacity",
        "queue_state_reason": "the fleet is full",
    });
    mock.script(ASAMPLE, [reply(429, &body)]);

    let prompt = ModelInput::from_tokens(vec![5; 4]);
    sampler
        .sample(prompt, params(), SampleOptions::default())
        .await
        .unwrap();

    let told = events.all().into_iter().find_map(|event| match event {
        Event::SamplingPaused { reason, .. } => reason,
        _ => None,
    });
    assert_eq!(told.as_deref(), Some("the fleet is full"));
}
