//! Operations behind a number that never arrives.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tinker_server::{AppOptions, Clock, Disk, Limits, OsDisk};

use crate::expiry::loaded;
use crate::harness::{Harness, optim, options};

const MINUTE: Duration = Duration::from_secs(60);

/// A server whose time is `clock`'s and whose polls are short.
fn open(home: &Path, clock: &Clock) -> Harness {
    let options = options(home);
    Harness::with(AppOptions {
        clock: clock.clone(),
        limits: Limits {
            poll_hold: Duration::from_millis(10),
            ..options.limits
        },
        ..options
    })
}

/// So many minutes in which the client of a session gives signs of life, or none.
async fn pass(server: &Harness, clock: &Clock, minutes: u32, alive: Option<&str>) {
    for _ in 0..minutes {
        if let Some(session) = alive {
            let beat = json!({ "session_id": session });
            let answer = server.post("/session_heartbeat", beat).await;
            assert_eq!(answer.status, 200);
        }
        server.app.tidy_up();
        clock.put_forward(MINUTE);
    }
    server.app.tidy_up();
}

async fn step_of(server: &Harness, id: &str) -> f64 {
    let answer = server.result(id).await.json();
    let step = answer["metrics"]["step"].as_f64();
    step.unwrap_or_else(|| panic!("{answer}"))
}

#[tokio::test]
async fn operations_behind_a_number_that_never_arrives_fail_in_time_and_name_it() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let server = open(home.path(), &clock);
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let other = server.run(&session, 1).await;
    // The first number after 1 and 3 are missing.
    let done = server.forward_backward(&run, 1, &[1, 2]).await;
    server.output(&done).await;
    let (second, third) = (
        server.optim_step(&run, 3).await,
        server.optim_step(&run, 5).await,
    );

    pass(&server, &clock, 9, Some(&session)).await;
    assert_eq!(server.poll(&second).await.status, 408);
    assert_eq!(server.poll(&third).await.status, 408);
    pass(&server, &clock, 1, Some(&session)).await;

    let why = server.failure(&second).await;
    let expected = format!(
        "operation 3 of training run {run} was not done: operation 2, which comes before it, did not arrive within 10 minutes; make the call again"
    );
    assert_eq!(why, expected);
    assert!(server.failure(&third).await.contains("operation 4, which"));
    // The run is where it was, and other runs never noticed.
    let next = server.optim_step(&run, 6).await;
    let answer = server.result(&next).await.json();
    assert_eq!(answer["metrics"]["step"], 1.0);
    assert!(answer["metrics"]["grad_norm"].as_f64().unwrap() > 0.0);
    let of_other = server.optim_step(&other, 1).await;
    assert_eq!(step_of(&server, &of_other).await, 1.0);
}

#[tokio::test]
async fn an_operation_that_comes_after_all_is_told_that_it_is_too_late_also_after_a_restart() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let server = open(home.path(), &clock);
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let waiting = server.optim_step(&run, 3).await;
    pass(&server, &clock, 10, Some(&session)).await;
    server.failure(&waiting).await;

    let late = server.optim_step(&run, 1).await;
    let why = server.failure(&late).await;
    assert!(why.contains("operation 1 of training run"), "{why}");
    assert!(why.contains("came too late"), "{why}");
    let next = server.optim_step(&run, 4).await;
    assert_eq!(step_of(&server, &next).await, 1.0);
    drop(server);

    let server = open(home.path(), &clock);
    assert_eq!(server.failure(&late).await, why);
    assert_eq!(server.failure(&waiting).await.split(' ').nth(1), Some("3"));
    let also_late = server.forward_backward(&run, 2, &[1, 2]).await;
    assert!(server.failure(&also_late).await.contains("came too late"));
    // It is rebuilt past the numbers that stand for nothing.
    let next = server.optim_step(&run, 5).await;
    assert_eq!(step_of(&server, &next).await, 2.0);
}

#[tokio::test]
async fn a_client_that_was_killed_is_waited_for_and_goes_on_with_its_numbers() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let server = open(home.path(), &clock);
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let waiting = server.optim_step(&run, 2).await;

    pass(&server, &clock, 4, Some(&session)).await;
    pass(&server, &clock, 300, None).await;
    // It is back, and has the whole time again.
    pass(&server, &clock, 9, Some(&session)).await;
    assert_eq!(server.poll(&waiting).await.status, 408);
    assert_eq!(server.optim_step(&run, 2).await, waiting);
    let first = server.optim_step(&run, 1).await;

    assert_eq!(step_of(&server, &first).await, 1.0);
    assert_eq!(step_of(&server, &waiting).await, 2.0);
}

#[tokio::test]
async fn a_wait_goes_on_after_a_restart_and_ends_in_its_time() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let server = open(home.path(), &clock);
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let waiting = server.optim_step(&run, 2).await;
    pass(&server, &clock, 5, Some(&session)).await;
    drop(server);

    let server = open(home.path(), &clock);
    pass(&server, &clock, 9, Some(&session)).await;
    assert_eq!(server.poll(&waiting).await.status, 408);
    pass(&server, &clock, 1, Some(&session)).await;

    assert!(
        server
            .failure(&waiting)
            .await
            .contains("operation 1, which")
    );
}

#[tokio::test]
async fn a_number_far_from_the_next_one_is_refused_naming_that() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let server = open(home.path(), &clock);
    let run = server.run(&server.session().await, 0).await;

    for seq in [20_000, u64::MAX] {
        let answer = server.post("/optim_step", optim(&run, seq)).await;

        assert_eq!(answer.status, 400);
        let why = answer.detail();
        assert!(why.contains("the next one, which is 1"), "{why}");
    }
    let first = server.optim_step(&run, 1).await;
    assert_eq!(step_of(&server, &first).await, 1.0);
}

/// A disk that has no room for what is written aside, while it is full.
#[derive(Debug, Default)]
struct Full {
    is_full: AtomicBool,
    n_refused: AtomicUsize,
}

impl Disk for Full {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        OsDisk.create_dir_all(path)
    }
    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if self.is_full.load(Ordering::SeqCst)
            && path.display().to_string().contains("/server/tmp/")
        {
            self.n_refused.fetch_add(1, Ordering::SeqCst);
            return Err(io::ErrorKind::StorageFull.into());
        }
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

#[tokio::test]
async fn an_idle_run_that_cannot_be_saved_is_tried_again_after_a_pause() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let disk = Arc::new(Full::default());
    let server = Harness::with(AppOptions {
        clock: clock.clone(),
        disk: disk.clone(),
        ..options(home.path())
    });
    server.run(&server.session().await, 0).await;
    disk.is_full.store(true, Ordering::SeqCst);
    let n_refused = || disk.n_refused.load(Ordering::SeqCst);

    // The client is gone after five minutes.
    pass(&server, &clock, 5, None).await;
    assert_eq!(n_refused(), 1);
    pass(&server, &clock, 4, None).await;
    assert_eq!(n_refused(), 1, "every sweep tries");
    pass(&server, &clock, 1, None).await;
    assert_eq!(n_refused(), 2);
    disk.is_full.store(false, Ordering::SeqCst);
    pass(&server, &clock, 5, None).await;

    assert_eq!(loaded(&server).await.0, 0);
}
