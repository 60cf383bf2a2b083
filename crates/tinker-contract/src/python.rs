//! The official Python SDK as a test driver.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

/// A version of the official SDK that tests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sdk {
    /// The version whose wire we follow.
    V0_38,
    /// Between the two.
    V0_24,
    /// The oldest one.
    V0_15,
}

impl Sdk {
    /// The version as its package has it.
    #[must_use]
    pub const fn version(self) -> &'static str {
        match self {
            Self::V0_38 => "0.38.0",
            Self::V0_24 => "0.24.0",
            Self::V0_15 => "0.15.0",
        }
    }

    /// Names a Python that has it; set by `cargo xtask test`.
    #[must_use]
    pub const fn variable(self) -> &'static str {
        match self {
            Self::V0_38 => "TINKER_TEST_PYTHON",
            Self::V0_24 => "TINKER_TEST_PYTHON_0_24",
            Self::V0_15 => "TINKER_TEST_PYTHON_0_15",
        }
    }
}

/// A Python that has the official SDK in the version whose wire we follow; see [`find_version`].
///
/// # Panics
/// If there is none and this is CI, where the SDK's tests must run.
pub fn find() -> Option<PathBuf> {
    find_version(Sdk::V0_38)
}

/// A Python that has a version of the official SDK. Where there is none, says on standard error that
/// a test is skipped, and how to run it.
///
/// # Panics
/// If there is none and this is CI, where the SDK's tests must run.
#[expect(
    clippy::disallowed_methods,
    reason = "the runner tells tests about Python this way"
)]
pub fn find_version(sdk: Sdk) -> Option<PathBuf> {
    let (variable, version) = (sdk.variable(), sdk.version());
    if let Some(python) = std::env::var_os(variable).filter(|value| !value.is_empty()) {
        return Some(python.into());
    }
    let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
    assert!(
        !ci,
        "CI has to test the official SDK: {variable} is not set"
    );
    let note = format!(
        "skipped: {variable} names no Python with `tinker=={version}`; `cargo xtask test` makes one\n"
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
    run_script_that_trusts(python, script, arguments, api_key, home, None).await
}

/// As [`run_script`], for a server by TLS: `trusted` is its certificate.
///
/// # Panics
/// With the script's output if it fails.
pub async fn run_script_that_trusts(
    python: &Path,
    script: &str,
    arguments: &[String],
    api_key: &str,
    home: &Path,
    trusted: Option<&Path>,
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
        // What scripts share would be kept beside them.
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("HF_HOME", home.join("hf"))
        .env("HOME", home)
        .env_remove("TINKER_BASE_URL")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    if let Some(certificate) = trusted {
        command.env("SSL_CERT_FILE", certificate);
    }
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
