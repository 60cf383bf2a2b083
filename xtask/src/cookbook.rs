//! `cargo xtask cookbook`: training loops of the Python cookbook, unmodified, against our server.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::process::{cargo, check, variable};
use crate::python;

/// Names a Python that has the cookbook; the tests read it, and are skipped without.
const VARIABLE: &str = "TINKER_COOKBOOK_PYTHON";
/// The cookbook. Of its requirements `tml-renderers` is left out, which writes the chat formats of models
/// that no server but the hosted one has, and is imported for those only.
const COOKBOOK: &str = "tinker-cookbook==0.6.1";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Arguments for the test binary, such as a name to filter by.
    #[arg(last = true)]
    rest: Vec<String>,
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let python = match variable(VARIABLE) {
        Some(python) => python,
        None => {
            let requirements = root.join("xtask/requirements-cookbook.txt");
            let made = python::environment_and(root, "venv-cookbook", &requirements, &[COOKBOOK]);
            made.with_context(|| {
                format!("cannot install the cookbook; name a Python that has it in {VARIABLE}")
            })?
            .display()
            .to_string()
        }
    };
    let test = ["test", "--package", "tinker-contract", "--test", "it"];
    let mut loops = cargo(root, test);
    // One at a time: each has a server, and a Python of half a gigabyte.
    loops
        .args(["--", "cookbook::", "--test-threads", "1"])
        .args(&args.rest)
        .env(VARIABLE, python);
    check(&mut loops)
}
