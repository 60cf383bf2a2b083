//! `tinker train`: the recipes, and what they share: watching, interrupting, the folder of a run.

mod drive;
mod folder;
mod options;
mod report;
mod session;
mod sft;
mod watch;

pub(crate) use folder::runs;
pub(crate) use session::{Resume, resume};

use crate::context::Ctx;
use crate::failure::Result;
use crate::output::Output;

/// Train a LoRA adapter on data of your own
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    recipe: Recipe,
}

#[derive(Debug, clap::Subcommand)]
enum Recipe {
    Sft(Box<sft::Args>),
}

pub(crate) async fn run(ctx: &Ctx, args: Args) -> Result<Output> {
    match args.recipe {
        Recipe::Sft(args) => sft::run(ctx, &args).await,
    }
}
