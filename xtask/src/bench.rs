//! `cargo xtask bench PEER`: us beside a peer in one run, as ratios.

mod client;
mod engine;
mod server;

use std::path::Path;

use anyhow::Result;
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// The client beside the official Python SDK: CPU, memory, throughput.
    Client(client::Args),
    /// The CPU engine beside PyTorch: training, greedy decoding, memory.
    Engine(engine::Args),
    /// The server through the wire, driven by the official SDK: speed, latency, many adapters.
    Server(server::Args),
}

pub(crate) fn run(root: &Path, bench: &Bench) -> Result<()> {
    match bench {
        Bench::Client(args) => client::run(root, args),
        Bench::Engine(args) => engine::run(root, args),
        Bench::Server(args) => server::run(root, args),
    }
}

/// Name of the processor and number of its cores, as far as the system tells.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or(std::env::consts::ARCH, |(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{model}, {cores} cores")
}
