//! The `tinker` command: reads flags, runs one command, prints what it returns.

#![expect(
    clippy::doc_markdown,
    reason = "doc comments of flags are help for terminals, which show no Markdown"
)]

mod base_model;
mod cli;
mod commands;
mod connect;
mod context;
mod env;
mod failure;
mod human;
mod keeper;
mod local;
mod logging;
mod numbers;
mod open_files;
mod out_file;
mod output;
mod settings;
mod signals;
mod speaker;
mod ui;
mod waiting;
mod weights;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::FromArgMatches as _;

use crate::cli::Cli;
use crate::failure::Result;
use crate::ui::Ui;

fn main() -> ExitCode {
    let mut command = cli::command();
    let matches = command.try_get_matches_from_mut(std::env::args_os());
    let parsed = matches.and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed.map_err(|error| error.format(&mut command)) {
        Ok(cli) => cli,
        Err(error) => {
            // A reader of the help that went away is no error.
            let _ = error.print();
            return u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
        }
    };
    let ui = Ui::new(cli.global.verbosity());
    match run(cli, &ui) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            ui.failure(&failure);
            failure.kind.into()
        }
    }
}

fn run(cli: Cli, ui: &Ui) -> Result<()> {
    let format = cli.global.format();
    let output = commands::run(cli, ui)?;
    output
        .print(format)
        .context("cannot write to standard output")?;
    if let Some(note) = output.note() {
        ui.note(note);
    }
    Ok(())
}
