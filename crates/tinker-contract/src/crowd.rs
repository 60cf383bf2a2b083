//! A crowd of samplers, each with several requests in the queue at once, and how evenly they are served.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tinker_api::{ModelInput, SampleOptions, SamplingParams, SamplingSource, Stop};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::soak::Place;
use crate::suite::tokens;
use crate::target::service;

/// Samplers that share a session, as those of one program do.
const PER_SESSION: usize = 20;
/// Tokens of a prompt, and to draw.
const PROMPT: usize = 16;
const DRAWN: u32 = 4;

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Crowd {
    /// What went wrong, for people.
    pub errors: Vec<String>,
    /// From the moment when all samplers were there to the last result of each, ascending.
    pub times: Vec<Duration>,
}

impl Crowd {
    /// The middle of the times.
    #[must_use]
    pub fn median(&self) -> Duration {
        let middle = self.times.get(self.times.len() / 2);
        middle.copied().unwrap_or_default()
    }

    /// The longest of the times.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.times.last().copied().unwrap_or_default()
    }
}

/// Makes `n_samplers` and, once all are there, queues `n_each` samples on every one of them at once.
///
/// # Panics
/// If a client panics.
pub async fn gather(place: &Place, n_samplers: usize, n_each: usize) -> Crowd {
    let first = service(&place.base_url, &place.api_key);
    let all_there = Arc::new(Barrier::new(n_samplers));
    let mut clients = JoinSet::new();
    let mut session = first.clone();
    for number in 0..n_samplers {
        if number % PER_SESSION == 0 {
            session = first.with_new_session();
        }
        let (session, all_there) = (session.clone(), Arc::clone(&all_there));
        let source = SamplingSource::BaseModel(place.base_model.clone());
        clients.spawn(async move {
            let made = session.create_sampling_client(source).await;
            all_there.wait().await;
            let begun = Instant::now();
            let sampler = made.map_err(|error| error.to_string())?;
            let asked: Vec<_> = (0..n_each)
                .map(|i| {
                    let prompt = tokens((number * n_each + i) as u32, PROMPT);
                    let params = SamplingParams {
                        max_tokens: Some(DRAWN),
                        stop: Some(Stop::Tokens(vec![])),
                        ..SamplingParams::default()
                    };
                    let prompt = ModelInput::from_tokens(prompt);
                    sampler.sample(prompt, params, SampleOptions::default())
                })
                .collect();
            for sampled in asked {
                let sequences = sampled.await.map_err(|error| error.to_string())?.sequences;
                if sequences.iter().any(|s| s.tokens.len() != DRAWN as usize) {
                    return Err("a continuation of another length".to_owned());
                }
            }
            Ok(begun.elapsed())
        });
    }
    let mut crowd = Crowd::default();
    while let Some(ended) = clients.join_next().await {
        match ended.expect("a client that does not panic") {
            Ok(time) => crowd.times.push(time),
            Err(text) => crowd.errors.push(text),
        }
    }
    crowd.times.sort_unstable();
    crowd
}
