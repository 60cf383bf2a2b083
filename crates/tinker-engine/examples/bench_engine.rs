//! Times the CPU engine on a model directory; `cargo xtask bench engine` runs it beside PyTorch.
//!
//! `bench_engine train|decode DIR --sequences N --threads N --repeats N [--avx2]
//! [--training-memory MIB] [--weights int8|nf4] [--precision f32|bf16]`, where `DIR` also
//! holds an `adapter.safetensors` of rank 16 and a `tokens.json` with `train`, `prompts` and
//! `new_tokens`. Prints one JSON object: seconds of each repeat after one to warm up, and the losses
//! or the tokens of all sequences, one after the other.
#![expect(clippy::print_stdout, reason = "the result of the program")]

mod timed;

use std::path::PathBuf;

use tinker_engine::{CpuOptions, Precision, Quantization, limit_to_avx2, load_cpu_with};

use self::timed::Failure;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [task, dir, options @ ..] = &arguments[..] else {
        return Err("usage: bench_engine train|decode DIR [OPTIONS]".into());
    };
    let option = |name: &str, default: usize| -> Result<usize, Failure> {
        match options.iter().position(|o| o == name) {
            None => Ok(default),
            Some(i) => Ok(options
                .get(i + 1)
                .ok_or("an option has no value")?
                .parse()?),
        }
    };
    if options.iter().any(|o| o == "--avx2") && !limit_to_avx2() {
        return Err("this machine has no AVX2".into());
    }
    let dir = PathBuf::from(dir);
    let memory = option("--training-memory", usize::MAX)?;
    let cpu = CpuOptions {
        threads: option("--threads", 1)?,
        weights: choice(options, "--weights", Quantization::ALL, Quantization::name)?,
        precision: choice(options, "--precision", Precision::ALL, Precision::name)?
            .unwrap_or_default(),
        training_memory: (memory < usize::MAX).then_some(memory << 20),
        ..CpuOptions::default()
    };
    let mut backend = load_cpu_with(&dir, &cpu)?;
    let adapter = timed::import(&mut *backend, &dir)?;
    let repeats = option("--repeats", 5)?;
    let work = timed::read_work(&dir)?;
    let mut report = match task.as_str() {
        "train" => timed::train(&mut *backend, adapter, &work["train"], repeats)?,
        "decode" => {
            let sequences = option("--sequences", 1)?;
            timed::decode(&mut *backend, adapter, &work, sequences, repeats)?
        }
        other => return Err(format!("no task `{other}`; there are train and decode").into()),
    };
    report.peak_bytes = peak_bytes();
    report.name = format!("tinker-engine {}", report.name);
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// The one of `all` that an option names, if it is given.
fn choice<T: Copy, const N: usize>(
    options: &[String],
    option: &str,
    all: [T; N],
    name: fn(T) -> &'static str,
) -> Result<Option<T>, Failure> {
    let Some(at) = options.iter().position(|o| o == option) else {
        return Ok(None);
    };
    let given = options.get(at + 1).ok_or("an option has no value")?;
    let known = all.into_iter().find(|one| name(*one) == given);
    Ok(Some(known.ok_or_else(|| {
        format!("{option} is one of {:?}", all.map(name))
    })?))
}

/// Largest resident memory of this process; 0 where the system does not tell.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}
