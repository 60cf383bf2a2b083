//! The server is killed again and again while a run trains; nothing of the run is lost or changed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tinker_api::{
    AdamParams, ApiFuture, ForwardBackwardOutput, LoraConfig, LossFn, ModelInput,
    OptimStepResponse, SampleOptions, SamplingParams, SaveOptions, ServiceClient, Stop,
};
use tinker_contract::suite::{batch, tokens};
use tinker_contract::target::{ServerProcess, checkpoint_tensors, service, tiny_model};
use tokio::sync::watch;

/// Steps of the run.
const N_STEPS: u32 = 150;
/// Steps that are submitted before the result of the first one is awaited.
const N_AHEAD: usize = 6;
/// How many times the server is killed; `TINKER_TEST_KILLS` asks for more.
const N_KILLS: u64 = 25;

/// A disturbed run takes seconds; one that takes this long waits for something that never comes.
const PATIENCE: Duration = Duration::from_secs(600);

async fn within_patience<T>(run: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, run)
        .await
        .expect("the run hangs")
}

/// Random numbers that follow from a seed (`SplitMix64`, Steele et al. 2014).
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// When to kill: once this many steps are done, and this much later.
#[derive(Debug)]
struct Moment {
    n_done: u32,
    delay: Duration,
}

fn moments(seed: u64, n: u64) -> Vec<Moment> {
    let mut draws = Draws(seed);
    let mut moments: Vec<Moment> = (0..n)
        .map(|i| Moment {
            // The last few hit the saves and the sample that follow the steps.
            n_done: if i + 3 < n {
                draws.below(u64::from(N_STEPS)) as u32
            } else {
                N_STEPS
            },
            // Up to a few operations: parsing, logging, computing, answering.
            delay: Duration::from_micros(draws.below(20_000)),
        })
        .collect();
    moments.sort_by_key(|moment| moment.n_done);
    moments
}

/// What a run leaves.
#[derive(Debug, PartialEq)]
struct Trace {
    /// Tensors of the sampler checkpoint and of the last training checkpoint.
    files: Vec<(String, Vec<u8>)>,
    losses: Vec<f64>,
    sample: Vec<u32>,
    sample_logprobs: Vec<f32>,
}

type Step = (
    ApiFuture<ForwardBackwardOutput>,
    ApiFuture<OptimStepResponse>,
);

/// Trains, saves and samples; tells how many steps are done.
async fn train(
    service: ServiceClient,
    home: &Path,
    model: &Path,
    progress: watch::Sender<u32>,
) -> Trace {
    let lora = LoraConfig {
        rank: 4,
        seed: Some(7),
        ..LoraConfig::default()
    };
    let base_model = model.display().to_string();
    let trainer = service
        .create_lora_training_client(base_model, lora)
        .await
        .unwrap();
    let adam = AdamParams {
        learning_rate: 2e-3,
        grad_clip_norm: 1.0,
        ..AdamParams::default()
    };
    let mut losses = Vec::new();
    let mut ahead = std::collections::VecDeque::<Step>::new();
    for i in 0..N_STEPS {
        let pass = trainer.forward_backward(batch(i), LossFn::CrossEntropy);
        ahead.push_back((pass, trainer.optim_step(adam)));
        if i % 40 == 20 {
            // Its result is not waited for: saving takes its place among the other operations.
            drop(trainer.save_state(format!("step-{i}"), SaveOptions::default()));
        }
        if ahead.len() > N_AHEAD {
            losses.push(finish(ahead.pop_front().unwrap()).await);
            progress.send_replace(losses.len() as u32);
        }
    }
    for step in ahead {
        losses.push(finish(step).await);
        progress.send_replace(losses.len() as u32);
    }
    let saved = trainer
        .save_weights_for_sampler("final", SaveOptions::default())
        .await
        .unwrap();
    let sampler = service.create_sampling_client(&saved).await.unwrap();
    let params = SamplingParams {
        max_tokens: Some(20),
        seed: Some(3),
        stop: Some(Stop::Tokens(vec![])),
        ..SamplingParams::default()
    };
    let prompt = ModelInput::from_tokens(tokens(1, 5));
    let sampled = sampler
        .sample(prompt, params, SampleOptions::default())
        .await
        .unwrap();
    let sequence = sampled.sequences.into_iter().next().unwrap();
    let state = trainer
        .save_state("final", SaveOptions::default())
        .await
        .unwrap();
    Trace {
        files: [&saved, &state]
            .iter()
            .flat_map(|path| checkpoint_tensors(home, path))
            .collect(),
        losses,
        sample: sequence.tokens,
        sample_logprobs: sequence.logprobs.unwrap(),
    }
}

async fn finish((pass, step): Step) -> f64 {
    let loss = pass.await.unwrap().metrics["loss:sum"];
    step.await.unwrap();
    loss
}

/// Kills and restarts the server at every moment; the last server, once all are over.
async fn kill_at(
    moments: Vec<Moment>,
    mut server: ServerProcess,
    start: impl Fn(u16) -> ServerProcess + Send + 'static,
    mut progress: watch::Receiver<u32>,
) -> ServerProcess {
    for moment in moments {
        progress
            .wait_for(|n_done| *n_done >= moment.n_done)
            .await
            .unwrap();
        tokio::time::sleep(moment.delay).await;
        let port = server.port();
        server.kill();
        server = start(port);
    }
    server
}

#[expect(
    clippy::disallowed_methods,
    reason = "soak runs ask for more kills and other moments"
)]
fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn number(name: &str, default: u64) -> u64 {
    setting(name).map_or(default, |text| text.parse().expect("a number"))
}

/// The server to kill. A soak run names a copy, which no build replaces under its feet.
fn program() -> PathBuf {
    setting("TINKER_TEST_SERVER")
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_contract-server").into())
        .into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_survives_kills_with_the_same_bytes() {
    let (quiet, noisy) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let model = tiny_model(&quiet.path().join("model"));
    let server = ServerProcess::start(&program(), quiet.path(), &model, 0, 1);
    let client = service(&server.base_url, &server.api_key);
    let undisturbed = train(client, quiet.path(), &model, watch::channel(0).0);
    let undisturbed = within_patience(undisturbed).await;
    drop(server);

    let (seed, n_kills) = (
        number("TINKER_TEST_SEED", 20),
        number("TINKER_TEST_KILLS", N_KILLS),
    );
    let moments = moments(seed, n_kills);
    println!("seed {seed}: {n_kills} kills at {moments:?}");
    // Two threads instead of one: their number must not matter either.
    let start = {
        let (home, model) = (noisy.path().to_owned(), model.clone());
        move |port| ServerProcess::start(&program(), &home, &model, port, 2)
    };
    let server = start(0);
    let client = service(&server.base_url, &server.api_key);
    let (progress, seen) = watch::channel(0);
    let begun = Instant::now();
    let killer = tokio::spawn(kill_at(moments, server, start, seen));
    let disturbed = train(client, noisy.path(), &model, progress.clone());
    let disturbed = within_patience(disturbed).await;
    drop(within_patience(killer).await.unwrap());
    println!("{n_kills} kills in {:.1?}", begun.elapsed());

    let names = |trace: &Trace| {
        trace
            .files
            .iter()
            .map(|file| file.0.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        names(&undisturbed),
        [
            "adapter_model.safetensors",
            "adapter_model.safetensors",
            "optimizer.safetensors"
        ]
    );
    assert_eq!(names(&disturbed), names(&undisturbed));
    assert_eq!(disturbed.losses, undisturbed.losses);
    // Not `assert_eq`: it would print the files.
    assert!(
        disturbed == undisturbed,
        "the final weights differ from the undisturbed run's"
    );
}
