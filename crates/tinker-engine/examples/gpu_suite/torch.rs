//! PyTorch's program, which does the same work.

use std::path::Path;
use std::process::Command;

use super::Suite;
use super::speed::{REPEATS, Reports, TASKS};
use super::timed::{Failure, Report};

/// How it is run.
#[derive(Debug)]
pub(super) struct Torch {
    pub(super) python: String,
    pub(super) script: String,
}

impl Torch {
    /// Does all tasks in a precision, with the suite's threads.
    pub(super) fn run(&self, suite: &Suite, dir: &Path, compute: &str) -> Result<Reports, Failure> {
        let task = |(task, sequences): (&str, usize)| -> Result<Report, Failure> {
            let [sequences, threads, repeats] =
                [sequences, suite.threads, REPEATS].map(|n| n.to_string());
            let mut command = Command::new(&self.python);
            command.args([&self.script, task]).arg(dir);
            command.args(["--device", suite.device, "--compute", compute]);
            command.args(["--sequences", &sequences, "--threads", &threads]);
            command.args(["--repeats", &repeats]);
            command.env("OMP_NUM_THREADS", &threads);
            let output = command.output()?;
            serde_json::from_slice(&output.stdout)
                .map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned().into())
        };
        let [train, one, eight] = TASKS;
        Ok([task(train)?, task(one)?, task(eight)?])
    }
}
