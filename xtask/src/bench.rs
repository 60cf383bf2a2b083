//! `cargo xtask bench PEER`: us beside a peer in one run, as ratios.

mod engine;

use std::path::Path;

use anyhow::Result;
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// The CPU engine beside PyTorch: training, greedy decoding, memory.
    Engine(engine::Args),
}

pub(crate) fn run(root: &Path, bench: &Bench) -> Result<()> {
    match bench {
        Bench::Engine(args) => engine::run(root, args),
    }
}
