//! `cargo xtask kill`: a server that is killed under load, as often as asked for.

use std::path::Path;

use anyhow::Result;

use crate::process::{cargo, check};

/// Kills that CI makes, in about a minute.
pub(crate) const CI_KILLS: u32 = 25;
/// Tells the suite its first seed and how many kills to make.
const KILLS_VARIABLE: &str = "TINKER_KILLS";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many times to kill the server.
    #[arg(long, default_value_t = CI_KILLS)]
    times: u32,
    /// Seed of the first load, to repeat one that failed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            times: CI_KILLS,
            seed: 1,
        }
    }
}

/// Runs the suite of kills; it prints every seed with its kills.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let test = ["test", "--package", "tinker-contract", "--test", "it"];
    check(
        cargo(root, test)
            .args(["kills::", "--", "--nocapture", "--test-threads", "1"])
            .env(KILLS_VARIABLE, format!("{}+{}", args.seed, args.times)),
    )
}
