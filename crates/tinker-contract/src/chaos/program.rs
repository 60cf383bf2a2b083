//! The run itself: 200 steps of several requests each, saves, and samples of what was saved.
//!
//! It knows nothing of its own restarts: it makes the same calls again and the ledger does the rest.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tinker_api::{
    AdamParams, ApiFuture, ForwardBackwardOutput, LoraConfig, LossFn, ModelInput,
    OptimStepResponse, PollPolicy, RetryPolicy, SampleOptions, SamplingParams, SaveOptions,
    ServiceClient, Stop, Timeouts, TinkerPath,
};
use tinker_http::machine::Backoff;

use crate::suite::{batch, tokens};

/// Steps that are submitted before the result of the first one is awaited.
const N_AHEAD: usize = 3;
/// A checkpoint is saved and sampled from every so many steps.
const SAMPLE_EVERY: u32 = 50;
/// Samples of each.
const N_SAMPLES: u32 = 4;
/// How long an answer is waited for before it is asked for again: long enough for a server on an
/// overloaded machine, or nothing would ever be answered.
const TIMEOUT: Duration = Duration::from_millis(500);

/// What the program saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// `loss:sum` of every step.
    pub losses: Vec<f64>,
    /// Tokens of every sample.
    pub samples: Vec<Vec<u32>>,
    /// The final checkpoints, of the sampler and of training.
    pub checkpoints: Vec<String>,
}

/// A client with a ledger, whose delays are milliseconds, and which does not give up.
///
/// # Panics
/// If the ledger cannot be used.
#[must_use]
pub fn service(base_url: &str, api_key: &str, ledger: &Path) -> ServiceClient {
    let backoff = Backoff {
        base_delay: Duration::from_millis(2),
        max_delay: Duration::from_millis(20),
        jitter: 0.25,
    };
    let patience = Duration::from_secs(150);
    ServiceClient::builder(base_url)
        .api_key(api_key.parse().expect("a key"))
        .retry_policy(RetryPolicy {
            max_attempts: u32::MAX,
            backoff: backoff.clone(),
            total_timeout: patience,
            ..RetryPolicy::default()
        })
        .poll_policy(PollPolicy {
            min_interval: Duration::from_millis(2),
            backoff,
            ..PollPolicy::default()
        })
        .timeouts(Timeouts {
            session: TIMEOUT,
            train: TIMEOUT,
            sample: TIMEOUT,
            retrieve: TIMEOUT,
            rest: TIMEOUT,
        })
        .wait_for_server(patience)
        .ledger(ledger)
        .build()
        .expect("a ledger in order")
}

type Step = (
    ApiFuture<ForwardBackwardOutput>,
    ApiFuture<OptimStepResponse>,
);

/// Trains for `n_steps`, and tells how many are done.
///
/// # Panics
/// If an operation fails.
pub async fn train(
    service: &ServiceClient,
    base_model: &str,
    n_steps: u32,
    told: impl Fn(u32),
) -> Report {
    let lora = LoraConfig {
        rank: 4,
        seed: Some(7),
        ..LoraConfig::default()
    };
    let trainer = service
        .create_lora_training_client(base_model, lora)
        .await
        .expect("a training run");
    let adam = AdamParams {
        learning_rate: 2e-3,
        grad_clip_norm: 1.0,
        ..AdamParams::default()
    };
    let (mut losses, mut samples) = (Vec::new(), Vec::new());
    let mut ahead = VecDeque::<Step>::new();
    for i in 0..n_steps {
        let pass = trainer.forward_backward(batch(i), LossFn::CrossEntropy);
        ahead.push_back((pass, trainer.optim_step(adam)));
        if i % 40 == 20 {
            // Its result is not waited for: saving takes its place among the other operations.
            drop(trainer.save_state(format!("step-{i}"), SaveOptions::default()));
        }
        let saved = (i % SAMPLE_EVERY == SAMPLE_EVERY - 1)
            .then(|| trainer.save_weights_for_sampler(format!("step-{i}"), SaveOptions::default()));
        if ahead.len() > N_AHEAD {
            losses.push(finish(ahead.pop_front().expect("a step")).await);
            told(losses.len() as u32);
        }
        if let Some(saved) = saved {
            samples.extend(sample(service, &saved.await.expect("a save")).await);
        }
    }
    for step in ahead {
        losses.push(finish(step).await);
        told(losses.len() as u32);
    }
    let weights = trainer.save_weights_for_sampler("final", SaveOptions::default());
    let state = trainer.save_state("final", SaveOptions::default());
    let checkpoints = [weights.await, state.await]
        .map(|path| path.expect("a save").to_string())
        .to_vec();
    Report {
        losses,
        samples,
        checkpoints,
    }
}

async fn finish((pass, step): Step) -> f64 {
    let loss = pass.await.expect("a pass").metrics["loss:sum"];
    step.await.expect("a step");
    loss
}

/// Samples from a checkpoint. Without a seed, the samples would follow from the session, which is
/// another one in every run.
async fn sample(service: &ServiceClient, path: &TinkerPath) -> Vec<Vec<u32>> {
    let sampler = service
        .create_sampling_client(path)
        .await
        .expect("a sampler");
    let params = SamplingParams {
        max_tokens: Some(8),
        seed: Some(11),
        stop: Some(Stop::Tokens(vec![])),
        ..SamplingParams::default()
    };
    let ask = |i| {
        let prompt = ModelInput::from_tokens(tokens(i, 5));
        sampler.sample(prompt, params.clone(), SampleOptions::default())
    };
    // All are under way before the first is awaited; their numbers are those of the calls.
    let asked: Vec<_> = (0..N_SAMPLES).map(ask).collect();
    let mut samples = Vec::new();
    for sampled in asked {
        let sequences = sampled.await.expect("a sample").sequences;
        samples.extend(sequences.into_iter().map(|sequence| sequence.tokens));
    }
    samples
}
