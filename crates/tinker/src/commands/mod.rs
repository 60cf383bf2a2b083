//! The commands, one file each, and the runtime they share.

pub(crate) mod chat;
pub(crate) mod checkpoint;
pub(crate) mod model;
pub(crate) mod paging;
pub(crate) mod resume;
pub(crate) mod run;
pub(crate) mod sample;
pub(crate) mod serve;
pub(crate) mod train;
pub(crate) mod version;

use anyhow::Context as _;

use crate::cli::{Cli, Command};
use crate::context::Ctx;
use crate::failure::Result;
use crate::logging;
use crate::output::Output;
use crate::ui::Ui;

/// Runs the command of `cli`.
///
/// # Errors
/// The command's.
pub(crate) fn run(cli: Cli, ui: &Ui) -> Result<Output> {
    if let Command::Version(_) = cli.command {
        return Ok(version::run());
    }
    let ctx = Ctx::new(&cli.global, ui)?;
    match cli.command {
        Command::Serve(args) => serve::run(&ctx, args),
        command => {
            logging::init(&ctx.ui, None);
            block_on(run_client(&ctx, command))
        }
    }
}

async fn run_client(ctx: &Ctx, command: Command) -> Result<Output> {
    match command {
        Command::Train(args) => train::run(ctx, args).await,
        Command::Resume(args) => resume::run(ctx, &args).await,
        Command::Sample(args) => sample::run(ctx, &args).await,
        Command::Chat(args) => chat::run(ctx, &args).await,
        Command::Checkpoint(args) => checkpoint::run(ctx, args).await,
        Command::Run(args) => run::run(ctx, *args).await,
        Command::Model(args) => model::run(ctx, args).await,
        // Answered before a client is set up.
        Command::Version(_) | Command::Serve(_) => Ok(Output::none()),
    }
}

/// Runs a command on this thread; the heavy work is the server's.
pub(crate) fn block_on<T>(command: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(command)
}
