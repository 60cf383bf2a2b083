//! `cargo xtask test`: every test of the workspace, then one line with the totals.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::process::{cargo, in_ci, variable};
use crate::python;

/// A version of the official SDK: what tells the tests which Python has it, the directory of that
/// under `target/`, and what to install there.
struct Sdk {
    version: &'static str,
    variable: &'static str,
    environment: &'static str,
    requirements: &'static str,
}

const SDKS: [Sdk; 3] = [
    Sdk {
        version: "0.38",
        variable: "TINKER_TEST_PYTHON",
        environment: "venv",
        requirements: "xtask/requirements-test.txt",
    },
    Sdk {
        version: "0.24",
        variable: "TINKER_TEST_PYTHON_0_24",
        environment: "venv-sdk-0.24",
        requirements: "xtask/requirements-sdk-0.24.txt",
    },
    Sdk {
        version: "0.15",
        variable: "TINKER_TEST_PYTHON_0_15",
        environment: "venv-sdk-0.15",
        requirements: "xtask/requirements-sdk-0.15.txt",
    },
];

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Only this package.
    #[arg(short, long)]
    package: Option<String>,
    /// Arguments for the test binaries, such as a name to filter by.
    #[arg(last = true)]
    rest: Vec<String>,
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let start = Instant::now();
    let mut command = cargo(root, ["test", "--no-fail-fast"]);
    match &args.package {
        Some(package) => command.args(["--package", package]),
        None => command.arg("--workspace"),
    };
    command.arg("--").args(&args.rest);
    let mut missing = Vec::new();
    for sdk in &SDKS {
        match sdk.python(root)? {
            Some(python) => drop(command.env(sdk.variable, python)),
            None => missing.push(sdk.version),
        }
    }
    command.stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot start cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let mut totals = Totals::default();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("cannot read the output of cargo test")?;
        println!("{line}");
        totals.add(&line);
    }
    let status = child.wait().context("cannot wait for cargo test")?;
    for version in missing {
        println!("note: tests with the official Python SDK {version} were skipped");
    }
    println!(
        "\nall test binaries: {totals}; {:.0} s",
        start.elapsed().as_secs_f64()
    );
    if !status.success() {
        bail!("cargo test failed ({status})");
    }
    if totals.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

impl Sdk {
    /// A Python that has it; `None` (with the reason printed) where it cannot be made.
    fn python(&self, root: &Path) -> Result<Option<String>> {
        if let Some(python) = variable(self.variable) {
            return Ok(Some(python));
        }
        let version = self.version;
        match python::environment(root, self.environment, &root.join(self.requirements)) {
            Ok(python) => Ok(Some(python.display().to_string())),
            Err(error) if in_ci() => {
                Err(error.context(format!("CI needs the official Python SDK {version}")))
            }
            Err(error) => {
                println!("note: no official Python SDK {version}: {error:#}");
                Ok(None)
            }
        }
    }
}

/// Sums of the `test result:` lines.
#[derive(Debug, Default, PartialEq, Eq)]
struct Totals {
    binaries: u32,
    passed: u32,
    failed: u32,
    ignored: u32,
}

impl Totals {
    /// Adds a line such as `test result: ok. 3 passed; 0 failed; 0 ignored; …`; skips others.
    fn add(&mut self, line: &str) {
        let Some((_, counts)) = line
            .strip_prefix("test result: ")
            .and_then(|line| line.split_once(". "))
        else {
            return;
        };
        self.binaries += 1;
        for part in counts.split("; ") {
            match part
                .split_once(' ')
                .map(|(n, word)| (n.parse().unwrap_or(0), word))
            {
                Some((n, "passed")) => self.passed += n,
                Some((n, "failed")) => self.failed += n,
                Some((n, "ignored")) => self.ignored += n,
                _ => {}
            }
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            binaries,
            passed,
            failed,
            ignored,
        } = self;
        write!(
            f,
            "{passed} passed, {failed} failed, {ignored} ignored in {binaries} binaries"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_add_up_result_lines_and_skip_others() {
        let mut totals = Totals::default();

        for line in [
            "running 3 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s",
            "test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
        ] {
            totals.add(line);
        }

        assert_eq!(
            totals,
            Totals {
                binaries: 2,
                passed: 7,
                failed: 2,
                ignored: 1
            }
        );
    }
}
