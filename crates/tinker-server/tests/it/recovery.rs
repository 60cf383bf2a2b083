//! Rebuilding a run from what a crash left: whole, from its own data, or not at all.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use tinker_server::AppOptions;

use crate::durability::{image, weights};
use crate::fake::{Faults, load_with};
use crate::harness::{Harness, options};

fn with_faults(home: &Path, faults: &Faults) -> Harness {
    Harness::with(AppOptions {
        loader: load_with(faults.clone()),
        ..options(home)
    })
}

async fn saved(server: &Harness, run: &str, seq: u64, name: &str) -> String {
    let body = json!({"model_id": run, "seq_id": seq, "path": name, "overwrite": true});
    let id = server.submit("/save_weights", body).await;
    server.result(&id).await.json()["path"]
        .as_str()
        .unwrap()
        .to_owned()
}

async fn train(server: &Harness, run: &str, seqs: std::ops::RangeInclusive<u64>) {
    for seq in seqs {
        let id = if seq % 2 == 1 {
            server.forward_backward(run, seq, &[seq as u32, 3]).await
        } else {
            server.optim_step(run, seq).await
        };
        assert_ne!(server.result(&id).await.body, b"");
    }
}

fn run_dir(home: &Path, run: &str) -> PathBuf {
    home.join("server/runs").join(run.replace(':', "_"))
}

fn sorted(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths
}

#[tokio::test]
async fn a_run_that_cannot_be_rebuilt_takes_no_operation() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let id = server.forward_backward(&run, 1, &[9, 9]).await;
    server.output(&id).await;
    let copy = image(home.path());
    let faults = Faults {
        refused: Some(vec![9, 9]),
        ..Faults::default()
    };

    let again = with_faults(copy.path(), &faults);

    for seq in [2, 3] {
        let id = again.optim_step(&run, seq).await;
        let failure = again.failure(&id).await;
        assert!(failure.contains("this backend refuses"), "{failure}");
    }
}

#[tokio::test]
async fn a_run_without_any_readable_snapshot_says_so() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    train(&server, &run, 1..=12).await;
    let copy = image(home.path());
    let snapshots = sorted(&run_dir(copy.path(), &run).join("snapshots"));
    for dir in &snapshots {
        std::fs::write(dir.join("adapter_model.safetensors"), b"damage").unwrap();
    }

    let again = Harness::open(copy.path());

    let id = again.optim_step(&run, 13).await;
    let failure = again.failure(&id).await;
    assert!(failure.contains("no readable snapshot"), "{failure}");
}

#[tokio::test]
async fn a_run_of_a_newer_program_is_refused_and_not_given_up() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    train(&server, &run, 1..=4).await;
    let copy = image(home.path());
    let manifest = sorted(&run_dir(copy.path(), &run).join("snapshots"))[0].join("manifest.json");
    let known = std::fs::read(&manifest).unwrap();
    let mut newer: Value = serde_json::from_slice(&known).unwrap();
    newer["format_version"] = json!(99);
    std::fs::write(&manifest, newer.to_string()).unwrap();

    let again = Harness::open(copy.path());
    let id = again.optim_step(&run, 5).await;
    let failure = again.failure(&id).await;
    assert!(failure.contains("format version 99 is newer"), "{failure}");
    drop(again);
    std::fs::write(&manifest, known).unwrap();

    let again = Harness::open(copy.path());
    let id = again.optim_step(&run, 6).await;
    assert_eq!(again.result(&id).await.json()["metrics"]["step"], 3.0);
}

#[tokio::test]
async fn loaded_weights_stay_what_they_were_when_their_checkpoint_is_overwritten() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let (first, second) = (server.run(&session, 0).await, server.run(&session, 1).await);
    train(&server, &first, 1..=2).await;
    let path = saved(&server, &first, 3, "x").await;
    let load = json!({"model_id": second, "seq_id": 1, "path": path, "optimizer": true});
    let id = server.submit("/load_weights", load).await;
    assert_eq!(server.result(&id).await.json()["path"], path);
    let copy = image(home.path());

    let again = Harness::open(copy.path());
    train(&again, &first, 4..=6).await;
    saved(&again, &first, 7, "x").await;
    saved(&again, &second, 2, "end").await;
    saved(&server, &second, 2, "end").await;

    let of = |home: &Path| weights(home, &second, "end");
    assert!(of(copy.path()) == of(home.path()));
}

#[tokio::test]
async fn a_load_whose_result_a_crash_kept_from_the_log_is_answered_from_its_snapshot() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    train(&server, &run, 1..=2).await;
    let path = saved(&server, &run, 3, "x").await;
    let body = json!({"session_id": session, "model_seq_id": 1, "path": path, "optimizer": true});
    let id = server.submit("/load_weights", body).await;
    let expected = server.result(&id).await;
    let other = expected.json()["model_id"].as_str().unwrap().to_owned();
    let copy = image(home.path());
    let log = sorted(&run_dir(copy.path(), &other).join("log"));
    assert_eq!(log.len(), 2, "the snapshot came before the result");
    std::fs::write(&log[1], b"").unwrap();
    let url = format!("/training_runs/{run}/checkpoints/weights/x");

    let again = Harness::open(copy.path());

    assert_eq!(again.result(&id).await, expected);
    assert_eq!(again.delete(&url).await.status, 204);
    let step = again.optim_step(&other, 1).await;
    assert_eq!(again.result(&step).await.json()["metrics"]["step"], 2.0);
}

/// Trains two runs that share a base model, and leaves the gradients of each in flight. Then the
/// first one's operation `tokens` fails, and both take their steps; what they end with.
async fn gradients_in_flight(home: &Path, n_steps: u64, tokens: &[u32]) -> [Vec<u8>; 2] {
    let server = Harness::open(home);
    let session = server.session().await;
    let runs = [server.run(&session, 0).await, server.run(&session, 1).await];
    for run in &runs {
        train(&server, run, 1..=2 * n_steps).await;
        for seq in [2 * n_steps + 1, 2 * n_steps + 2] {
            let id = server.forward_backward(run, seq, &[seq as u32, 7]).await;
            server.output(&id).await;
        }
    }
    let next = 2 * n_steps + 3;
    let failed = server.forward_backward(&runs[0], next, tokens).await;
    assert!(server.result(&failed).await.json()["error"].is_string());
    let mut ends = Vec::new();
    for (run, next) in runs.iter().zip([next + 1, next]) {
        let step = server.optim_step(run, next).await;
        let expected = (n_steps + 1) as f64;
        assert_eq!(
            server.result(&step).await.json()["metrics"]["step"],
            expected
        );
        saved(&server, run, next + 1, "end").await;
        ends.push(weights(home, run, "end"));
    }
    ends.try_into().unwrap()
}

#[tokio::test]
async fn gradients_in_flight_survive_a_panic_byte_for_byte() {
    // Snapshots are taken after 4 operations: with none, behind some, and in the middle of them.
    for n_steps in [0, 1, 2, 3, 5] {
        let [undisturbed, panicked] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];

        // A token beyond the vocabulary is refused without a panic.
        let expected = gradients_in_flight(undisturbed.path(), n_steps, &[99, 99, 99]).await;
        let actual = gradients_in_flight(panicked.path(), n_steps, &[13, 13, 13]).await;

        assert!(actual == expected, "after {n_steps} steps");
    }
}

#[tokio::test]
async fn a_panic_in_a_snapshot_does_not_end_the_engine() {
    let home = tempfile::tempdir().unwrap();
    let faults = Faults::default();
    let server = with_faults(home.path(), &faults);
    let run = server.run(&server.session().await, 0).await;
    faults.export_panics.store(true, Ordering::SeqCst);

    train(&server, &run, 1..=5).await;

    assert!(!faults.export_panics.load(Ordering::SeqCst), "it panicked");
    let step = server.optim_step(&run, 6).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 3.0);
}
