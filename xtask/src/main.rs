//! Repository tasks, `cargo xtask TASK`: what CI runs, and what is too long for a shell line.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line tool reports by printing"
)]

mod arm;
mod bench;
mod chaos;
mod ci;
mod cookbook;
mod dist;
mod fuzz;
mod gpu;
mod kill;
mod models;
mod process;
mod python;
mod soak;
mod test;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", about = "Repository tasks")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Builds and runs every test, those with the official Python SDK included.
    Test(test::Args),
    /// Trains under every fault at once and compares with a run that is left alone.
    Chaos(chaos::Args),
    /// Kills the server at random moments under load and looks for broken promises.
    Kill(kill::Args),
    /// Tests the CPU kernels for 64-bit ARM, emulated where this machine is none.
    Arm,
    /// Runs training loops of the Python cookbook against our server.
    Cookbook(cookbook::Args),
    /// Sends mutated requests and looks for panics and memory.
    Fuzz(fuzz::Args),
    /// Loads the server for hours and fails if its memory or open files grow.
    Soak(soak::Args),
    /// Runs every check: formatting, lints, tidy, tests, documentation, size of the binary.
    Ci,
    /// Checks the rules that the compiler does not know: layers, purity, file length, test files.
    Tidy,
    /// Rebuilds the embedded base model `tinker/nano` from its script.
    Models(models::Args),
    /// Measures us beside a peer in one run.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Packs a program that holds a GPU to the CPU and times both, and runs it if there is one here.
    Gpu,
    /// Packs the release binary, licences and README into target/dist.
    Dist,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let root = repository_root()?;
    match cli.task {
        Task::Test(args) => test::run(&root, &args),
        Task::Chaos(args) => chaos::run(&root, &args),
        Task::Kill(args) => kill::run(&root, &args),
        Task::Arm => arm::run(&root),
        Task::Cookbook(args) => cookbook::run(&root, &args),
        Task::Fuzz(args) => fuzz::run(&root, &args),
        Task::Soak(args) => soak::run(&root, &args),
        Task::Ci => ci::run(&root),
        Task::Tidy => tidy::run(&root),
        Task::Models(args) => models::run(&root, &args),
        Task::Bench(bench) => bench::run(&root, &bench),
        Task::Gpu => gpu::run(&root),
        Task::Dist => dist::run(&root),
    }
}

/// The directory of the workspace manifest: the parent of this package.
fn repository_root() -> Result<PathBuf> {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(PathBuf::from)
        .context("the xtask package has no parent directory")
}
