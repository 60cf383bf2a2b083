//! The work that engines are timed on, and PyTorch's program beside them: training steps, and greedy
//! decoding with the log-probability of each token.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tinker_engine::sampler::{Sampling, sample};
use tinker_engine::{
    AdamW, AdapterId, AdapterState, Backend, HostTensor, LoraSpec, Loss, SlotId, TrainSequence,
};

/// Why a program ends.
pub(crate) type Failure = Box<dyn std::error::Error>;

const RANK: usize = 16;
const STEP: AdamW = AdamW {
    learning_rate: 1e-4,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.0,
    grad_clip_norm: 0.0,
};

/// Times and results of one program; PyTorch's prints the same.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The engine and its precision.
    pub(crate) name: String,
    /// Of each step or pass, one to warm up left out.
    pub(crate) seconds: Vec<f64>,
    /// Processor time of all of these together.
    pub(crate) cpu_seconds: f64,
    /// Tokens of a step or pass.
    pub(crate) n_tokens: usize,
    /// Most memory that the process held.
    pub(crate) peak_bytes: u64,
    /// Loss of each step, that to warm up too.
    #[serde(default)]
    pub(crate) losses: Vec<f64>,
    /// Greedy tokens of all sequences, one after the other.
    #[serde(default)]
    pub(crate) tokens: Vec<u32>,
    /// Log-probability of each.
    #[serde(default)]
    pub(crate) logprobs: Vec<f64>,
}

/// Reads what `DIR/tokens.json` says is to be done.
pub(crate) fn read_work(dir: &Path) -> Result<Value, Failure> {
    let text = std::fs::read_to_string(dir.join("tokens.json"))?;
    Ok(serde_json::from_str(&text)?)
}

/// Imports the adapter of all layers of `DIR`.
pub(crate) fn import(backend: &mut dyn Backend, dir: &Path) -> Result<AdapterId, Failure> {
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

/// Takes training steps on `rows` of tokens.
pub(crate) fn train(
    backend: &mut dyn Backend,
    adapter: AdapterId,
    rows: &Value,
    repeats: usize,
) -> Result<Report, Failure> {
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
    Ok(Report {
        name: backend.info().precision.clone(),
        seconds: seconds.split_off(1),
        cpu_seconds: cpu_seconds()? - cpu_start,
        losses,
        n_tokens,
        ..Report::default()
    })
}

/// Decodes after the first `n_sequences` prompts, greedily.
pub(crate) fn decode(
    backend: &mut dyn Backend,
    adapter: AdapterId,
    work: &Value,
    n_sequences: usize,
    repeats: usize,
) -> Result<Report, Failure> {
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
    let logprobs = of.logprobs.concat();
    Ok(Report {
        name: backend.info().precision.clone(),
        seconds: seconds.split_off(1),
        cpu_seconds: cpu[1..].iter().sum(),
        n_tokens: logprobs.len(),
        tokens: of.tokens.concat(),
        logprobs: logprobs.into_iter().map(f64::from).collect(),
        ..Report::default()
    })
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
