//! What the killed server is loaded with: a run that trains, saves in every way there is, and samples.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tinker_api::{
    AdamParams, ApiFuture, ForwardBackwardOutput, LoraConfig, LossFn, ModelInput,
    OptimStepResponse, SampleOptions, SamplerKind, SamplingClient, SamplingParams, SaveOptions,
    ServiceClient, Stop, TinkerPath, TrainingClient,
};

use crate::suite::{batch, tokens};

/// Steps that are submitted before the result of the first one is awaited.
pub(super) const N_AHEAD: usize = 2;
/// Samples of each sampler.
const N_SAMPLES: u32 = 3;

/// What one run leaves.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Leaves {
    /// `loss:sum` of every step.
    pub(super) losses: Vec<f64>,
    /// Tokens of every sample.
    pub(super) samples: Vec<Vec<u32>>,
    /// Everything that was saved under a name.
    pub(super) checkpoints: Vec<TinkerPath>,
}

/// A run under way.
struct Load {
    service: ServiceClient,
    trainer: TrainingClient,
    leaves: Leaves,
    n_done: Arc<AtomicU32>,
}

/// Trains for `n_steps`, saving and sampling, and counts the steps that are done in `n_done`. What it
/// leaves follows from `number`.
///
/// # Panics
/// If an operation fails.
pub(super) async fn run(
    service: ServiceClient,
    base_model: String,
    number: u32,
    n_steps: u32,
    n_done: Arc<AtomicU32>,
) -> Leaves {
    let lora = LoraConfig {
        rank: 4,
        seed: Some(u64::from(number)),
        ..LoraConfig::default()
    };
    let trainer = service
        .create_lora_training_client(base_model, lora)
        .await
        .expect("a training run");
    let mut load = Load {
        service,
        trainer,
        leaves: Leaves::default(),
        n_done,
    };
    load.train(number, n_steps).await;
    load.save("final", false).await;
    load.leaves
}

type Step = (
    ApiFuture<ForwardBackwardOutput>,
    ApiFuture<OptimStepResponse>,
);

impl Load {
    async fn train(&mut self, number: u32, n_steps: u32) {
        let adam = AdamParams {
            learning_rate: 2e-3,
            grad_clip_norm: 1.0,
            ..AdamParams::default()
        };
        let mut ahead = VecDeque::<Step>::new();
        for i in 0..n_steps {
            let pass = self
                .trainer
                .forward_backward(batch(1000 * number + i), LossFn::CrossEntropy);
            ahead.push_back((pass, self.trainer.optim_step(adam)));
            match i % 12 {
                3 => self.save("latest", true).await,
                7 => self.sample_named(&format!("step-{i}")).await,
                11 => self.sample_unnamed().await,
                _ => {}
            }
            if ahead.len() > N_AHEAD
                && let Some(step) = ahead.pop_front()
            {
                self.finish(step).await;
            }
        }
        for step in ahead {
            self.finish(step).await;
        }
    }

    async fn finish(&mut self, (pass, step): Step) {
        let loss = pass.await.expect("a pass").metrics["loss:sum"];
        step.await.expect("a step");
        self.leaves.losses.push(loss);
        self.n_done.fetch_add(1, Ordering::SeqCst);
    }

    async fn save(&mut self, name: &str, overwrite: bool) {
        let options = SaveOptions {
            overwrite,
            ..SaveOptions::default()
        };
        let path = self
            .trainer
            .save_state(name, options)
            .await
            .expect("a save");
        if !self.leaves.checkpoints.contains(&path) {
            self.leaves.checkpoints.push(path);
        }
    }

    async fn sample_named(&mut self, name: &str) {
        let saved = self
            .trainer
            .save_weights_for_sampler(name, SaveOptions::default());
        let path = saved.await.expect("a save");
        let sampler = self.service.create_sampling_client(&path);
        let sampler = sampler.await.expect("a sampler");
        self.leaves.checkpoints.push(path);
        self.sample(&sampler).await;
    }

    async fn sample_unnamed(&mut self) {
        let sampler = self
            .trainer
            .save_weights_and_get_sampling_client(SamplerKind::Snapshot);
        let sampler = sampler.await.expect("a sampler");
        self.sample(&sampler).await;
    }

    /// Samples several at once. Without a seed, the samples would follow from the session, which is
    /// another one every time.
    async fn sample(&mut self, sampler: &SamplingClient) {
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
        // All are under way before the first is awaited.
        let asked: Vec<_> = (0..N_SAMPLES).map(ask).collect();
        for sampled in asked {
            let sequences = sampled.await.expect("a sample").sequences;
            let tokens = sequences.into_iter().map(|sequence| sequence.tokens);
            self.leaves.samples.extend(tokens);
        }
    }
}
