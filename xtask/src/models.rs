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
    /// Arguments for the training script.
    #[arg(last = true)]
    rest: Vec<String>,
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let train = root.join("models/nano/train");
    let python = match &args.python {
        Some(python) => python.clone(),
        None => python::environment(root, "venv-models", &train.join("requirements.txt"))?,
    };
    check(command(root, python, [train.join("build.py")]).args(&args.rest))
}
