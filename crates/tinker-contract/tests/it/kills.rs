//! A server that is killed at random moments under load keeps every promise, byte for byte.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use tempfile::TempDir;
use tinker_api::{ModelInput, SampleOptions, SamplingParams, SamplingSource, Stop};
use tinker_contract::faults::{FaultServer, Seen};
use tinker_contract::kills::{disturbed, faults_of, undisturbed};
use tinker_contract::target::{ServerProcess, service, tiny_model};

use crate::plain_http::plain_http;

/// Steps of each run of a load.
const N_STEPS: u32 = 60;

/// Seed of the first load, and kills; `cargo xtask kill` asks for others by `TINKER_KILLS`, as
/// `FIRST+N`.
const KILLS: (u64, u32) = (1, 25);

/// Finished futures that a server finds at its start; `cargo xtask kill` asks for more by
/// `TINKER_KILL_FUTURES`, and measures.
const N_FUTURES: u64 = 300;
/// Those of them whose results are compared.
const N_COMPARED: u64 = 30;

#[expect(
    clippy::disallowed_methods,
    reason = "longer runs ask for more than the tests do"
)]
fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn kills() -> (u64, u32) {
    let parse = |text: String| {
        let (first, n) = text.split_once('+').expect("FIRST+N");
        (
            first.parse().expect("a number"),
            n.parse().expect("a number"),
        )
    };
    setting("TINKER_KILLS").map_or(KILLS, parse)
}

fn n_futures() -> u64 {
    setting("TINKER_KILL_FUTURES").map_or(N_FUTURES, |n| n.parse().expect("a number"))
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

/// Draws `n` samples of a token each.
async fn sample_many(base_url: &str, api_key: &str, model: &Path, n: u64) {
    let service = service(base_url, api_key);
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
    let sampled = stream::iter(0..n).map(ask).buffer_unordered(200);
    assert_eq!(sampled.map(Result::unwrap).count().await as u64, n);
}

/// Results by the body of the request that fetched them.
type Results = Arc<Mutex<BTreeMap<Vec<u8>, Vec<u8>>>>;

/// Draws samples and keeps their results as they went over the wire.
async fn sample_and_keep(server: &ServerProcess, model: &Path) -> Results {
    let proxy = FaultServer::before(&server.base_url).await;
    let results = Results::default();
    let kept = Arc::clone(&results);
    proxy.observe(move |seen| {
        // Whatever is not JSON is a result in protobuf.
        if let Seen::Answered("/api/v1/retrieve_future", request, answer) = seen
            && serde_json::from_slice::<Value>(answer).is_err()
        {
            kept.lock()
                .unwrap()
                .insert(request.to_vec(), answer.to_vec());
        }
    });
    sample_many(&proxy.base_url(), &server.api_key, model, N_COMPARED).await;
    results
}

/// A result as the server hands it out now.
async fn result(http: &reqwest::Client, server: &ServerProcess, request: &[u8]) -> Vec<u8> {
    let id = serde_json::from_slice::<Value>(request).unwrap()["request_id"].clone();
    let url = format!("{}/api/v1/retrieve_future", server.base_url);
    let asked = http
        .post(url)
        .header("x-api-key", &server.api_key)
        .header("accept", "application/x-protobuf, application/json")
        .body(json!({ "request_id": id }).to_string());
    let answer = asked.send().await.unwrap();
    answer.bytes().await.unwrap().to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_has_the_results_of_all_finished_futures() {
    let home = TempDir::new().unwrap();
    let (program, model) = (program(&home), tiny_model(&home.path().join("model")));
    let start = || ServerProcess::start(&program, home.path(), &model, 0, 1);
    let mut server = start();
    let results = sample_and_keep(&server, &model).await;
    let n_futures = n_futures();
    sample_many(
        &server.base_url,
        &server.api_key,
        &model,
        n_futures - N_COMPARED,
    )
    .await;

    // The best of a few: others may hold the machine for a while.
    let mut best = Duration::MAX;
    for _ in 0..3 {
        server.kill();
        let begun = Instant::now();
        server = start();
        best = best.min(begun.elapsed());
    }

    println!(
        "start-up with {n_futures} finished futures: {} ms",
        best.as_millis()
    );
    let http = plain_http();
    let results = std::mem::take(&mut *results.lock().unwrap());
    assert_eq!(results.len() as u64, N_COMPARED);
    for (request, expected) in results {
        assert_eq!(result(&http, &server, &request).await, expected);
    }
}
