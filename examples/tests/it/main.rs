//! Every example runs to its end against the embedded server.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking"
)]

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tinker_contract::target::Target;
use tokio::process::Command;

/// An example takes seconds; one that takes this long hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// Where cargo puts examples: beside the folder of this test.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap();
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    folder.join("examples").join(file)
}

/// Runs an example in a folder of its own; `expected` is part of what it prints.
async fn check(name: &str, arguments: &[&str], expected: &str) {
    let target = Target::start().await;
    run(&target, name, arguments, expected).await;
    target.stop().await;
}

/// Runs an example to its end in the folder of `target`.
async fn run(target: &Target, name: &str, arguments: &[&str], expected: &str) {
    let mut command = Command::new(program(name));
    command
        .args(arguments)
        .current_dir(target.home())
        .env("TMPDIR", target.home())
        .env("TINKER_BASE_URL", &target.base_url)
        .env("TINKER_API_KEY", &target.api_key)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await;
    let output = output
        .unwrap_or_else(|_| panic!("{name} takes longer than {PATIENCE:?}"))
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);

    assert!(
        output.status.success(),
        "{name}: {}\n{stdout}\n{stderr}",
        output.status
    );
    assert!(
        stdout.contains(expected),
        "{name} lacks {expected:?}\n{stdout}"
    );
}

#[test]
fn every_example_has_a_test() {
    let entries = std::fs::read_dir(env!("CARGO_MANIFEST_DIR")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut examples: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|end| end == "rs"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    examples.retain(|name| !include_str!("main.rs").contains(&format!("fn {name}_runs(")));

    assert!(examples.is_empty(), "no test runs {examples:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn custom_loss_runs() {
    check("custom_loss", &[], "step  9  loss ").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_samples_runs() {
    check(
        "many_samples",
        &["20"],
        "by its handle: prompt log-probabilities",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn record_replay_runs() {
    check("record_replay", &[], "replayed: losses and tokens").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resume_runs() {
    let target = Target::start().await;
    for _ in 0..2 {
        run(&target, "resume", &["run.ledger", "3"], "step   2  loss ").await;
    }
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sample_runs() {
    check("sample", &[], "prompt log-probabilities").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn train_by_hand_runs() {
    check("train_by_hand", &[], "learned [64, 31, 8, 77, 19, 3]").await;
}
