//! `tinker checkpoint`: saved weights as the server lists them.

mod delete;
mod info;
mod list;

use tinker_types::{Checkpoint, CheckpointKind};

use crate::context::Ctx;
use crate::failure::Result;
use crate::human;
use crate::output::Output;

/// Show and delete checkpoints
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    List(list::Args),
    Info(info::Args),
    Delete(delete::Args),
}

pub(crate) async fn run(ctx: &Ctx, args: Args) -> Result<Output> {
    match args.command {
        Command::List(args) => list::run(ctx, &args).await,
        Command::Info(args) => info::run(ctx, &args).await,
        Command::Delete(args) => delete::run(ctx, &args).await,
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
