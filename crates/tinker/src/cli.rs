//! The tree of commands and the flags that all of them share.

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::commands::{chat, checkpoint, model, resume, run, sample, serve, train, version};
use crate::env;
use crate::output::Format;
use crate::settings::ServerFlags;
use crate::ui::Verbosity;

/// Fine-tune language models, sample from them, and see what became of it
///
/// Works against the hosted Tinker service, any server that speaks its API, and an embedded server
/// on this machine, which is used when there are no credentials, with `--local`, and for models
/// named `tinker/...`.
#[derive(Debug, Parser)]
#[command(
    name = "tinker",
    version = version::long(),
    after_help = env::help(),
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: GlobalFlags,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags of every command, before or after its name.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct GlobalFlags {
    /// How to print data: for people, as one JSON document, or as one per row
    #[arg(short, long, global = true, value_enum, default_value_t)]
    format: Format,
    /// Print JSON: short for `--format json`
    #[arg(long, global = true, conflicts_with = "format")]
    json: bool,
    /// Say nothing but errors and warnings on standard error
    #[arg(short, long, global = true)]
    quiet: bool,
    #[command(flatten)]
    pub(crate) server: ServerFlags,
}

impl GlobalFlags {
    /// How to print data.
    pub(crate) fn format(&self) -> Format {
        if self.json { Format::Json } else { self.format }
    }

    /// How much to say beside the data.
    pub(crate) fn verbosity(&self) -> Verbosity {
        if self.quiet {
            Verbosity::Quiet
        } else {
            Verbosity::Normal
        }
    }
}

/// The tree of commands. Every flag takes a number below 0 as its value, and says itself what it
/// thinks of it; as a flag of its own it would be unknown.
pub(crate) fn command() -> clap::Command {
    fn take_negative(command: clap::Command) -> clap::Command {
        command
            .mut_args(|arg| match arg.get_action().takes_values() {
                true => arg.allow_negative_numbers(true),
                false => arg,
            })
            .mut_subcommands(take_negative)
    }
    take_negative(Cli::command())
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Train(train::Args),
    Resume(resume::Args),
    Sample(Box<sample::Args>),
    Chat(Box<chat::Args>),
    Checkpoint(checkpoint::Args),
    Run(Box<run::Args>),
    Model(model::Args),
    Serve(serve::Args),
    Version(version::Args),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn global_flags_stand_before_or_after_the_command() {
        for line in [
            "tinker -f json version",
            "tinker version -f json",
            "tinker version --json",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();

            assert_eq!(cli.global.format(), Format::Json, "{line}");
        }
    }
}
