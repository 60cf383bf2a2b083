//! `tinker model`: base models on offer.

mod list;

use crate::context::Ctx;
use crate::failure::Result;
use crate::output::Output;

/// Show base models
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    List(list::Args),
}

pub(crate) async fn run(ctx: &Ctx, args: Args) -> Result<Output> {
    match args.command {
        Command::List(args) => list::run(ctx, &args).await,
    }
}
