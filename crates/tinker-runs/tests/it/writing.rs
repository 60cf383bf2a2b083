//! The writer: durable files, one process at a time, repairs, and what a full disk says.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tinker_runs::{CheckpointRow, Error, MetricsRow, RunFolder, RunWriter};

fn row(step: u64) -> MetricsRow {
    let mut row = MetricsRow::new(step);
    row.set("nll", 1.5);
    row
}

fn steps(dir: &Path) -> Vec<u64> {
    let folder = RunFolder::open(dir).unwrap();
    folder
        .read_metrics()
        .unwrap()
        .into_iter()
        .map(|row| row.step())
        .collect()
}

#[test]
fn what_is_written_is_read_back() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("deep/er/run");
    let mut writer = RunWriter::create(&path).unwrap();
    let mut checkpoint = CheckpointRow::new("final");
    checkpoint.is_final = true;
    checkpoint.sampler_path = Some("tinker://r/sampler_weights/final".parse().unwrap());

    writer.write_config(&json!({"seed": 1})).unwrap();
    writer.append_metrics(&row(0)).unwrap();
    writer.append_checkpoint(&checkpoint).unwrap();

    let folder = RunFolder::open(&path).unwrap();
    assert_eq!(folder.name(), "run");
    assert_eq!(folder.read_config::<Value>().unwrap(), json!({"seed": 1}));
    assert_eq!(folder.read_metrics().unwrap(), [row(0)]);
    assert_eq!(folder.read_checkpoints().unwrap(), [checkpoint]);
    let line = fs::read_to_string(path.join("checkpoints.jsonl")).unwrap();
    assert!(
        line.starts_with(r#"{"name":"final","final":true,"sampler_path":"#),
        "{line}"
    );
}

#[test]
fn numbers_that_are_not_finite_are_written_as_null() {
    let dir = TempDir::new().unwrap();
    let mut writer = RunWriter::create(dir.path()).unwrap();
    let mut row = MetricsRow::new(0);
    row.set("nll", f64::NAN);

    writer.append_metrics(&row).unwrap();

    let line = fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    assert_eq!(line, "{\"step\":0,\"nll\":null}\n");
}

#[test]
fn a_folder_without_its_configuration_is_free_again() {
    let dir = TempDir::new().unwrap();
    let writer = RunWriter::create(dir.path()).unwrap();
    writer.write_config(&1).unwrap();

    writer.remove_config().unwrap();
    drop(writer);

    RunWriter::create(dir.path()).unwrap();
}

#[test]
fn a_metric_called_step_does_not_spoil_the_row() {
    let mut row = MetricsRow::new(3);

    row.set("step", 9.0);

    assert_eq!(serde_json::to_string(&row).unwrap(), "{\"step\":3}");
}

#[test]
fn a_second_writer_is_refused_until_the_first_is_gone() {
    let dir = TempDir::new().unwrap();
    let writer = RunWriter::create(dir.path()).unwrap();
    writer.write_config(&json!({})).unwrap();

    let error = RunWriter::resume(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    let pid = std::process::id();
    assert!(
        error
            .to_string()
            .contains(&format!("in use by process {pid}")),
        "{error}"
    );

    drop(writer);
    RunWriter::resume(dir.path()).unwrap();
}

#[test]
fn a_new_run_does_not_mix_with_an_old_one() {
    let dir = TempDir::new().unwrap();
    RunWriter::create(dir.path())
        .unwrap()
        .write_config(&json!({}))
        .unwrap();

    let error = RunWriter::create(dir.path()).unwrap_err();

    assert!(matches!(error, Error::AlreadyExists { .. }));
    assert!(
        error
            .to_string()
            .contains("resume it, or choose another name"),
        "{error}"
    );
}

#[test]
fn a_run_whose_settings_could_not_be_written_can_be_begun_again() {
    let dir = TempDir::new().unwrap();
    drop(RunWriter::create(dir.path()).unwrap());

    let resumed = RunWriter::resume(dir.path()).unwrap_err();
    let begun = RunWriter::create(dir.path());

    assert!(matches!(resumed, Error::NotARun { .. }), "{resumed}");
    begun.unwrap().write_config(&json!({})).unwrap();
    RunFolder::open(dir.path()).unwrap();
}

#[test]
fn a_writer_waits_for_whoever_only_looks_at_the_lock() {
    let dir = TempDir::new().unwrap();
    drop(RunWriter::create(dir.path()).unwrap());
    let looked_at = fs::File::open(dir.path().join(".lock")).unwrap();
    looked_at.lock_shared().unwrap();

    let writing = std::thread::scope(|scope| {
        let writer = scope.spawn(|| RunWriter::create(dir.path()));
        drop(looked_at);
        writer.join().unwrap()
    });

    writing.unwrap();
}

#[test]
fn resuming_cuts_a_torn_line_and_completes_an_unfinished_one() {
    let check = |content: &str, expected: &str| {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("metrics.jsonl");
        fs::write(&file, content).unwrap();
        let mut writer = RunWriter::resume(dir.path()).unwrap();

        writer.append_metrics(&MetricsRow::new(7)).unwrap();

        assert_eq!(fs::read_to_string(file).unwrap(), expected);
    };

    check("{\"step\":0}\n{\"st", "{\"step\":0}\n{\"step\":7}\n");
    check(
        "{\"step\":0}\n{\"step\":1}",
        "{\"step\":0}\n{\"step\":1}\n{\"step\":7}\n",
    );
    check("{\"step", "{\"step\":7}\n");
}

#[test]
fn the_abandoned_tail_is_dropped_and_appending_goes_on() {
    let dir = TempDir::new().unwrap();
    let mut writer = RunWriter::create(dir.path()).unwrap();
    for step in 0..6 {
        writer.append_metrics(&row(step)).unwrap();
    }

    assert_eq!(writer.drop_metrics_from(4).unwrap(), 2);
    assert_eq!(writer.drop_metrics_from(4).unwrap(), 0);
    writer.append_metrics(&row(4)).unwrap();

    assert_eq!(steps(dir.path()), [0, 1, 2, 3, 4]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_names_the_file_and_is_recognised() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.path().join("metrics.jsonl")).unwrap();
    let mut writer = RunWriter::resume(dir.path()).unwrap();

    let error = writer.append_metrics(&row(0)).unwrap_err();

    assert!(error.is_disk_full(), "{error:?}");
    assert!(error.to_string().contains("metrics.jsonl"), "{error}");
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();

    let error = RunWriter::create(dir.path().join("file/run")).unwrap_err();

    assert!(error.to_string().starts_with("cannot create `"), "{error}");
    assert!(!error.is_disk_full());
}

#[test]
fn what_is_unfinished_is_found_until_it_is_removed() {
    let dir = TempDir::new().unwrap();
    let writer = RunWriter::create(dir.path().join("run")).unwrap();
    writer.write_config(&json!({})).unwrap();
    let read = || -> Option<Value> { writer.folder().read_unfinished().unwrap() };
    assert_eq!(read(), None);

    writer.write_unfinished(&json!({"first_step": 3})).unwrap();

    assert_eq!(read(), Some(json!({"first_step": 3})));
    writer.remove_unfinished().unwrap();
    writer.remove_unfinished().unwrap();
    assert_eq!(read(), None);
}

#[test]
fn a_ledger_can_be_begun_anew() {
    let dir = TempDir::new().unwrap();
    let writer = RunWriter::create(dir.path().join("run")).unwrap();
    let ledger = writer.folder().ledger_path();
    fs::write(&ledger, "old").unwrap();

    writer.remove_ledger().unwrap();
    writer.remove_ledger().unwrap();

    assert!(!ledger.exists());
}
