//! `tinker run`: training runs as the server lists them; and Tinkex's `run --prompt`.

mod info;
mod list;

use crate::commands::sample;
use crate::context::Ctx;
use crate::failure::Result;
use crate::output::Output;

/// Show training runs
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true,
    // What is flattened below belongs to Tinkex's command, and is shown with our own.
    mut_args = |arg| arg.hide(true)
)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    sample: sample::tinkex::Args,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    List(list::Args),
    Info(info::Args),
}

pub(crate) async fn run(ctx: &Ctx, args: Args) -> Result<Output> {
    match args.command {
        Some(Command::List(args)) => list::run(ctx, &args).await,
        Some(Command::Info(args)) => info::run(ctx, &args).await,
        None => sample::tinkex::run(ctx, args.sample).await,
    }
}
