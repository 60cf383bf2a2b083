//! `cargo xtask test`: every test of the workspace, then one line with the totals.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::process::{cargo, in_ci, output, variable};
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
    let mut totals = Totals::default();
    let mut status = totals.count(command)?;
    // With a filter there may be nothing to run, and another package has no GPU.
    if status.success() && args.rest.is_empty() && args.package.is_none() {
        status = totals.count(on_emulated_gpu(root)?)?;
    }
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

/// The GPU backend on an emulated device. The kernels are compiled by CUDA's compiler as well, which needs
/// no GPU and comes from Python's packages.
fn on_emulated_gpu(root: &Path) -> Result<Command> {
    let mut command = cargo(root, ["test", "--package", "tinker-engine"]);
    command.args(["--features", "cuda", "--test", "it", "--"]);
    command.args(["gpu::", "greedy_decoding"]);
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Ok(command);
    }
    let requirements = root.join("xtask/requirements-nvrtc.txt");
    match python::environment(root, "venv-nvrtc", &requirements) {
        Ok(python) => {
            let question = "import nvidia.cuda_nvrtc as n; print(list(n.__path__)[0] + '/lib')";
            let folder = output(&mut crate::process::command(root, python, ["-c", question]))?;
            command.env("LD_LIBRARY_PATH", folder.trim());
            command.env("TINKER_TEST_NVRTC", "1");
        }
        Err(error) if in_ci() => return Err(error.context("CI needs CUDA's compiler")),
        Err(error) => println!("note: the kernels were not compiled for GPUs: {error:#}"),
    }
    Ok(command)
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
    /// Runs tests, shows what they print, and adds their results.
    fn count(&mut self, mut tests: Command) -> Result<ExitStatus> {
        tests.stdout(Stdio::piped());
        let mut child = tests.spawn().context("cannot start cargo test")?;
        let stdout = child.stdout.take().context("cargo test has no output")?;
        for line in BufReader::new(stdout).lines() {
            let line = line.context("cannot read the output of cargo test")?;
            println!("{line}");
            self.add(&line);
        }
        child.wait().context("cannot wait for cargo test")
    }

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
