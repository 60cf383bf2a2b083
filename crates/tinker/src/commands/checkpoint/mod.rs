//! `tinker checkpoint`: saved weights as the server lists them; and Tinkex's `checkpoint --output`.

mod delete;
mod info;
mod list;
mod tinkex;

use tinker_types::{Checkpoint, CheckpointKind};

use crate::context::Ctx;
use crate::failure::Result;
use crate::human;
use crate::output::Output;

/// Show and delete checkpoints
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    save: tinkex::Args,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    List(list::Args),
    Info(info::Args),
    Delete(delete::Args),
}

pub(crate) async fn run(ctx: &Ctx, args: Args) -> Result<Output> {
    match args.command {
        Some(Command::List(args)) => list::run(ctx, &args).await,
        Some(Command::Info(args)) => info::run(ctx, &args).await,
        Some(Command::Delete(args)) => delete::run(ctx, &args).await,
        None => tinkex::run(ctx, &args.save).await,
    }
}

fn kind(checkpoint: &Checkpoint) -> &'static str {
    match checkpoint.checkpoint_type {
        CheckpointKind::Training => "training",
        CheckpointKind::Sampler => "sampler",
        CheckpointKind::External => "external",
    }
}

fn size(checkpoint: &Checkpoint) -> String {
    checkpoint
        .size_bytes
        .map_or_else(|| "N/A".to_owned(), human::size)
}

fn public(checkpoint: &Checkpoint) -> String {
    if checkpoint.public { "Yes" } else { "No" }.to_owned()
}

fn created(checkpoint: &Checkpoint) -> String {
    human::age(&checkpoint.time.0, jiff::Timestamp::now())
}

fn expires(checkpoint: &Checkpoint) -> String {
    let expiry = checkpoint.expires_at.as_ref();
    expiry.map_or_else(|| "Never".to_owned(), |time| human::day(&time.0))
}
