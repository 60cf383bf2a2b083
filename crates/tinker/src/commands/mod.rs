//! The commands, one file each, and the runtime they share.

pub(crate) mod serve;
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
pub(crate) fn run(cli: Cli, ui: Ui) -> Result<Output> {
    if let Command::Version(_) = cli.command {
        return Ok(version::run());
    }
    let ctx = Ctx::new(&cli.global, ui)?;
    match cli.command {
        Command::Serve(args) => serve::run(&ctx, args),
        command => {
            logging::init(None);
            block_on(run_client(&ctx, command))
        }
    }
}

async fn run_client(ctx: &Ctx, command: Command) -> Result<Output> {
    match command {
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
