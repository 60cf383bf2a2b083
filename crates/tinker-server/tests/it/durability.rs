//! A server that ends without a word and comes back: same futures, same bytes.

use std::path::Path;

use serde_json::json;
use tinker_server::{ApiToken, App, AppOptions};

use crate::harness::{Harness, TOKEN, create_body, options};

/// Copies a data directory as a killed process would leave it: whatever was handed to the
/// operating system, and nothing else.
fn image(home: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_dir(home, copy.path());
    copy
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn weights(home: &Path, run: &str, name: &str) -> Vec<u8> {
    let run = run.replace(':', "_");
    let dir = home
        .join("server/checkpoints")
        .join(run)
        .join("weights")
        .join(name);
    let mut bytes = std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    bytes.extend(std::fs::read(dir.join("optimizer.safetensors")).unwrap());
    bytes
}

/// Operation `seq` of the script that all tests here run: forward-backward and step in turn.
async fn operate(server: &Harness, run: &str, seq: u64) -> String {
    if seq % 2 == 1 {
        server
            .forward_backward(run, seq, &[seq as u32 % 32, 3, 5])
            .await
    } else {
        server.optim_step(run, seq).await
    }
}

async fn save_final(server: &Harness, run: &str, seq: u64) {
    let body = json!({"model_id": run, "seq_id": seq, "path": "final"});
    let id = server.submit("/save_weights", body).await;
    assert!(server.result(&id).await.json()["path"].is_string());
}

#[tokio::test]
async fn killed_after_any_operation_the_run_ends_with_the_same_bytes() {
    const N: u64 = 11;
    let undisturbed = tempfile::tempdir().unwrap();
    let server = Harness::open(undisturbed.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let mut images = Vec::new();
    for seq in 1..=N {
        let id = operate(&server, &run, seq).await;
        // Half of the images are taken while the operation may be running.
        if seq % 3 != 0 {
            server.result(&id).await;
        }
        images.push((seq, image(undisturbed.path())));
    }
    save_final(&server, &run, N + 1).await;
    let expected = weights(undisturbed.path(), &run, "final");

    for (killed_at, home) in images {
        let server = Harness::open(home.path());
        for seq in 1..=N {
            // The client sends everything again that it had no answer to, here simply everything.
            let id = operate(&server, &run, seq).await;
            server.result(&id).await;
        }
        save_final(&server, &run, N + 1).await;
        assert!(
            weights(home.path(), &run, "final") == expected,
            "killed after {killed_at}"
        );
    }
}

#[tokio::test]
async fn results_are_the_same_before_and_after_a_kill() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let mut before = Vec::new();
    for seq in 1..=10 {
        let id = operate(&server, &run, seq).await;
        before.push((id.clone(), server.result(&id).await));
    }
    let copy = image(home.path());

    let again = Harness::open(copy.path());

    for (id, expected) in before {
        let answer = again.poll(&id).await;
        // Old results may be forgotten once snapshots cover them, but never change.
        assert!(
            answer == expected || answer.status == 410,
            "{id}: {answer:?}"
        );
    }
}

#[tokio::test]
async fn results_nobody_fetched_survive_snapshots_and_kills() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let first = operate(&server, &run, 1).await;
    for seq in 2..=40 {
        let id = operate(&server, &run, seq).await;
        server.result(&id).await;
    }
    let copy = image(home.path());
    let expected = server.output(&first).await;

    let again = Harness::open(copy.path());

    assert_eq!(again.output(&first).await, expected);
}

#[tokio::test]
async fn snapshots_keep_the_log_short() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let mut sizes = Vec::new();
    for seq in 1..=120 {
        let id = operate(&server, &run, seq).await;
        server.result(&id).await;
        if seq % 40 == 0 {
            sizes.push(size(&home.path().join("server/runs")));
        }
    }

    assert!(sizes[2] < sizes[0] * 2, "{sizes:?}");
}

fn size(dir: &Path) -> u64 {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                size(&entry.path())
            } else {
                entry.metadata().unwrap().len()
            }
        })
        .sum()
}

#[tokio::test]
async fn a_torn_log_tail_is_cut_off_and_the_operation_can_be_sent_again() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let done = operate(&server, &run, 1).await;
    server.result(&done).await;
    let copy = image(home.path());
    let log = copy
        .path()
        .join("server/runs")
        .join(run.replace(':', "_"))
        .join("log/00000001.seg");
    let mut bytes = std::fs::read(&log).unwrap();
    bytes.extend([200, 0, 0, 0, 1, 2, 3]);
    std::fs::write(&log, bytes).unwrap();

    let again = Harness::open(copy.path());

    let expected = server.output(&operate(&server, &run, 1).await).await;
    assert_eq!(again.output(&done).await, expected);
    let next = operate(&again, &run, 2).await;
    assert_eq!(again.result(&next).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn a_damaged_snapshot_is_passed_over_for_the_one_before() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    for seq in 1..=12 {
        let id = operate(&server, &run, seq).await;
        server.result(&id).await;
    }
    let copy = image(home.path());
    let snapshots = copy
        .path()
        .join("server/runs")
        .join(run.replace(':', "_"))
        .join("snapshots");
    let mut dirs: Vec<_> = std::fs::read_dir(&snapshots)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    dirs.sort();
    assert_eq!(dirs.len(), 2);
    std::fs::write(dirs[1].join("adapter_model.safetensors"), b"damage").unwrap();

    let again = Harness::open(copy.path());

    save_final(&again, &run, 13).await;
    save_final(&server, &run, 13).await;
    let (a, b) = (
        weights(copy.path(), &run, "final"),
        weights(home.path(), &run, "final"),
    );
    assert!(a == b);
}

#[tokio::test]
async fn an_orderly_stop_and_start_changes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let undisturbed = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    for seq in 1..=3 {
        let id = operate(&server, &run, seq).await;
        server.result(&id).await;
    }
    copy_dir(home.path(), undisturbed.path());
    let app = std::sync::Arc::clone(&server.app);
    tokio::task::spawn_blocking(move || app.stop())
        .await
        .unwrap()
        .unwrap();
    let refused = server.post("/create_model", create_body(&session, 9)).await;
    assert_eq!(refused.status, 503);
    drop(server);

    for dir in [home.path(), undisturbed.path()] {
        let server = Harness::open(dir);
        for seq in 4..=6 {
            let id = operate(&server, &run, seq).await;
            server.result(&id).await;
        }
        save_final(&server, &run, 7).await;
    }

    let (a, b) = (
        weights(home.path(), &run, "final"),
        weights(undisturbed.path(), &run, "final"),
    );
    assert!(a == b);
}

#[tokio::test]
async fn an_unloaded_run_comes_back_with_its_next_operation() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    operate(&server, &run, 1).await;
    let copy = image(home.path());

    let unload = server
        .submit("/unload_model", json!({"model_id": run}))
        .await;
    assert_eq!(server.result(&unload).await.json()["model_id"], run);

    let a = operate(&server, &run, 2).await;
    let other = Harness::open(copy.path());
    let b = operate(&other, &run, 2).await;
    assert_eq!(server.result(&a).await, other.result(&b).await);
}

#[test]
fn a_data_directory_that_cannot_be_written_is_named() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("file");
    std::fs::write(&file, b"").unwrap();

    let error =
        App::open(AppOptions::new(file.clone(), ApiToken::new(TOKEN).unwrap())).unwrap_err();

    assert!(
        error.to_string().contains(file.to_str().unwrap()),
        "{error}"
    );
    drop(options(home.path()));
}
