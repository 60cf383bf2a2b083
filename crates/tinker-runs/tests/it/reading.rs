//! Reading folders written by us, by the Python cookbook, and by a process that crashed.

use std::fs;

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;
use tinker_runs::{Error, MetricsRow, RunFolder};

fn folder_with(name: &str, content: impl AsRef<[u8]>) -> (TempDir, RunFolder) {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    fs::write(dir.path().join(name), content).unwrap();
    let folder = RunFolder::open(dir.path()).unwrap();
    (dir, folder)
}

#[test]
fn the_last_value_of_a_step_wins_and_rows_without_a_step_are_skipped() {
    let (_dir, folder) = folder_with(
        "metrics.jsonl",
        "{\"step\":0,\"a\":1}\n{\"step\":1,\"a\":2}\n\n{\"note\":1}\n{\"step\":1,\"a\":3}\n",
    );

    let rows = folder.read_metrics().unwrap();

    let seen: Vec<_> = rows
        .iter()
        .map(|row| (row.step(), row.get("a").unwrap()))
        .collect();
    assert_eq!(seen, [(0, 1.0), (1, 3.0)]);
}

#[test]
fn values_that_a_step_has_once_stay() {
    let (_dir, folder) = folder_with(
        "metrics.jsonl",
        "{\"step\":8.0,\"reward\":0.5,\"n\":1}\n{\"step\":8,\"n\":2}\n",
    );

    let rows = folder.read_metrics().unwrap();

    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].get("reward"), Some(0.5));
    assert_eq!(rows[0].get("n"), Some(2.0));
}

#[test]
fn steps_that_python_writes_as_floats_are_steps() {
    let (_dir, folder) = folder_with(
        "metrics.jsonl",
        "{\"step\":1.0,\"a\":1}\n{\"step\":2,\"a\":2}\n{\"step\":2.5,\"a\":3}\n{\"step\":-1.0,\"a\":4}\n{\"step\":null}\n",
    );

    let rows = folder.read_metrics().unwrap();

    let steps: Vec<u64> = rows.iter().map(MetricsRow::step).collect();
    assert_eq!(steps, [1, 2]);
}

#[test]
fn numbers_that_python_writes_but_json_lacks_are_null() {
    let (_dir, folder) = folder_with(
        "metrics.jsonl",
        "{\"step\":0,\"a\":NaN,\"b\":-Infinity,\"c\":2,\"d\":\"NaN \\\" Infinity\"}\n",
    );

    let row = folder.read_metrics().unwrap().remove(0);

    assert_eq!(row.values()["a"], json!(null));
    assert_eq!(row.values()["b"], json!(null));
    assert_eq!(row.values()["d"], json!("NaN \" Infinity"));
    assert_eq!(row.get("c"), Some(2.0));
}

#[test]
fn a_torn_last_line_is_ignored_and_a_bad_earlier_one_is_named() {
    let (_dir, folder) = folder_with("metrics.jsonl", "{\"step\":0}\n{\"step\":1,\"a\":");
    assert_eq!(folder.read_metrics().unwrap(), [MetricsRow::new(0)]);

    let (_dir, folder) = folder_with(
        "metrics.jsonl",
        "{\"step\":0}\n{\"step\" 1}\n{\"step\":2}\n",
    );
    let error = folder.read_metrics().unwrap_err();
    assert!(
        matches!(
            error,
            Error::BadLine {
                line: 2,
                column: 9,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(
        error
            .to_string()
            .ends_with("metrics.jsonl` line 2 column 9: expected `:`"),
        "{error}"
    );
}

#[test]
fn checkpoint_rows_keep_keys_that_others_wrote() {
    let row = r#"{"name":"000020","batch":20,"epoch":0,"state_path":"tinker://r/weights/000020","rolling":true}"#;
    let (_dir, folder) = folder_with("checkpoints.jsonl", format!("{row}\n"));

    let read = folder.read_checkpoints().unwrap().remove(0);

    assert_eq!(read.extra["rolling"], json!(true));
    let again: serde_json::Value = serde_json::to_value(&read).unwrap();
    assert_eq!(
        again,
        serde_json::from_str::<serde_json::Value>(row).unwrap()
    );
}

#[test]
fn resume_candidates_are_newest_first_and_have_state() {
    let rows = [
        r#"{"name":"000010","state_path":"tinker://r/weights/000010"}"#,
        r#"{"name":"000020","state_path":"tinker://r/weights/000020"}"#,
        r#"{"name":"eval","sampler_path":"tinker://r/sampler_weights/eval"}"#,
    ];
    let (_dir, folder) = folder_with("checkpoints.jsonl", rows.join("\n"));

    let names: Vec<_> = folder
        .resume_candidates()
        .unwrap()
        .into_iter()
        .map(|row| row.name)
        .collect();

    assert_eq!(names, ["000020", "000010"]);
}

#[test]
fn a_folder_without_a_run_is_refused() {
    let dir = TempDir::new().unwrap();

    let error = RunFolder::open(dir.path()).unwrap_err();

    assert!(
        error
            .to_string()
            .ends_with("is not a run folder: it has no config.json"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    /// However a crash cuts the file, the whole lines before the cut are read.
    #[test]
    fn any_cut_loses_at_most_the_last_line(n_rows in 1_u64..6, cut in 0_usize..200) {
        let rows: Vec<String> =
            (0..n_rows).map(|step| format!("{{\"step\":{step},\"é\":{step}}}\n")).collect();
        let bytes = rows.concat().into_bytes();
        let cut = cut.min(bytes.len());
        let (_dir, folder) = folder_with("metrics.jsonl", &bytes[..cut]);

        let n_read = folder.read_metrics().unwrap().len();

        let n_whole = bytes[..cut].iter().filter(|&&byte| byte == b'\n').count();
        // A line that lacks nothing but its line feed is whole too.
        let is_complete = cut < bytes.len() && bytes[cut] == b'\n';
        prop_assert_eq!(n_read, n_whole + usize::from(is_complete));
    }
}
