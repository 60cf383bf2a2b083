//! `cargo xtask ci`: every check, in order of cost; stops at the first that fails.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::process::{cargo, check, command, target_dir};
use crate::{chaos, kill, test, tidy};

/// Largest stripped release binary, model included.
const MAX_BINARY_BYTES: u64 = 25_000_000;
/// `tinker version` must not take longer than this.
const MAX_START: Duration = Duration::from_millis(10);

pub(crate) fn run(root: &Path) -> Result<()> {
    let clippy = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    let with_gpu = [
        "clippy",
        "--package",
        "tinker",
        "--package",
        "tinker-engine",
        "--package",
        "tinker-server",
        "--features",
        "tinker/cuda",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    let doc = [
        "doc",
        "--workspace",
        "--no-deps",
        "--document-private-items",
    ];
    check(&mut cargo(root, ["fmt", "--all", "--check"]))?;
    tidy::run(root)?;
    check(&mut cargo(root, clippy))?;
    check(&mut cargo(root, with_gpu))?;
    check(cargo(root, doc).env("RUSTDOCFLAGS", "-D warnings"))?;
    test::run(root, &test::Args::default())?;
    chaos::run(root, &chaos::Args::default())?;
    kill::run(root, &kill::Args::default())?;
    release_binary(root)
}

/// Builds the release binary and holds it to its size and its start-up time.
fn release_binary(root: &Path) -> Result<()> {
    check(&mut cargo(
        root,
        ["build", "--release", "--package", "tinker"],
    ))?;
    let binary = target_dir(root).join("release").join(crate::dist::BINARY);
    let metadata =
        std::fs::metadata(&binary).with_context(|| format!("cannot read {}", binary.display()))?;
    let n_bytes = metadata.len();
    println!(
        "release binary: {:.1} MB of at most 25",
        n_bytes as f64 / 1e6
    );
    if n_bytes > MAX_BINARY_BYTES {
        bail!("the release binary has {n_bytes} bytes; at most {MAX_BINARY_BYTES} are allowed");
    }
    let best = (0..20)
        .map(|_| time_of_version(root, &binary))
        .try_fold(Duration::MAX, |best, time| {
            Ok::<_, anyhow::Error>(best.min(time?))
        })?;
    println!(
        "tinker version: {:.1} ms of at most 10",
        best.as_secs_f64() * 1e3
    );
    if best > MAX_START {
        bail!("`tinker version` takes {best:?}; at most {MAX_START:?} are allowed");
    }
    Ok(())
}

fn time_of_version(root: &Path, binary: &Path) -> Result<Duration> {
    let start = Instant::now();
    let output = command(root, binary, ["version"])
        .output()
        .context("cannot start the binary")?;
    let time = start.elapsed();
    if !output.status.success() {
        bail!(
            "`tinker version` failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(time)
}
