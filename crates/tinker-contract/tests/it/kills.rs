//! A server that is killed at random moments under load keeps every promise, byte for byte.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use tempfile::TempDir;
use tinker_api::{ModelInput, SampleOptions, SamplingParams, SamplingSource, Stop};
use tinker_contract::kills::{disturbed, faults_of, undisturbed};
use tinker_contract::target::{ServerProcess, service, tiny_model};

/// Steps of each run of a load.
const N_STEPS: u32 = 60;

/// Seed of the first load, and kills; `cargo xtask kill` asks for others by `TINKER_KILLS`, as
/// `FIRST+N`.
const KILLS: (u64, u32) = (1, 12);

/// Finished futures that a server finds at its start, and how long that may take.
const N_FUTURES: u64 = 10_000;
const LONGEST_START: Duration = Duration::from_secs(1);

#[expect(clippy::disallowed_methods, reason = "longer runs ask for more kills")]
fn kills() -> (u64, u32) {
    let parse = |text: String| {
        let (first, n) = text.split_once('+').expect("FIRST+N");
        (
            first.parse().expect("a number"),
            n.parse().expect("a number"),
        )
    };
    std::env::var("TINKER_KILLS").map_or(KILLS, parse)
}

/// A copy of the server, which no build replaces under its feet.
fn program(dir: &TempDir) -> PathBuf {
    let copy = dir.path().join("contract-server");
    std::fs::copy(env!("CARGO_BIN_EXE_contract-server"), &copy).unwrap();
    copy
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_under_load_keeps_every_promise() {
    let dir = TempDir::new().unwrap();
    let program = program(&dir);
    let quiet = undisturbed(&program, N_STEPS).await;
    println!(
        "undisturbed: {:.1?}, {} operations, {} files",
        quiet.time, quiet.n_acknowledged, quiet.n_files
    );
    // Every run: 60 steps of two requests, 16 saves, 30 samples, its creation.
    assert!(quiet.n_acknowledged > 3 * 160, "too small a load");

    let (first, n_kills) = kills();
    let (mut n_left, mut failed) = (n_kills, Vec::new());
    for seed in first.. {
        let load = disturbed(&program, N_STEPS, seed, n_left).await;
        let n = load.n_kills + load.n_kills_in_startup;
        println!(
            "seed {seed}: {} kills, {} of them in start-up, {} operations, slowest start {:.0?}, {:.1?}",
            n, load.n_kills_in_startup, load.n_acknowledged, load.slowest_start, load.time
        );
        for fault in faults_of(&load, &quiet) {
            println!("seed {seed}: {fault}");
            failed.push(seed);
        }
        assert!(
            n > 0,
            "seed {seed}: the load was over before the first kill"
        );
        n_left -= n.min(n_left);
        if n_left == 0 {
            break;
        }
    }

    assert!(failed.is_empty(), "seeds {failed:?} broke a promise");
}

/// Draws `N_FUTURES` samples of a token each.
async fn sample_many(server: &ServerProcess, model: &Path) {
    let service = service(&server.base_url, &server.api_key);
    let base_model = SamplingSource::BaseModel(model.display().to_string());
    let sampler = service.create_sampling_client(base_model).await.unwrap();
    let ask = |seed| {
        let params = SamplingParams {
            max_tokens: Some(1),
            seed: Some(seed as i64),
            stop: Some(Stop::Tokens(vec![])),
            ..SamplingParams::default()
        };
        let prompt = ModelInput::from_tokens(vec![5, 6]);
        sampler.sample(prompt, params, SampleOptions::default())
    };
    let sampled = stream::iter(0..N_FUTURES).map(ask).buffer_unordered(200);
    let n_sampled = sampled.map(Result::unwrap).count().await;
    assert_eq!(n_sampled as u64, N_FUTURES);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_ten_thousand_finished_futures_starts_within_a_second() {
    let home = TempDir::new().unwrap();
    let (program, model) = (program(&home), tiny_model(&home.path().join("model")));
    let start = || ServerProcess::start(&program, home.path(), &model, 0, 1);
    let mut server = start();
    sample_many(&server, &model).await;

    // The best of a few: other tests may hold the machine for a while.
    let mut best = Duration::MAX;
    for _ in 0..3 {
        server.kill();
        let begun = Instant::now();
        server = start();
        best = best.min(begun.elapsed());
    }

    println!("start with {N_FUTURES} finished futures: {best:.0?}");
    assert!(best < LONGEST_START, "{best:?}");
}
