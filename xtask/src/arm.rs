//! `cargo xtask arm`: the tests of the CPU kernels on 64-bit ARM, which this machine may have to emulate.

use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::process::{cargo, check, command, output};

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64";
/// Where Debian puts the libraries of the other architecture.
const LIBRARIES: &str = "/usr/aarch64-linux-gnu";
/// Tests that train a model in a loop: minutes under emulation, and about no kernel.
const SLOW: &str = "what_is_computed_again";

/// Builds the tests of the engine for ARM and runs those of its kernels.
pub(crate) fn run(root: &Path) -> Result<()> {
    let mut tests = cargo(root, ["test", "--package", "tinker-engine", "--lib"]);
    if !cfg!(all(target_arch = "aarch64", target_os = "linux")) {
        look_for_tools(root)?;
        tests
            .args(["--target", TARGET])
            .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER)
            .env(
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER",
                format!("{EMULATOR} -L {LIBRARIES}"),
            );
    }
    check(tests.args(["cpu::", "--", "--skip", SLOW]))
}

/// What the emulated run needs, and how to get it.
fn look_for_tools(root: &Path) -> Result<()> {
    for tool in [LINKER, EMULATOR] {
        command(root, tool, ["--version"])
            .output()
            .with_context(|| {
                format!("cannot start {tool}: install it (Debian: `apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user`)")
            })?;
    }
    let installed = output(&mut command(
        root,
        "rustup",
        ["target", "list", "--installed"],
    ))?;
    if !installed.lines().any(|line| line == TARGET) {
        bail!("Rust has no library for {TARGET}: `rustup target add {TARGET}`");
    }
    Ok(())
}
