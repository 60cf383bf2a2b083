//! `cargo xtask fuzz`: mutated requests to the server's router, for as long as asked for.

use std::path::Path;

use anyhow::Result;

use crate::process::{cargo, check};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long to go on.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Seed of the requests, to repeat what failed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs the program; it prints every finding with the request that showed it.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let program = ["run", "--package", "tinker-contract", "--bin", "fuzz", "--"];
    let numbers = [
        args.seed.to_string(),
        "minutes".to_owned(),
        args.minutes.to_string(),
    ];
    check(cargo(root, program).args(numbers))
}
