//! `cargo xtask kill`: a server that is killed under load, as often as asked for.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use crate::process::{cargo, line};

/// Kills that CI makes, in about half a minute.
const CI_KILLS: u32 = 25;
/// Tells the suite its first seed and how many kills to make.
const KILLS_VARIABLE: &str = "TINKER_KILLS";
/// Tells it how many finished futures the server finds when it starts.
const FUTURES_VARIABLE: &str = "TINKER_KILL_FUTURES";
const N_FUTURES: &str = "10000";
/// What the suite prints before the milliseconds that such a start took.
const START_UP: &str = "start-up with 10000 finished futures: ";
/// Longest that it may take, in milliseconds.
const LONGEST_START_MS: u64 = 1000;

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

/// Runs the suite of kills; it prints every seed with its kills. Holds the start-up to its time.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let test = ["test", "--package", "tinker-contract", "--test", "it"];
    let mut suite = cargo(root, test);
    suite
        .args(["kills::", "--", "--nocapture", "--test-threads", "1"])
        .env(KILLS_VARIABLE, format!("{}+{}", args.seed, args.times))
        .env(FUTURES_VARIABLE, N_FUTURES)
        .stdout(Stdio::piped());
    eprintln!("$ {}", line(&suite));
    let mut child = suite.spawn().context("cannot start the suite of kills")?;
    let stdout = child.stdout.take().context("the suite has no output")?;
    let mut start_up = None;
    for line in BufReader::new(stdout).lines() {
        let line = line.context("cannot read the output of the suite")?;
        println!("{line}");
        start_up = start_up.or_else(|| milliseconds(&line));
    }
    let status = child.wait().context("cannot wait for the suite")?;
    if !status.success() {
        bail!("the suite of kills failed ({status})");
    }
    match start_up {
        None => bail!("the suite did not say how long a start-up takes"),
        Some(ms) if ms > LONGEST_START_MS => bail!(
            "a server with {N_FUTURES} finished futures takes {ms} ms to start; at most {LONGEST_START_MS} are allowed"
        ),
        Some(_) => Ok(()),
    }
}

/// How long the start-up took, from the line that says it; the name of its test may come before.
fn milliseconds(line: &str) -> Option<u64> {
    let (_, time) = line.split_once(START_UP)?;
    time.strip_suffix(" ms")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_start_up_is_read_from_its_line() {
        let line = "test kills::x ... start-up with 10000 finished futures: 231 ms";

        assert_eq!(milliseconds(line), Some(231));
        assert_eq!(milliseconds("seed 1: 14 kills, slowest start 104ms"), None);
    }
}
