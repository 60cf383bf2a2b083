//! A disk that is full or read-only at the worst moment.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use tinker_server::{AppOptions, Disk, OsDisk};

use crate::harness::{Harness, optim, options};

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
        ..options(home)
    };
    (Harness::with(options), disk)
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}

#[tokio::test]
async fn a_save_on_a_full_disk_fails_whole_and_the_run_goes_on() {
    let home = tempfile::tempdir().unwrap();
    let (server, disk) = over(home.path());
    let run = server.run(&server.session().await, 0).await;
    let save = |seq: u64| json!({"model_id": run, "seq_id": seq, "path": "x"});

    for (seq, switch) in [(1, &disk.no_files), (2, &disk.no_renames)] {
        switch.store(true, Ordering::SeqCst);
        let id = server.submit("/save_weights", save(seq)).await;
        let failure = server.result(&id).await.json();
        switch.store(false, Ordering::SeqCst);
        let text = failure["error"].as_str().unwrap();
        assert_eq!(failure["category"], "server");
        assert!(text.contains("the disk is full"), "{text}");
        assert_eq!(
            server.get("/checkpoints").await.json()["checkpoints"],
            json!([])
        );
        assert!(is_empty(&home.path().join("server/tmp")));
    }

    let step = server.optim_step(&run, 3).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
    let id = server.submit("/save_weights", save(4)).await;
    assert!(server.result(&id).await.json()["path"].is_string());
}

#[tokio::test]
async fn overwriting_on_a_full_disk_keeps_the_old_checkpoint() {
    let home = tempfile::tempdir().unwrap();
    let (server, disk) = over(home.path());
    let run = server.run(&server.session().await, 0).await;
    let save = |seq: u64| json!({"model_id": run, "seq_id": seq, "path": "x", "overwrite": true});
    let id = server.submit("/save_weights", save(1)).await;
    let path = server.result(&id).await.json()["path"].clone();
    let dir = home
        .path()
        .join("server/checkpoints")
        .join(run.replace(':', "_"))
        .join("weights/x");
    let before = std::fs::read(dir.join("manifest.json")).unwrap();

    disk.no_files.store(true, Ordering::SeqCst);
    let id = server.submit("/save_weights", save(2)).await;
    assert_eq!(server.result(&id).await.json()["category"], "server");

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
