//! `cargo xtask soak`: mixed traffic on a release server for hours, with its memory and files watched.

use std::path::Path;

use anyhow::{Result, bail};

use crate::process::{cargo, check, command, target_dir};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long to load the server.
    #[arg(long, default_value_t = 120.0)]
    minutes: f64,
    /// Seed of what the clients do.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Builds server and load and runs copies of them, which no build replaces meanwhile.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    if !(args.minutes > 0.0 && args.minutes < 1e5) {
        bail!(
            "--minutes {}: it must be above 0 and below 100000",
            args.minutes
        );
    }
    let server = ["build", "--release", "--package", "tinker"];
    check(&mut cargo(root, server))?;
    let load = ["build", "--package", "tinker-contract", "--bin", "soak"];
    check(&mut cargo(root, load))?;
    let target = target_dir(root);
    let dir = target.join("soak");
    std::fs::create_dir_all(&dir)?;
    let (program, load) = (dir.join("tinker"), dir.join("soak"));
    std::fs::copy(target.join("release/tinker"), &program)?;
    std::fs::copy(target.join("debug/soak"), &load)?;
    let args = [args.minutes.to_string(), args.seed.to_string()];
    check(command(root, load, [&program, &dir]).args(args))
}
