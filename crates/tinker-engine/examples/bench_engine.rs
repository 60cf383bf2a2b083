//! Times the CPU engine on a model directory; `cargo xtask bench engine` runs it beside PyTorch.
//!
//! `bench_engine train|decode DIR --sequences N --threads N --repeats N [--avx2]
//! [--training-memory MIB] [--weights int8|nf4] [--precision f32|bf16]`, where `DIR` also
//! holds an `adapter.safetensors` of rank 16 and a `tokens.json` with `train`, `prompts` and
//! `new_tokens`. Prints one JSON object: seconds of each repeat after one to warm up, and the losses
//! or the tokens of all sequences, one after the other.
#![expect(clippy::print_stdout, reason = "the result of the program")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use tinker_engine::sampler::{Sampling, sample};
use tinker_engine::{
    AdamW, AdapterId, AdapterState, Backend, CpuOptions, HostTensor, LoraSpec, Loss, Precision,
    Quantization, SlotId, TrainSequence, limit_to_avx2, load_cpu_with,
};

type Failure = Box<dyn std::error::Error>;

const RANK: usize = 16;
const STEP: AdamW = AdamW {
    learning_rate: 1e-4,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.0,
    grad_clip_norm: 0.0,
};

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
    let adapter = import(&mut *backend, &dir)?;
    let repeats = option("--repeats", 5)?;
    let tokens: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("tokens.json"))?)?;
    let mut report = match task.as_str() {
        "train" => train(&mut *backend, adapter, &tokens["train"], repeats)?,
        "decode" => {
            let sequences = option("--sequences", 1)?;
            decode(&mut *backend, adapter, &tokens, sequences, repeats)?
        }
        other => return Err(format!("no task `{other}`; there are train and decode").into()),
    };
    report["peak_bytes"] = json!(peak_bytes());
    report["name"] = json!(format!("tinker-engine {}", backend.info().precision));
    println!("{report}");
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

fn import(backend: &mut dyn Backend, dir: &Path) -> Result<AdapterId, Failure> {
    let bytes = std::fs::read(dir.join("adapter.safetensors"))?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    let mut weights = BTreeMap::new();
    for (name, view) in file.tensors() {
        let (values, _) = view.data().as_chunks::<4>();
        let data = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
        weights.insert(
            name,
            HostTensor {
                shape: view.shape().to_vec(),
                data,
            },
        );
    }
    let spec = LoraSpec {
        rank: RANK,
        seed: 0,
        train_attn: true,
        train_mlp: true,
        train_unembed: false,
    };
    let (moments, gradient) = (BTreeMap::new(), BTreeMap::new());
    Ok(backend.import_adapter(&AdapterState {
        spec,
        weights,
        moments,
        gradient,
        step: 0,
    })?)
}

fn ids(value: &Value) -> Result<Vec<u32>, Failure> {
    Ok(serde_json::from_value(value.clone())?)
}

fn train(
    backend: &mut dyn Backend,
    adapter: AdapterId,
    rows: &Value,
    repeats: usize,
) -> Result<Value, Failure> {
    let rows = rows
        .as_array()
        .ok_or("tokens.json has no rows to train on")?;
    let rows = rows.iter().map(ids).collect::<Result<Vec<_>, _>>()?;
    let n_tokens: usize = rows.iter().map(|row| row.len() - 1).sum();
    // The mean over tokens, which is what the other side computes.
    let sequence = |row: &Vec<u32>| {
        let n = row.len() - 1;
        let loss = Loss::CrossEntropy {
            weights: vec![1.0 / n_tokens as f32; n],
        };
        TrainSequence {
            tokens: row[..n].to_vec(),
            targets: row[1..].to_vec(),
            k: 1,
            loss,
        }
    };
    let batch: Vec<TrainSequence> = rows.iter().map(sequence).collect();
    let (mut seconds, mut losses, mut cpu_start) = (Vec::new(), Vec::new(), 0.0);
    for repeat in 0..=repeats {
        if repeat == 1 {
            cpu_start = cpu_seconds()?;
        }
        let start = Instant::now();
        let outputs = backend.forward_backward(adapter, &batch)?;
        backend.optim_step(adapter, &STEP.into())?;
        seconds.push(start.elapsed().as_secs_f64());
        losses.push(outputs.iter().map(|o| o.loss).sum::<f64>());
    }
    let (seconds, cpu) = (&seconds[1..], cpu_seconds()? - cpu_start);
    Ok(json!({ "seconds": seconds, "cpu_seconds": cpu, "losses": losses, "n_tokens": n_tokens }))
}

fn decode(
    backend: &mut dyn Backend,
    adapter: AdapterId,
    work: &Value,
    n_sequences: usize,
    repeats: usize,
) -> Result<Value, Failure> {
    let prompts = work["prompts"]
        .as_array()
        .ok_or("tokens.json: no prompts")?;
    let prompts = prompts.iter().map(ids).collect::<Result<Vec<_>, _>>()?;
    let prompts = prompts
        .get(..n_sequences)
        .ok_or("tokens.json: too few prompts")?;
    let new_tokens = work["new_tokens"]
        .as_u64()
        .ok_or("tokens.json: no new_tokens")?;
    let mut of = Decoding::default();
    let (mut seconds, mut cpu) = (Vec::new(), Vec::new());
    for _ in 0..=repeats {
        of.start(backend, adapter, prompts, usize::try_from(new_tokens)?)?;
        let (start, cpu_start) = (Instant::now(), cpu_seconds()?);
        for _ in 0..new_tokens {
            of.step(backend)?;
        }
        seconds.push(start.elapsed().as_secs_f64());
        cpu.push(cpu_seconds()? - cpu_start);
        of.slots.iter().for_each(|slot| backend.close_slot(*slot));
    }
    let (seconds, cpu) = (&seconds[1..], cpu[1..].iter().sum::<f64>());
    Ok(json!({
        "seconds": seconds, "cpu_seconds": cpu, "tokens": of.tokens.concat(),
        "logprobs": of.logprobs.concat(), "n_tokens": of.tokens.concat().len(),
    }))
}

/// Sequences that are decoded together, greedily.
#[derive(Default)]
struct Decoding {
    slots: Vec<SlotId>,
    /// Of the next tokens, `[sequences, vocab]`.
    logits: Vec<f32>,
    tokens: Vec<Vec<u32>>,
    logprobs: Vec<Vec<f32>>,
}

impl Decoding {
    fn start(
        &mut self,
        backend: &mut dyn Backend,
        adapter: AdapterId,
        prompts: &[Vec<u32>],
        new_tokens: usize,
    ) -> Result<(), Failure> {
        *self = Self {
            tokens: vec![Vec::new(); prompts.len()],
            logprobs: vec![Vec::new(); prompts.len()],
            ..Self::default()
        };
        for prompt in prompts {
            let slot = backend.open_slot(Some(adapter), prompt.len() + new_tokens)?;
            self.slots.push(slot);
            let next = backend.prefill(slot, prompt, false)?.next_logits;
            self.logits.extend(next);
        }
        Ok(())
    }

    fn step(&mut self, backend: &mut dyn Backend) -> Result<(), Failure> {
        let greedy = Sampling {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
        };
        let vocab = self.logits.len() / self.slots.len();
        let mut rows = Vec::with_capacity(self.slots.len());
        for (i, logits) in self.logits.chunks_exact(vocab).enumerate() {
            let draw = sample(logits, &greedy, 0, 0)?;
            self.tokens[i].push(draw.token);
            self.logprobs[i].push(draw.logprob);
            rows.push((self.slots[i], draw.token));
        }
        self.logits = backend.decode_step(&rows)?;
        Ok(())
    }
}

/// Processor time of all threads of this process so far, as Linux counts it.
fn cpu_seconds() -> Result<f64, Failure> {
    let mut nanoseconds = 0.0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        let first = text.split_whitespace().next().ok_or("empty schedstat")?;
        nanoseconds += first.parse::<f64>()?;
    }
    Ok(nanoseconds / 1e9)
}

/// Largest resident memory of this process; 0 where the system does not tell.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}
