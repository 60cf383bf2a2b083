//! Runs by name, prefix and `@last`.

use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use tinker_runs::{RunWriter, Runs};

/// Folders with a config, each written a minute after the one before; and a folder without a run.
fn runs(names: &[&str]) -> (TempDir, Runs) {
    let dir = TempDir::new().unwrap();
    for (index, name) in names.iter().enumerate() {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        let minutes = Duration::from_secs(60 * index as u64);
        let file = File::create(path.join("config.json")).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + minutes).unwrap();
    }
    fs::create_dir(dir.path().join("pirate-notes")).unwrap();
    let runs = Runs::new(dir.path());
    (dir, runs)
}

fn check(runs: &Runs, name: &str, expected: &str) {
    match runs.find(name) {
        Ok(run) => assert_eq!(run.folder.name(), expected, "{name}"),
        Err(error) => assert!(error.to_string().contains(expected), "{name}: {error}"),
    }
}

#[test]
fn lists_the_last_written_first() {
    let (_dir, runs) = runs(&["b", "a", "c"]);

    let names: Vec<_> = runs
        .list()
        .unwrap()
        .iter()
        .map(|run| run.folder.name())
        .collect();

    assert_eq!(names, ["c", "a", "b"]);
}

#[test]
fn finds_by_name_prefix_and_age() {
    let (_dir, runs) = runs(&["pirate", "pirate-2", "sums-1", "sums-2"]);

    check(&runs, "pirate", "pirate");
    check(&runs, "pirate-", "pirate-2");
    check(&runs, "@last", "sums-2");
    check(&runs, "sums", "run `sums` is ambiguous");
    check(&runs, "sums", "`sums-2`, `sums-1`");
    check(
        &runs,
        "nope",
        "newest: `sums-2`, `sums-1`, `pirate-2`, `pirate`",
    );
    check(&runs, "", "no run ``");
}

#[test]
fn an_absent_directory_has_no_runs() {
    let runs = Runs::new("/nonexistent/runs");

    assert!(runs.list().unwrap().is_empty());
    check(&runs, "@last", "there are no runs yet");
}

#[test]
fn a_run_that_is_being_written_is_active() {
    let (dir, runs) = runs(&["a"]);
    let writer = RunWriter::resume(dir.path().join("a")).unwrap();
    assert!(runs.find("a").unwrap().is_active);

    drop(writer);
    assert!(!runs.find("a").unwrap().is_active);
}
