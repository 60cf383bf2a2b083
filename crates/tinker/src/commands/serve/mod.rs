//! `tinker serve`: the server on this machine, in the foreground, its status and end, and its backup.

mod backup;
mod foreground;
mod keys;
mod live;
mod status;
mod stop;

use crate::context::Ctx;
use crate::failure::Result;
use crate::output::Output;

/// Serve the Tinker API from this machine
///
/// Prints the two lines that a shell needs to point any Tinker client at it. With TINKER_API_KEY
/// in its environment, that is the key it asks for; otherwise it makes one. That key may do everything;
/// `tinker serve keys` gives others to other people.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    foreground: foreground::Args,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Backup(backup::Args),
    Keys(keys::Args),
    Status(status::Args),
    Stop(stop::Args),
}

pub(crate) fn run(ctx: &Ctx, args: Args) -> Result<Output> {
    match args.command {
        None => foreground::run(ctx, args.foreground),
        Some(Command::Backup(args)) => super::block_on(backup::run(ctx, &args)),
        Some(Command::Keys(args)) => keys::run(ctx, args),
        Some(Command::Status(args)) => status::run(ctx, &args),
        Some(Command::Stop(_)) => super::block_on(stop::run(ctx)),
    }
}
