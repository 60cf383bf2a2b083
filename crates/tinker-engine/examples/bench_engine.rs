//! Times training and greedy decoding on the model that `benches/engine/torch_engine.py` makes.
//!
//! Run by `cargo xtask bench engine`, which runs PyTorch on the same files beside it. Prints one
//! JSON object: `bench_engine train|decode DIR --threads N --repeats N`.
#![expect(clippy::print_stdout, reason = "the report goes to standard output")]

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use safetensors::SafeTensors;
use serde::Deserialize;
use tinker_engine::{
    AdamW, AdapterId, AdapterState, Backend, HostTensor, LoraSpec, Loss, TrainSequence, load_cpu,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Tokens decoded in one pass.
const NEW_TOKENS: usize = 128;
/// The settings of the PyTorch side.
const ADAMW: AdamW = AdamW {
    learning_rate: 1e-4,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.0,
    grad_clip_norm: 0.0,
};

#[derive(Debug, Deserialize)]
struct Tokens {
    train: Vec<Vec<u32>>,
    prompt: Vec<u32>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [task, dir, ..] = &args[..] else {
        return Err("usage: bench_engine train|decode DIR --threads N --repeats N".into());
    };
    let dir = PathBuf::from(dir);
    let repeats = number_after(&args, "--repeats")?;
    let tokens: Tokens = serde_json::from_slice(&std::fs::read(dir.join("tokens.json"))?)?;
    let mut backend = load_cpu(&dir, number_after(&args, "--threads")?)?;
    let adapter = backend.import_adapter(&read_adapter(&dir.join("adapter.safetensors"))?)?;
    let mut report = match task.as_str() {
        "train" => train(backend.as_mut(), adapter, &tokens.train, repeats)?,
        "decode" => decode(backend.as_mut(), adapter, &tokens.prompt, repeats)?,
        other => return Err(format!("unknown task `{other}`: train or decode").into()),
    };
    report["name"] = backend.info().precision.clone().into();
    report["peak_bytes"] = peak_bytes()?.into();
    println!("{report}");
    Ok(())
}

fn number_after(args: &[String], flag: &str) -> Result<usize> {
    let value = args.iter().skip_while(|arg| *arg != flag).nth(1);
    Ok(value.ok_or_else(|| format!("{flag} is missing"))?.parse()?)
}

fn read_adapter(path: &Path) -> Result<AdapterState> {
    let bytes = std::fs::read(path)?;
    let mut weights = BTreeMap::new();
    let mut rank = 0;
    for (name, view) in SafeTensors::deserialize(&bytes)?.tensors() {
        let data = view.data().chunks_exact(4);
        let data = data
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        if name.ends_with("lora_A.weight") {
            rank = view.shape()[0];
        }
        weights.insert(
            name,
            HostTensor {
                shape: view.shape().to_vec(),
                data,
            },
        );
    }
    let spec = LoraSpec {
        rank,
        seed: 0,
        train_attn: true,
        train_mlp: true,
        train_unembed: false,
    };
    Ok(AdapterState {
        spec,
        weights,
        moments: BTreeMap::new(),
        gradient: BTreeMap::new(),
        step: 0,
    })
}

/// Steps of mean cross-entropy over the whole batch; the first, to warm up, is not timed.
fn train(
    backend: &mut dyn Backend,
    adapter: AdapterId,
    rows: &[Vec<u32>],
    n_steps: usize,
) -> Result<serde_json::Value> {
    let n_tokens: usize = rows.iter().map(|row| row.len() - 1).sum();
    let batch: Vec<TrainSequence> = rows.iter().map(|row| sequence(row, n_tokens)).collect();
    let (mut seconds, mut losses) = (Vec::new(), Vec::new());
    for _ in 0..=n_steps {
        let start = Instant::now();
        let outputs = backend.forward_backward(adapter, &batch)?;
        backend.optim_step(adapter, &ADAMW)?;
        seconds.push(start.elapsed().as_secs_f64());
        losses.push(outputs.iter().map(|output| output.loss).sum::<f64>());
    }
    seconds.remove(0);
    Ok(serde_json::json!({ "seconds": seconds, "losses": losses, "n_tokens": n_tokens }))
}

fn sequence(row: &[u32], n_tokens: usize) -> TrainSequence {
    let (tokens, targets) = (row[..row.len() - 1].to_vec(), row[1..].to_vec());
    let weights = vec![1.0 / n_tokens as f32; tokens.len()];
    TrainSequence {
        tokens,
        targets,
        k: 1,
        loss: Loss::CrossEntropy { weights },
    }
}

/// Passes of greedy decoding with the log-probability of each token; prompt and first pass not timed.
fn decode(
    backend: &mut dyn Backend,
    adapter: AdapterId,
    prompt: &[u32],
    n_passes: usize,
) -> Result<serde_json::Value> {
    let (mut seconds, mut tokens, mut logprobs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..=n_passes {
        let slot = backend.open_slot(Some(adapter), prompt.len() + NEW_TOKENS)?;
        let mut logits = backend.prefill(slot, prompt, false)?.next_logits;
        (tokens, logprobs) = (Vec::new(), Vec::new());
        let start = Instant::now();
        for _ in 0..NEW_TOKENS {
            let (token, logprob) = best(&logits);
            tokens.push(token);
            logprobs.push(logprob);
            logits = backend.decode_step(&[(slot, token)])?;
        }
        seconds.push(start.elapsed().as_secs_f64());
        backend.close_slot(slot);
    }
    seconds.remove(0);
    let n_tokens = NEW_TOKENS;
    Ok(serde_json::json!({
        "seconds": seconds, "tokens": tokens, "logprobs": logprobs, "n_tokens": n_tokens,
    }))
}

/// The likeliest token and its log-probability.
fn best(logits: &[f32]) -> (u32, f32) {
    let mut token = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > logits[token] {
            token = i;
        }
    }
    let sum: f32 = logits
        .iter()
        .map(|&logit| (logit - logits[token]).exp())
        .sum();
    (token as u32, -sum.ln())
}

/// Largest resident memory of this process so far, as Linux counts it.
fn peak_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line
        .ok_or("no VmHWM in /proc/self/status")?
        .trim()
        .trim_end_matches(" kB");
    Ok(kib.parse::<u64>()? * 1024)
}
