//! A disk that is full or read-only at the worst moment.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tinker_server::{AppOptions, Disk, Limits, OsDisk};

use crate::harness::{Harness, is_turn, optim, options};

/// Refuses what its switches say.
#[derive(Debug, Default)]
struct Faulty {
    no_files: AtomicBool,
    no_appends: AtomicBool,
    no_renames: AtomicBool,
}

fn refuse(switch: &AtomicBool) -> io::Result<()> {
    if switch.load(Ordering::SeqCst) {
        return Err(io::ErrorKind::StorageFull.into());
    }
    Ok(())
}

impl Disk for Faulty {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        OsDisk.create_dir_all(path)
    }
    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if refuse(&self.no_files).is_err() {
            OsDisk.write_new(path, &bytes[..bytes.len() / 2])?;
        }
        refuse(&self.no_files)?;
        OsDisk.write_new(path, bytes)
    }
    fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if refuse(&self.no_appends).is_err() {
            OsDisk.append(file, path, &bytes[..bytes.len() / 2])?;
        }
        refuse(&self.no_appends)?;
        OsDisk.append(file, path, bytes)
    }
    fn truncate(&self, file: &File, len: u64) -> io::Result<()> {
        OsDisk.truncate(file, len)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        refuse(&self.no_renames)?;
        OsDisk.rename(from, to)
    }
}

fn over(home: &Path) -> (Harness, Arc<Faulty>) {
    let disk = Arc::new(Faulty::default());
    let options = AppOptions {
        disk: disk.clone(),
        limits: Limits {
            poll_hold: Duration::from_millis(10),
            fault_pause: Duration::ZERO,
            ..options(home).limits
        },
        ..options(home)
    };
    (Harness::with(options), disk)
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}

/// Waits until an operation is held back; the reason that its owner is told.
async fn reason(server: &Harness, id: &str) -> String {
    loop {
        let answer = server.poll(id).await;
        assert_eq!(answer.status, 408, "it ended: {}", answer.json());
        if let Some(reason) = answer.json()["queue_state_reason"].as_str() {
            assert_eq!(answer.json()["queue_state"], "paused_capacity");
            // Until it was tried once it waits for its turn.
            if !is_turn(reason) {
                return reason.to_owned();
            }
        }
    }
}

fn save(run: &str, seq: u64, name: &str) -> Value {
    json!({"model_id": run, "seq_id": seq, "path": name, "overwrite": true})
}

#[tokio::test]
async fn a_save_waits_while_the_disk_is_full_and_keeps_its_number() {
    let home = tempfile::tempdir().unwrap();
    let (server, disk) = over(home.path());
    let run = server.run(&server.session().await, 0).await;

    for (seq, switch) in [(1, &disk.no_files), (2, &disk.no_renames)] {
        switch.store(true, Ordering::SeqCst);
        let name = format!("x{seq}");
        let id = server.submit("/save_weights", save(&run, seq, &name)).await;
        let text = reason(&server, &id).await;
        assert!(text.contains("the disk is full"), "{text}");
        let listed = server.get("/checkpoints").await.json()["checkpoints"].to_string();
        assert!(!listed.contains(&name), "{listed}");

        switch.store(false, Ordering::SeqCst);
        let saved = server.result(&id).await.json();
        assert!(saved["path"].as_str().unwrap().ends_with(&name), "{saved}");
        // Not before: until then another attempt may be under way.
        let left = home.path().join("server/tmp");
        assert!(is_empty(&left), "what failed attempts wrote is still there");
    }

    let step = server.optim_step(&run, 3).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn every_kind_of_save_waits_for_a_full_disk() {
    let home = tempfile::tempdir().unwrap();
    let (server, disk) = over(home.path());
    let run = server.run(&server.session().await, 0).await;
    let named = json!({"model_id": run, "seq_id": 1, "path": "x"});
    let unnamed = json!({"model_id": run, "seq_id": 2, "sampling_session_seq_id": 5});

    for (body, field) in [(named, "path"), (unnamed, "sampling_session_id")] {
        disk.no_files.store(true, Ordering::SeqCst);
        let id = server.submit("/save_weights_for_sampler", body).await;
        reason(&server, &id).await;
        disk.no_files.store(false, Ordering::SeqCst);
        let saved = server.result(&id).await.json();
        assert!(saved[field].is_string(), "{saved}");
    }
}

#[tokio::test]
async fn another_run_trains_while_a_save_waits_for_the_disk() {
    let home = tempfile::tempdir().unwrap();
    let (server, disk) = over(home.path());
    let session = server.session().await;
    let (one, other) = (server.run(&session, 0).await, server.run(&session, 1).await);
    disk.no_files.store(true, Ordering::SeqCst);
    let held = server.submit("/save_weights", save(&one, 1, "x")).await;
    reason(&server, &held).await;

    let step = server.optim_step(&other, 1).await;

    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
    reason(&server, &held).await;
}

#[tokio::test]
async fn overwriting_on_a_full_disk_keeps_the_old_checkpoint() {
    let home = tempfile::tempdir().unwrap();
    let (server, disk) = over(home.path());
    let run = server.run(&server.session().await, 0).await;
    let id = server.submit("/save_weights", save(&run, 1, "x")).await;
    let path = server.result(&id).await.json()["path"].clone();
    let dir = home
        .path()
        .join("server/checkpoints")
        .join(run.replace(':', "_"))
        .join("weights/x");
    let before = std::fs::read(dir.join("manifest.json")).unwrap();

    disk.no_files.store(true, Ordering::SeqCst);
    let id = server.submit("/save_weights", save(&run, 2, "x")).await;
    reason(&server, &id).await;

    assert_eq!(std::fs::read(dir.join("manifest.json")).unwrap(), before);
    let info = server
        .post("/weights_info", json!({"tinker_path": path}))
        .await;
    assert_eq!(info.status, 200);
}

#[tokio::test]
async fn an_operation_that_cannot_be_logged_is_not_accepted_and_may_be_sent_again() {
    let home = tempfile::tempdir().unwrap();
    let (server, disk) = over(home.path());
    let run = server.run(&server.session().await, 0).await;

    disk.no_appends.store(true, Ordering::SeqCst);
    let refused = server.post("/optim_step", optim(&run, 1)).await;
    assert!(refused.status >= 500, "{refused:?}");
    assert!(
        refused.detail().contains("the disk is full"),
        "{}",
        refused.detail()
    );

    disk.no_appends.store(false, Ordering::SeqCst);
    let step = server.optim_step(&run, 1).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn a_result_that_cannot_be_logged_is_still_answered() {
    let home = tempfile::tempdir().unwrap();
    let (server, disk) = over(home.path());
    let run = server.run(&server.session().await, 0).await;

    // The second operation waits for the first, so its result comes after the switch.
    let later = server.optim_step(&run, 2).await;
    let first = server.optim_step(&run, 1).await;
    server.result(&first).await;
    disk.no_appends.store(true, Ordering::SeqCst);

    assert_eq!(server.result(&later).await.json()["metrics"]["step"], 2.0);
}

#[tokio::test]
async fn a_snapshot_on_a_full_disk_is_tried_again_later() {
    let home = tempfile::tempdir().unwrap();
    let (server, disk) = over(home.path());
    let run = server.run(&server.session().await, 0).await;
    disk.no_files.store(true, Ordering::SeqCst);
    for seq in 1..=5 {
        let step = server.optim_step(&run, seq).await;
        server.result(&step).await;
    }
    let snapshots = home
        .path()
        .join("server/runs")
        .join(run.replace(':', "_"))
        .join("snapshots");
    assert!(!snapshots.exists() || is_empty(&snapshots));

    disk.no_files.store(false, Ordering::SeqCst);
    let step = server.optim_step(&run, 6).await;
    server.result(&step).await;
    let unload = server
        .submit("/unload_model", json!({"model_id": run}))
        .await;
    server.result(&unload).await;

    assert!(!is_empty(&snapshots));
}
