//! `tinker resume`: goes on with an interrupted run.

use std::path::{Path, PathBuf};

use tinker_runs::RunFolder;

use super::train;
use crate::context::Ctx;
use crate::failure::Result;
use crate::output::Output;

/// Go on with an interrupted or killed run, to the result that it would have had
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name of the run, the beginning of it, @last, or a run folder
    #[arg(value_name = "RUN", default_value = "@last")]
    run: String,
    /// The data file, if it is not where it was
    #[arg(long, value_name = "DATA")]
    data: Option<PathBuf>,
    /// Directory with the model's tokenizer, for models that are not on this machine
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
}

pub(crate) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    let folder = if is_path(&args.run) {
        RunFolder::open(&args.run)?
    } else {
        train::runs(ctx).find(&args.run)?.folder
    };
    let resume = train::Resume::of(folder, args.data.as_deref(), args.tokenizer.as_deref());
    train::resume(ctx, resume).await
}

/// Names hold no separator, so whatever has one is a folder.
fn is_path(run: &str) -> bool {
    run.contains(std::path::MAIN_SEPARATOR) || Path::new(run).join("config.json").is_file()
}
