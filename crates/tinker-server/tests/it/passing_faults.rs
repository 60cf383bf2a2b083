//! Faults that pass: an operation whose run cannot be brought into memory waits, and nothing is lost.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tinker_server::{AppOptions, Disk, Limits, Loader, OsDisk};

use crate::durability::{image, weights};
use crate::harness::{Harness, create_body, is_turn, optim, options};

/// Error numbers of Linux and macOS: a device that fails, and too many open files.
const EIO: i32 = 5;
const EMFILE: i32 = 24;

/// A disk that for now cannot open files whose path contains a text.
#[derive(Debug, Default)]
struct Unreadable {
    fault: Mutex<Option<(&'static str, i32)>>,
    n_refused: AtomicUsize,
}

impl Unreadable {
    fn fail(&self, part: &'static str, code: i32) {
        *self.fault.lock().unwrap() = Some((part, code));
    }

    fn heal(&self) {
        *self.fault.lock().unwrap() = None;
    }

    fn n_refused(&self) -> usize {
        self.n_refused.load(Ordering::SeqCst)
    }
}

impl Disk for Unreadable {
    fn open(&self, path: &Path) -> io::Result<File> {
        match *self.fault.lock().unwrap() {
            Some((part, code)) if path.to_str().unwrap().contains(part) => {
                self.n_refused.fetch_add(1, Ordering::SeqCst);
                Err(io::Error::from_raw_os_error(code))
            }
            _ => OsDisk.open(path),
        }
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        OsDisk.create_dir_all(path)
    }
    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        OsDisk.write_new(path, bytes)
    }
    fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()> {
        OsDisk.append(file, path, bytes)
    }
    fn truncate(&self, file: &File, len: u64) -> io::Result<()> {
        OsDisk.truncate(file, len)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        OsDisk.rename(from, to)
    }
}

/// Options with short polls and no pauses.
fn impatient(home: &Path, disk: &Arc<Unreadable>) -> AppOptions {
    AppOptions {
        limits: Limits {
            poll_hold: Duration::from_millis(10),
            fault_pause: Duration::ZERO,
            snapshot_every: 4,
            ..Limits::default()
        },
        disk: disk.clone(),
        ..options(home)
    }
}

/// Polls until the answer says what the future waits for.
async fn reason(server: &Harness, id: &str) -> String {
    loop {
        let answer = server.poll(id).await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, 408, "{text}");
        let body = answer.json();
        assert_eq!(body["type"], "try_again");
        if let Some(reason) = body["queue_state_reason"].as_str() {
            assert_eq!(body["queue_state"], "paused_capacity");
            // Until it was tried once it waits for its turn.
            if !is_turn(reason) {
                return reason.to_owned();
            }
        }
    }
}

/// Polls until the disk refused a few more times than attempts are counted.
async fn keep_failing(server: &Harness, id: &str, disk: &Unreadable) {
    let enough = disk.n_refused() + 12;
    while disk.n_refused() < enough {
        assert_eq!(server.poll(id).await.status, 408);
    }
}

async fn train(server: &Harness, run: &str, seqs: std::ops::RangeInclusive<u64>) {
    for seq in seqs {
        let id = submit(server, run, seq).await;
        server.result(&id).await;
    }
}

async fn submit(server: &Harness, run: &str, seq: u64) -> String {
    if seq % 2 == 1 {
        server.forward_backward(run, seq, &[seq as u32, 3]).await
    } else {
        server.optim_step(run, seq).await
    }
}

async fn final_weights(server: &Harness, home: &Path, run: &str, seq: u64) -> Vec<u8> {
    let body = json!({"model_id": run, "seq_id": seq, "path": "final"});
    let id = server.submit("/save_weights", body).await;
    assert!(server.result(&id).await.json()["path"].is_string());
    weights(home, run, "final")
}

#[tokio::test]
async fn an_operation_waits_while_snapshots_cannot_be_read_and_goes_on_with_the_same_bytes() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    train(&server, &run, 1..=13).await;
    let copy = image(home.path());
    let disk = Arc::new(Unreadable::default());
    disk.fail("snapshots", EIO);

    let again = Harness::with(impatient(copy.path(), &disk));
    let step = again.optim_step(&run, 14).await;
    let next = again.forward_backward(&run, 15, &[15, 3]).await;
    for id in [&step, &next] {
        let text = reason(&again, id).await;
        assert!(text.contains("operation 14 of this run"), "{text}");
        assert!(
            text.contains("snapshots") && text.contains("os error 5"),
            "{text}"
        );
    }
    disk.heal();
    let answer = again.result(&step).await;
    again.output(&next).await;

    let expected = server.optim_step(&run, 14).await;
    assert_eq!((&expected, answer), (&step, server.result(&expected).await));
    train(&server, &run, 15..=15).await;
    let actual = final_weights(&again, copy.path(), &run, 16).await;
    assert!(actual == final_weights(&server, home.path(), &run, 16).await);
}

#[tokio::test]
async fn a_held_operation_outlives_restarts_however_often_it_was_tried() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    train(&server, &run, 1..=12).await;
    let copy = image(home.path());
    let disk = Arc::new(Unreadable::default());
    disk.fail("snapshots", EMFILE);

    let id = {
        let held = Harness::with(impatient(copy.path(), &disk));
        let id = held.optim_step(&run, 13).await;
        reason(&held, &id).await;
        id
    };
    let again = Harness::with(impatient(copy.path(), &disk));
    keep_failing(&again, &id, &disk).await;
    disk.heal();

    assert_eq!(again.result(&id).await.json()["metrics"]["step"], 7.0);
}

#[tokio::test]
async fn an_operation_waits_while_its_log_cannot_be_read() {
    let home = tempfile::tempdir().unwrap();
    let disk = Arc::new(Unreadable::default());
    let server = Harness::with(impatient(home.path(), &disk));
    let run = server.run(&server.session().await, 0).await;
    let later = server.optim_step(&run, 2).await;
    disk.fail("/log/", EIO);

    let first = server.optim_step(&run, 1).await;
    let text = reason(&server, &first).await;
    assert!(text.contains("00000001.seg"), "{text}");
    disk.heal();

    for (id, step) in [(first, 1.0), (later, 2.0)] {
        assert_eq!(server.result(&id).await.json()["metrics"]["step"], step);
    }
}

#[tokio::test]
async fn a_future_is_asked_for_again_while_its_log_cannot_be_opened() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    // Accepted and not executed, since the one before is missing.
    let step = server.optim_step(&run, 2).await;
    let copy = image(home.path());
    let disk = Arc::new(Unreadable::default());
    disk.fail("/log/", EIO);

    let again = Harness::with(impatient(copy.path(), &disk));
    let text = reason(&again, &step).await;
    assert!(
        text.contains("cannot read") && text.contains(".seg"),
        "{text}"
    );
    let refused = again.post("/optim_step", optim(&run, 1)).await;
    assert_eq!(refused.status, 500);
    disk.heal();

    again.optim_step(&run, 1).await;
    assert_eq!(again.result(&step).await.json()["metrics"]["step"], 2.0);
}

#[tokio::test]
async fn a_run_is_created_once_its_base_model_can_be_read() {
    let home = tempfile::tempdir().unwrap();
    let disk = Arc::new(Unreadable::default());
    let engine_disk = Arc::clone(&disk);
    let server = Harness::with(AppOptions {
        loader: Loader::new(move |dir, threads| {
            let path = dir.join("model.safetensors");
            match engine_disk.open(&path) {
                Ok(_) => crate::fake::load(dir, threads),
                Err(error) => Err(tinker_engine::Error::Model {
                    path,
                    message: error.to_string(),
                }),
            }
        }),
        ..impatient(home.path(), &disk)
    });
    let session = server.session().await;
    disk.fail("model.safetensors", EMFILE);

    let id = server
        .submit("/create_model", create_body(&session, 0))
        .await;
    let text = reason(&server, &id).await;
    assert!(text.contains("model.safetensors"), "{text}");
    assert!(text.contains("os error 24"), "{text}");
    disk.heal();

    let run = server.result(&id).await.json()["model_id"].clone();
    let step = server.optim_step(run.as_str().unwrap(), 1).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn a_checkpoint_is_loaded_once_it_can_be_read() {
    let home = tempfile::tempdir().unwrap();
    let disk = Arc::new(Unreadable::default());
    let server = Harness::with(impatient(home.path(), &disk));
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    train(&server, &run, 1..=2).await;
    let save = json!({"model_id": run, "seq_id": 3, "path": "x"});
    let saved = server.submit("/save_weights", save).await;
    let path: Value = server.result(&saved).await.json()["path"].clone();
    disk.fail("weights/x", EIO);

    let load = json!({"model_id": run, "seq_id": 4, "path": path, "optimizer": true});
    let loaded = server.submit("/load_weights", load).await;
    let create = json!({"session_id": session, "model_seq_id": 1, "path": path, "optimizer": true});
    let created = server.submit("/load_weights", create).await;
    for id in [&loaded, &created] {
        let text = reason(&server, id).await;
        assert!(text.contains("weights/x"), "{text}");
    }
    disk.heal();

    assert_eq!(server.result(&loaded).await.json()["path"], path);
    assert_eq!(server.result(&created).await.json()["path"], path);
    let step = server.optim_step(&run, 5).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 2.0);
}

#[tokio::test]
async fn another_run_goes_on_while_one_is_held_back() {
    let home = tempfile::tempdir().unwrap();
    let disk = Arc::new(Unreadable::default());
    let server = Harness::with(impatient(home.path(), &disk));
    let session = server.session().await;
    let (one, other) = (server.run(&session, 0).await, server.run(&session, 1).await);
    let body = json!({"model_id": one, "seq_id": 1, "path": "x"});
    let id = server.submit("/save_weights", body).await;
    let path = server.result(&id).await.json()["path"].clone();
    disk.fail("weights/x", EIO);
    let load = json!({"model_id": one, "seq_id": 2, "path": path, "optimizer": true});
    let held = server.submit("/load_weights", load).await;
    reason(&server, &held).await;

    train(&server, &other, 1..=4).await;

    keep_failing(&server, &held, &disk).await;
}

async fn sampler(server: &Harness, session: &str, path: &Value) -> Value {
    let body = json!({"session_id": session, "sampling_session_seq_id": 9, "model_path": path});
    server.post("/create_sampling_session", body).await.json()["sampling_session_id"].clone()
}

fn sample(sampler: &Value, seq: u64) -> Value {
    json!({"sampling_session_id": sampler, "seq_id": seq, "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": 4, "stop": []}})
}

#[tokio::test]
async fn samples_wait_while_their_weights_cannot_be_read() {
    let home = tempfile::tempdir().unwrap();
    let disk = Arc::new(Unreadable::default());
    let server = Harness::with(impatient(home.path(), &disk));
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let save = json!({"model_id": run, "seq_id": 1, "path": "x"});
    let saved = server.submit("/save_weights_for_sampler", save).await;
    let path = server.result(&saved).await.json()["path"].clone();
    let sampler = sampler(&server, &session, &path).await;
    disk.fail("sampler_weights/x", EIO);

    let first = server.submit("/asample", sample(&sampler, 1)).await;
    let second = server.submit("/asample", sample(&sampler, 2)).await;
    for id in [&first, &second] {
        let text = reason(&server, id).await;
        assert!(text.contains("sampler_weights/x"), "{text}");
    }
    keep_failing(&server, &first, &disk).await;
    let cancel = json!({"request_id": second});
    assert_eq!(server.post("/cancel_future", cancel).await.status, 204);
    assert!(server.failure(&second).await.contains("cancelled"));
    disk.heal();

    assert_eq!(server.samples(&first).await.sequences[0].tokens.len(), 4);
}

#[tokio::test]
async fn samples_that_ended_too_many_processes_fail_and_others_are_drawn() {
    let home = tempfile::tempdir().unwrap();
    let disk = Arc::new(Unreadable::default());
    let server = Harness::with(impatient(home.path(), &disk));
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let save = json!({"model_id": run, "seq_id": 1, "path": "x"});
    let saved = server.submit("/save_weights_for_sampler", save).await;
    let path = server.result(&saved).await.json()["path"].clone();
    let sampler = sampler(&server, &session, &path).await;
    disk.fail("sampler_weights/x", EIO);
    let deadly = server.submit("/asample", sample(&sampler, 1)).await;
    reason(&server, &deadly).await;
    drop(server);
    let counts = json!({"samples": 3}).to_string();
    std::fs::write(home.path().join("server/attempts.json"), counts).unwrap();

    let again = Harness::open(home.path());

    let failure = again.failure(&deadly).await;
    assert!(failure.contains("4 times in a row"), "{failure}");
    let next = again.submit("/asample", sample(&sampler, 2)).await;
    assert_eq!(again.samples(&next).await.sequences[0].tokens.len(), 4);
}
