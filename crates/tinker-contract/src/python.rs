//! The official Python SDK as a test driver.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

/// Names a Python that has the official SDK; set by `cargo xtask test`.
pub const PYTHON_VARIABLE: &str = "TINKER_TEST_PYTHON";

/// A Python that has the official SDK. Where there is none, says on standard error that a test is
/// skipped, and how to run it.
///
/// # Panics
/// If there is none and this is CI, where the SDK's tests must run.
#[expect(
    clippy::disallowed_methods,
    reason = "the runner tells tests about Python this way"
)]
pub fn find() -> Option<PathBuf> {
    if let Some(python) = std::env::var_os(PYTHON_VARIABLE).filter(|value| !value.is_empty()) {
        return Some(python.into());
    }
    let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
    assert!(
        !ci,
        "CI has to test the official SDK: {PYTHON_VARIABLE} is not set"
    );
    let note = format!(
        "skipped: {PYTHON_VARIABLE} names no Python with `tinker==0.38.0`; `cargo xtask test` makes one\n"
    );
    // Not `eprintln`, which shows in failed tests only. That nobody can read it is no failure.
    let _ = std::io::stderr().write_all(note.as_bytes());
    None
}

/// A script takes half a minute; one that takes this long hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a script printed.
#[derive(Debug)]
pub struct Printed {
    /// All lines but the last.
    pub steps: Vec<String>,
    /// The last line, JSON.
    pub summary: Value,
}

/// Runs a script of `python/` against a server and reads its last line as JSON.
///
/// The script gets no network beyond the server: the hub is offline and its cache is under `home`.
///
/// # Panics
/// With the script's output if it fails.
pub async fn run_script(
    python: &Path,
    script: &str,
    arguments: &[String],
    api_key: &str,
    home: &Path,
) -> Printed {
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("python")
        .join(script);
    let mut command = Command::new(python);
    command
        .arg("-W")
        .arg("ignore")
        .arg(&script)
        .args(arguments)
        .env("TINKER_API_KEY", api_key)
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", home.join("hf"))
        .env("HOME", home)
        .env_remove("TINKER_BASE_URL")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .unwrap_or_else(|_| panic!("{} takes longer than {PATIENCE:?}", script.display()))
        .unwrap_or_else(|error| panic!("{}: {error}", python.display()));
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}: {}\n{stdout}\n{}",
        script.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let mut steps: Vec<String> = stdout.lines().map(str::to_owned).collect();
    let last = steps.pop().unwrap_or_default();
    let summary = serde_json::from_str(&last).unwrap_or_else(|error| panic!("{last:?}: {error}"));
    Printed { steps, summary }
}
