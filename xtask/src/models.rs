//! `cargo xtask models`: rebuilds the embedded base model from its data generator and script.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::process::{check, command};
use crate::python;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Python with the requirements of models/nano/train; made under target/ if absent.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Where the model goes.
    #[arg(long, default_value = "models/nano")]
    out: PathBuf,
    /// More arguments for the training script.
    #[arg(last = true)]
    rest: Vec<String>,
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let train = root.join("models/nano/train");
    let python = match &args.python {
        Some(python) => python.clone(),
        None => python::environment(root, "venv-models", &train.join("requirements.txt"))?,
    };
    let mut build = command(root, python, [train.join("build.py")]);
    check(build.arg("--out").arg(&args.out).args(&args.rest))
}
