//! A server that ends without a word and comes back: same futures, same bytes.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use serde_json::{Value, json};
use tinker_server::{ApiToken, App, AppOptions, Disk, OsDisk};

use crate::harness::{Answer, Harness, TOKEN, create_body, datum, fb, is_turn, optim, options};

/// Copies a data directory as a killed process would leave it: whatever was handed to the
/// operating system, and nothing else.
pub(crate) fn image(home: &Path) -> tempfile::TempDir {
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

pub(crate) fn weights(home: &Path, run: &str, name: &str) -> Vec<u8> {
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

/// A disk that dies after a number of writes, the last of them half done.
#[derive(Debug)]
struct DyingDisk {
    writes_left: AtomicI64,
}

impl DyingDisk {
    fn after(writes: i64) -> Arc<Self> {
        Arc::new(Self {
            writes_left: AtomicI64::new(writes),
        })
    }

    fn used(&self) -> i64 {
        i64::MAX - self.writes_left.load(Ordering::SeqCst)
    }

    fn write(&self) -> std::io::Result<()> {
        if self.writes_left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        Err(std::io::ErrorKind::Other.into())
    }
}

impl Disk for DyingDisk {
    fn create_dir_all(&self, path: &Path) -> std::io::Result<()> {
        self.write()?;
        OsDisk.create_dir_all(path)
    }
    fn write_new(&self, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
        let alive = self.write();
        let n = if alive.is_ok() {
            bytes.len()
        } else {
            bytes.len() / 2
        };
        OsDisk.write_new(path, &bytes[..n])?;
        alive
    }
    fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
        let alive = self.write();
        // Only the first refused write leaves something behind: then the process is dead.
        let torn = self.writes_left.load(Ordering::SeqCst) == -1;
        let n = match (&alive, torn) {
            (Ok(()), _) => bytes.len(),
            (Err(_), true) => bytes.len() / 2,
            (Err(_), false) => 0,
        };
        OsDisk.append(file, path, &bytes[..n])?;
        alive
    }
    fn truncate(&self, _file: &File, _len: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Other.into())
    }
    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        self.write()?;
        OsDisk.rename(from, to)
    }
}

const N_OPERATIONS: u64 = 11;

/// The request of operation `seq`: training, overwriting saves and a way back to one of them.
async fn post_operation(server: &Harness, run: &str, seq: u64) -> Answer {
    let mid = format!("tinker://{run}/weights/mid");
    match seq {
        4 | 8 => {
            let body = json!({"model_id": run, "seq_id": seq, "path": "mid", "overwrite": true});
            server.post("/save_weights", body).await
        }
        10 => {
            let body = json!({"model_id": run, "seq_id": seq, "path": mid, "optimizer": true});
            server.post("/load_weights", body).await
        }
        seq if seq % 2 == 1 => {
            let tokens = [seq as u32 % 32, 3, 5];
            server.post_proto(&fb(run, seq, vec![datum(&tokens)])).await
        }
        seq => server.post("/optim_step", optim(run, seq)).await,
    }
}

/// Waits for the result of an accepted request; the refusal if the server stopped taking requests, or
/// waits for a disk that does not come back.
/// What was `delivered` before may be gone, and nothing else.
async fn outcome(
    server: &Harness,
    accepted: Answer,
    delivered: &mut HashSet<String>,
) -> Result<Answer, String> {
    if accepted.status != 200 {
        return Err(String::from_utf8_lossy(&accepted.body).into_owned());
    }
    let id = accepted.json()["request_id"].as_str().unwrap().to_owned();
    loop {
        let answer = server.poll(&id).await;
        match answer.status {
            408 if is_held(&answer.json()) => {
                return Err(answer.json().to_string());
            }
            408 => {}
            410 if delivered.contains(&id) => return Ok(answer),
            200 => {
                delivered.insert(id);
                return Ok(answer);
            }
            other => panic!("{id}: {other}: {}", String::from_utf8_lossy(&answer.body)),
        }
    }
}

/// Whether a fault holds an operation back; others wait for their turn.
fn is_held(answer: &Value) -> bool {
    let reason = answer["queue_state_reason"].as_str().unwrap_or_default();
    answer["queue_state"] == "paused_capacity" && !is_turn(reason)
}

/// Sends the whole script, as a client does that goes on until everything is answered: one run, and
/// a second one that starts from a checkpoint of the first. Ends with the first refusal.
pub(crate) async fn play(
    server: &Harness,
    session: &str,
    run: &str,
    delivered: &mut HashSet<String>,
) -> Result<(), String> {
    for seq in 1..=N_OPERATIONS {
        let accepted = post_operation(server, run, seq).await;
        outcome(server, accepted, delivered).await?;
    }
    let mid = format!("tinker://{run}/weights/mid");
    let other = format!("{session}:train:1");
    let load = json!({"session_id": session, "model_seq_id": 1, "path": mid, "optimizer": true});
    let save = |run: &str, seq: u64| json!({"model_id": run, "seq_id": seq, "path": "final"});
    for (path, body) in [
        ("/load_weights", load),
        ("/optim_step", optim(&other, 1)),
        ("/save_weights", save(&other, 2)),
        ("/save_weights", save(run, N_OPERATIONS + 1)),
    ] {
        let accepted = server.post(path, body).await;
        outcome(server, accepted, delivered).await?;
    }
    Ok(())
}

/// What the script ends with, of both runs.
pub(crate) fn finals(home: &Path, session: &str, run: &str) -> [Vec<u8>; 2] {
    [run, &format!("{session}:train:1")].map(|run| weights(home, run, "final"))
}

#[tokio::test]
async fn killed_at_any_write_the_run_ends_with_the_same_bytes() {
    let undisturbed = tempfile::tempdir().unwrap();
    let disk = DyingDisk::after(i64::MAX);
    let server = Harness::with(AppOptions {
        disk: disk.clone(),
        ..options(undisturbed.path())
    });
    let session = server.session().await;
    let created = image(undisturbed.path());
    let run = server.run(&session, 0).await;
    let before = disk.used();
    play(&server, &session, &run, &mut HashSet::new())
        .await
        .unwrap();
    let n_writes = disk.used();
    let expected = finals(undisturbed.path(), &session, &run);
    assert!(
        n_writes - before > 40,
        "too few writes to be a test: {n_writes}"
    );

    // Every second write keeps the test short; each kind of write is hit several times.
    for kill_at in (1..n_writes).step_by(2) {
        let home = image(created.path());
        let mut delivered = HashSet::new();
        let dying = AppOptions {
            disk: DyingDisk::after(kill_at),
            ..options(home.path())
        };
        if let Ok(app) = App::open(dying) {
            let server = Harness::over(app);
            if server
                .post("/create_model", create_body(&session, 0))
                .await
                .status
                == 200
            {
                // Where it stops does not matter.
                let _ = play(&server, &session, &run, &mut delivered).await;
            }
        }
        let server = Harness::open(home.path());
        server.run(&session, 0).await;
        play(&server, &session, &run, &mut delivered)
            .await
            .unwrap_or_else(|refusal| panic!("killed at write {kill_at}: {refusal}"));
        let actual = finals(home.path(), &session, &run);
        assert!(
            actual == expected,
            "killed at write {kill_at} of {n_writes}"
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

    for (i, (id, expected)) in before.into_iter().enumerate() {
        let answer = again.poll(&id).await;
        // All of them were delivered. What two snapshots cover may be forgotten, the rest not.
        let may_be_gone = i < 4 && answer.status == 410;
        assert!(answer == expected || may_be_gone, "{id}: {answer:?}");
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

/// The only segment of a run's log.
fn segment(home: &Path, run: &str) -> PathBuf {
    let run = run.replace(':', "_");
    home.join("server/runs").join(run).join("log/00000001.seg")
}

#[tokio::test]
async fn a_log_damaged_in_the_middle_is_refused_and_serves_again_once_it_is_put_back() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let path = segment(home.path(), &run);
    let whole = grow_until_synced(&server, &run, &path).await;
    drop(server);
    let mut damaged = whole.clone();
    damaged[60] ^= 1;
    std::fs::write(&path, &damaged).unwrap();

    let server = Harness::open(home.path());
    let refused = server.post("/optim_step", optim(&run, 1)).await;
    drop(server);

    assert_eq!(refused.status, 400);
    let text = refused.detail();
    assert!(
        text.contains("00000001.seg") && text.contains("at byte 0"),
        "{text}"
    );
    let advice = format!(
        "make a new training run from the newest checkpoint of {run}, or start the server from a backup"
    );
    assert!(text.contains(&advice), "{text}");
    assert_eq!(std::fs::read(&path).unwrap(), damaged, "nothing is cut off");
    std::fs::write(&path, &whole).unwrap();
    let server = Harness::open(home.path());
    let step = server.optim_step(&run, 1).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
}

/// Operates on a run, by numbers that wait for the first, until its log says that something of it is
/// on the disk; its bytes.
async fn grow_until_synced(server: &Harness, run: &str, log: &Path) -> Vec<u8> {
    for seq in 2.. {
        server.optim_step(run, seq).await;
        let bytes = std::fs::read(log).unwrap();
        if bytes.windows(9).any(|text| text == b"\"synced\":") {
            return bytes;
        }
    }
    unreachable!("a run has numbers enough")
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
    let app = Arc::clone(&server.app);
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

#[tokio::test]
async fn an_operation_that_ended_too_many_processes_fails_and_the_run_goes_on() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    // Accepted and not executed, since the one before is missing.
    let deadly = server.optim_step(&run, 2).await;
    drop(server);
    let counts = json!({ deadly.as_str(): 3 }).to_string();
    std::fs::write(home.path().join("server/attempts.json"), counts).unwrap();

    let again = Harness::open(home.path());
    operate(&again, &run, 1).await;

    let failure = again.failure(&deadly).await;
    assert!(
        failure.contains("running 4 times when the server died"),
        "{failure}"
    );
    let step = again.optim_step(&run, 3).await;
    assert_eq!(again.result(&step).await.json()["metrics"]["step"], 1.0);
}
