//! Python environments under `target/`: made once, remade when their requirements change.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process::{check, command, target_dir, variable};

/// Oldest Python that the official SDK installs on.
const MIN_MINOR: u32 = 11;

/// Returns the Python of `target/<name>`, with `requirements` installed.
///
/// # Errors
/// If there is no Python 3.11 or newer, or a requirement cannot be installed.
pub(crate) fn environment(root: &Path, name: &str, requirements: &Path) -> Result<PathBuf> {
    environment_and(root, name, requirements, &[])
}

/// The same, with packages whose own requirements are left out.
///
/// # Errors
/// Likewise.
pub(crate) fn environment_and(
    root: &Path,
    name: &str,
    requirements: &Path,
    bare: &[&str],
) -> Result<PathBuf> {
    let dir = target_dir(root).join(name);
    let python = dir.join(if cfg!(windows) {
        "Scripts/python.exe"
    } else {
        "bin/python"
    });
    let stamp = dir.join("requirements.txt");
    let mut wanted = std::fs::read_to_string(requirements)
        .with_context(|| format!("cannot read {}", requirements.display()))?;
    for package in bare {
        wanted += &format!("{package} without requirements\n");
    }
    if python.exists() && std::fs::read_to_string(&stamp).is_ok_and(|have| have == wanted) {
        return Ok(python);
    }
    let system = system_python(root)?;
    let flags = ["-m", "venv", "--clear"].map(PathBuf::from);
    check(&mut command(root, system, flags.iter().chain([&dir])))?;
    check(install(root, &python).arg("-r").arg(requirements))?;
    if !bare.is_empty() {
        check(install(root, &python).arg("--no-deps").args(bare))?;
    }
    std::fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))?;
    Ok(python)
}

fn install(root: &Path, python: &Path) -> Command {
    let flags = [
        "-m",
        "pip",
        "install",
        // What is imported compiles itself; the clients have thousands of files that never are.
        "--no-compile",
        "--quiet",
        "--disable-pip-version-check",
    ];
    command(root, python, flags)
}

/// The first of the usual names that is new enough; `PYTHON` goes first.
fn system_python(root: &Path) -> Result<String> {
    let usual = [
        "python3",
        "python3.14",
        "python3.13",
        "python3.12",
        "python3.11",
        "python",
    ];
    let names = variable("PYTHON")
        .into_iter()
        .chain(usual.map(String::from));
    for name in names {
        let question =
            "import sys; print(sys.version_info.minor if sys.version_info.major == 3 else 0)";
        let mut ask = command(root, &name, ["-c", question]);
        ask.stderr(std::process::Stdio::null());
        let Ok(answer) = ask.output() else { continue };
        let minor = String::from_utf8_lossy(&answer.stdout)
            .trim()
            .parse()
            .unwrap_or(0);
        if answer.status.success() && minor >= MIN_MINOR {
            return Ok(name);
        }
    }
    bail!("no Python 3.{MIN_MINOR} or newer found; install one or name it in PYTHON");
}
