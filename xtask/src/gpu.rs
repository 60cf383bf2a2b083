//! `cargo xtask gpu`: packs a program that holds a GPU to the CPU and times both, for a machine without
//! Rust; then runs it, or rehearses it where there is no GPU, from the packed files.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::dist::archive;
use crate::process::{cargo, check, line, target_dir};

/// What the program exits with where there is no GPU.
const NO_GPU: i32 = 3;

/// The reference models that the GPU computes.
const MODELS: [&str; 8] = [
    "gemma2", "gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3",
];

pub(crate) fn run(root: &Path) -> Result<()> {
    let build = [
        "build",
        "--release",
        "--locked",
        "--package",
        "tinker-engine",
        "--features",
        "cuda",
        "--example",
        "gpu_suite",
    ];
    check(&mut cargo(root, build))?;
    let dist = target_dir(root).join("dist");
    std::fs::create_dir_all(&dist).with_context(|| format!("cannot make {}", dist.display()))?;
    let packed = archive("tinker-gpu", &files(root))?;
    let path = dist.join("tinker-gpu.tar.gz");
    std::fs::write(&path, &packed).with_context(|| format!("cannot write {}", path.display()))?;
    println!(
        "{} ({:.1} MB): unpack it on a machine with an NVIDIA GPU and run ./run.sh",
        path.display(),
        packed.len() as f64 / 1e6
    );
    try_here(&dist, &path)
}

/// What is packed: name in the archive, file, mode.
fn files(root: &Path) -> Vec<(String, PathBuf, u32)> {
    let program = target_dir(root).join("release/examples/gpu_suite");
    let mut files = vec![
        ("gpu_suite".to_owned(), program, 0o755),
        ("run.sh".to_owned(), root.join("benches/gpu/run.sh"), 0o755),
        (
            "torch_engine.py".to_owned(),
            root.join("benches/engine/torch_engine.py"),
            0o644,
        ),
    ];
    for model in MODELS {
        for file in [
            "config.json",
            "model.safetensors",
            "reference/adapter.safetensors",
        ] {
            let from = root.join("fixtures/numerics").join(model).join(file);
            files.push((format!("fixtures/{model}/{file}"), from, 0o644));
        }
    }
    files
}

/// Unpacks the archive where it lies and runs it.
fn try_here(dist: &Path, path: &Path) -> Result<()> {
    let mut unpack = Command::new("tar");
    check(unpack.arg("-xzf").arg(path).current_dir(dist))?;
    let mut suite = Command::new("./run.sh");
    suite.current_dir(dist.join("tinker-gpu"));
    eprintln!("$ {}", line(&suite));
    let status = suite.status().context("cannot start the packed suite")?;
    match status.code() {
        Some(0) => Ok(()),
        Some(NO_GPU) => {
            println!("there is no GPU here that it could run on: it is rehearsed on the CPU");
            check(suite.arg("--rehearse"))
        }
        _ => bail!("the packed suite failed ({status})"),
    }
}
