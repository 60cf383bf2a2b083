//! Samples under back-pressure, and every recorded request sent as it was recorded.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use tinker_api::{
    Event, ModelInput, SampleOptions, SamplingClient, SamplingParams, SamplingSource,
};
use tinker_contract::mock::{Mock, json as reply, refusal};
use tinker_types::ASAMPLE;

use crate::support::{Events, KEY, ms, service};

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

/// Refusals of one moment count once, none is forgotten, and no sample is given up.
#[tokio::test]
async fn a_hundred_refusals_at_once_halve_the_limit_once() {
    let (mock, events) = (Mock::start().await, Events::default());
    let sampler = sampler(&mock, &events).await;
    let n_refused = Arc::new(AtomicUsize::new(0));
    let (count, told) = (Arc::clone(&n_refused), events.clone());
    mock.answer(ASAMPLE, move |_| {
        // Until the client has heard of it; a refusal takes a while, so others are on their way.
        limits(&told).is_empty().then(|| {
            count.fetch_add(1, Ordering::Relaxed);
            refusal(429, "busy").map(|answer| answer.set_delay(ms(200)))
        })
    });

    let samples = (0..100).map(|_| {
        let prompt = ModelInput::from_tokens(vec![5; 4]);
        sampler.sample(prompt, params(), SampleOptions::default())
    });
    for sample in join_all(samples).await {
        assert_eq!(sample.unwrap().sequences.len(), 1);
    }

    let sent = numbers(&mock);
    let distinct: BTreeSet<u64> = sent.iter().copied().collect();
    assert_eq!(distinct, (0..100).collect());
    let n_refused = n_refused.load(Ordering::Relaxed);
    assert!(n_refused > 1, "one refusal is no burst");
    assert_eq!(sent.len(), 100 + n_refused);
    let limits = limits(&events);
    let (first, later) = limits.split_first().expect("a lower limit");
    assert!((4..=50).contains(first), "{limits:?}");
    // It grows with the results; it did not fall with every refusal of the burst.
    assert!(later.iter().all(|limit| limit > first), "{limits:?}");
}

/// The limits that the client told.
fn limits(events: &Events) -> Vec<u32> {
    let all = events.all().into_iter();
    all.filter_map(|event| match event {
        Event::SamplingLimit { limit } => Some(limit),
        _ => None,
    })
    .collect()
}
