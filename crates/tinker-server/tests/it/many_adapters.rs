//! Many adapters of one base model, training and sampling at once: each as if it were alone.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tinker_server::{ApiToken, AppOptions};
use tinker_types::{ForwardBackwardOutput, SampledSequence};
use tokio::task::JoinSet;

use crate::harness::{Harness, TOKEN, datum, fb};

const N: u64 = 64;

/// Everything that a run gave.
#[derive(Debug, PartialEq)]
struct Results {
    outputs: Vec<ForwardBackwardOutput>,
    samples: Vec<Vec<SampledSequence>>,
    /// Weights and moments as they were saved at the end.
    files: Vec<u8>,
}

fn open(home: &Path) -> Arc<Harness> {
    Arc::new(Harness::with(AppOptions {
        threads: 2,
        ..AppOptions::new(home.to_owned(), ApiToken::new(TOKEN).unwrap())
    }))
}

fn tiny_model() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/numerics/qwen3");
    root.canonicalize().unwrap()
}

async fn created(server: &Harness, session: &str, number: u64) -> String {
    let body = json!({"session_id": session, "model_seq_id": number,
        "base_model": tiny_model(), "lora_config": {"rank": 4, "seed": 100 + number}});
    let id = server.submit("/create_model", body).await;
    let made: Value = server.result(&id).await.json();
    made["model_id"].as_str().unwrap().to_owned()
}

/// Tokens that belong to one run.
fn tokens(number: u64, length: u64) -> Vec<u32> {
    let token = |i: u64| ((number * 7 + i * 13 + i * i) % 32) as u32;
    (0..length).map(token).collect()
}

async fn sampled(server: &Harness, sampler: &str, number: u64) -> Vec<SampledSequence> {
    let prompt = tokens(number, 3 + number % 20);
    let body = json!({"sampling_session_id": sampler, "seq_id": 0, "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
        "sampling_params": {"max_tokens": 4 + number % 9, "stop": [], "seed": number}});
    let id = server.submit("/asample", body).await;
    let sequences = server.samples(&id).await.sequences;
    let unnamed = |sequence| SampledSequence {
        sequence_id: None,
        ..sequence
    };
    sequences.into_iter().map(unnamed).collect()
}

/// Two steps, with samples after each from the weights that it left.
async fn lived(server: Arc<Harness>, home: PathBuf, session: String, number: u64) -> Results {
    let run = created(&server, &session, number).await;
    let (mut outputs, mut samples) = (Vec::new(), Vec::new());
    for step in 0..2 {
        let seq = 1 + 3 * step;
        let data = (1..=2).map(|i| datum(&tokens(number + i, 5 + (number + step) % 17)));
        let answer = server.post_proto(&fb(&run, seq, data.collect())).await;
        let pass = answer.json()["request_id"].as_str().unwrap().to_owned();
        server.optim_step(&run, seq + 1).await;
        let body = json!({"model_id": run, "seq_id": seq + 2,
            "sampling_session_seq_id": 1000 * (step + 1) + number});
        let save = server.submit("/save_weights_for_sampler", body).await;
        outputs.push(server.output(&pass).await);
        let saved = server.result(&save).await.json();
        let sampler = saved["sampling_session_id"].as_str().unwrap();
        samples.push(sampled(&server, sampler, number).await);
    }
    let body = json!({"model_id": run, "seq_id": 7, "path": "end"});
    let id = server.submit("/save_weights", body).await;
    server.result(&id).await;
    let dir = home
        .join("server/checkpoints")
        .join(run.replace(':', "_"))
        .join("weights/end");
    let mut files = std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    files.extend(std::fs::read(dir.join("optimizer.safetensors")).unwrap());
    Results {
        outputs,
        samples,
        files,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_adapters_at_once_do_what_each_does_alone() {
    let (home, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = open(home.path());
    let session = server.session().await;
    let mut runs = JoinSet::new();
    for number in 0..N {
        let life = lived(
            Arc::clone(&server),
            home.path().to_owned(),
            session.clone(),
            number,
        );
        runs.spawn(async move { (number, life.await) });
    }
    let mut together = runs.join_all().await;
    together.sort_by_key(|(number, _)| *number);
    drop(server);

    let server = open(other.path());
    let session = server.session().await;
    for (number, results) in &together {
        let home = other.path().to_owned();
        let alone = lived(Arc::clone(&server), home, session.clone(), *number).await;
        assert!(
            *results == alone,
            "adapter {number}: {results:?}\n{alone:?}"
        );
    }
    assert!(together[0].1.files != together[1].1.files);
}
