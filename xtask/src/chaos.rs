//! `cargo xtask chaos`: runs under every fault at once, as many as asked for.

use std::path::Path;

use anyhow::Result;

use crate::process::{cargo, check};

/// Seeds that CI tries, in under 5 minutes.
pub(crate) const CI_SEEDS: u64 = 20;
/// Tells the suite which seeds to try.
const SEEDS_VARIABLE: &str = "TINKER_CHAOS_SEEDS";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many seeds to try.
    #[arg(long, default_value_t = CI_SEEDS)]
    seeds: u64,
    /// The first of them, to repeat a run that failed.
    #[arg(long, default_value_t = 1)]
    first: u64,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            seeds: CI_SEEDS,
            first: 1,
        }
    }
}

/// Runs the chaos suite; it prints every seed with its faults.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let test = ["test", "--package", "tinker-contract", "--test", "it"];
    check(
        cargo(root, test)
            .args(["chaos::", "--", "--nocapture"])
            .env(SEEDS_VARIABLE, format!("{}+{}", args.first, args.seeds)),
    )
}
