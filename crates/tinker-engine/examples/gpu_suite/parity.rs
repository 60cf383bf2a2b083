//! Whether a device agrees with the CPU, on every reference model and on a larger one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use tinker_engine::{
    AdamW, AdapterState, Backend, HostTensor, LoraSpec, Loss, TrainSequence, load_cpu,
};

use super::Suite;
use super::shape::SHAPES;
use super::timed::Failure;

/// Largest difference that is rounding, in relative L2.
const TOLERANCE: f64 = 1e-4;

const STEP: AdamW = AdamW {
    learning_rate: 1e-4,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.0,
    grad_clip_norm: 0.0,
};

/// Runs every reference model on both devices, and a larger one, whose products have several segments;
/// returns whether they agree.
pub(super) fn parity(suite: &Suite, fixtures: &Path, work: &Path) -> Result<bool, Failure> {
    let entries = std::fs::read_dir(fixtures)?.collect::<Result<Vec<_>, _>>()?;
    let mut models: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    models.retain(|dir| dir.join("config.json").exists());
    models.sort();
    if models.is_empty() {
        return Err(format!("{}: there are no models", fixtures.display()).into());
    }
    let larger = work.join(SHAPES[0].name);
    SHAPES[0].write(&larger)?;
    models.push(larger);
    println!("parity with the CPU, largest difference in relative L2 (allowed: {TOLERANCE:e})");
    println!(
        "{:<12} {:>10} {:>10} {:>10} {:>10}  same bits alone and together",
        "model", "log-probs", "gradients", "weights", "logits"
    );
    let mut agrees = true;
    for dir in models {
        let name = dir.file_name().map(|n| n.to_string_lossy().into_owned());
        let name = name.unwrap_or_default();
        let adapter = adapter(&dir)?;
        let on_cpu = Answers::of(&mut *load_cpu(&dir, suite.threads)?, &adapter)?;
        let on_gpu = Answers::of(&mut *suite.load(&dir)?, &adapter)?;
        let off = on_gpu.differences(&on_cpu);
        let same = if on_gpu.same_bits { "yes" } else { "NO" };
        let columns = off.map(|off| format!("{off:>10.1e}")).join(" ");
        println!("{name:<12} {columns}  {same}");
        agrees &= on_gpu.same_bits && off.iter().all(|off| *off < TOLERANCE);
    }
    println!(
        "{}\n",
        if agrees {
            "all agree"
        } else {
            "THEY DO NOT AGREE"
        }
    );
    Ok(agrees)
}

/// What a device makes of a model.
struct Answers {
    logprobs: Vec<f32>,
    gradient: BTreeMap<String, Vec<f32>>,
    weights: BTreeMap<String, Vec<f32>>,
    logits: Vec<f32>,
    /// Whether batch mates and chunks change no bit.
    same_bits: bool,
}

impl Answers {
    fn of(backend: &mut dyn Backend, state: &AdapterState) -> Result<Self, Failure> {
        let vocab = u32::try_from(backend.info().vocab_size)?;
        let token = |i: u32| (i * 37 + 11) % vocab;
        let sequence = |n: u32| TrainSequence {
            tokens: (0..n).map(token).collect(),
            targets: (1..=n).map(token).collect(),
            k: 1,
            loss: Loss::CrossEntropy {
                weights: vec![1.0; n as usize],
            },
        };
        let batch = [1, 200, 67, 33].map(sequence);
        let adapter = backend.import_adapter(state)?;
        let outputs = backend.forward_backward(adapter, &batch)?;
        let gradient = backend.export_adapter(adapter)?.gradient;
        let twin = backend.import_adapter(state)?;
        let mut same_bits = true;
        for (sequence, output) in batch.iter().zip(&outputs) {
            let alone = backend.forward_backward(twin, std::slice::from_ref(sequence))?;
            same_bits &= alone[0].logprobs == output.logprobs;
        }
        same_bits &= backend.export_adapter(twin)?.gradient == gradient;
        backend.optim_step(adapter, &STEP.into())?;
        let weights = backend.export_adapter(adapter)?.weights.into_iter();
        let weights = weights.map(|(name, tensor)| (name, tensor.data)).collect();

        let prompt: Vec<u32> = (0..150).map(token).collect();
        let slot = backend.open_slot(Some(twin), 160)?;
        let logits = backend.prefill(slot, &prompt, false)?.next_logits;
        let chunked = backend.open_slot(Some(twin), 160)?;
        backend.prefill(chunked, &prompt[..77], false)?;
        let bare = backend.open_slot(None, 160)?;
        let mut last = Vec::new();
        for token in &prompt[77..] {
            last = backend.decode_step(&[(chunked, *token), (bare, 1)])?;
        }
        same_bits &= last[..vocab as usize] == logits[..];
        Ok(Self {
            logprobs: outputs.into_iter().flat_map(|o| o.logprobs).collect(),
            gradient,
            weights,
            logits,
            same_bits,
        })
    }

    fn differences(&self, other: &Self) -> [f64; 4] {
        let worst = |a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>| {
            if a.is_empty() || !a.keys().eq(b.keys()) {
                return f64::INFINITY;
            }
            let pairs = a.values().zip(b.values());
            let off = pairs.map(|(values, wanted)| relative(values, wanted));
            off.fold(0.0, f64::max)
        };
        [
            relative(&self.logprobs, &other.logprobs),
            worst(&self.gradient, &other.gradient),
            worst(&self.weights, &other.weights),
            relative(&self.logits, &other.logits),
        ]
    }
}

/// `|a - b| / |b|`; infinite where something is no number.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let pairs = a.iter().zip(b);
    let off: f64 = pairs
        .map(|(x, y)| square(f64::from(*x) - f64::from(*y)))
        .sum();
    let size: f64 = b.iter().map(|y| square(f64::from(*y))).sum();
    let relative = off.sqrt() / size.sqrt().max(1e-30);
    if a.len() == b.len() && relative.is_finite() {
        relative
    } else {
        f64::INFINITY
    }
}

/// The adapter that a model comes with: a reference's own of all modules, or one of a larger model.
fn adapter(dir: &Path) -> Result<AdapterState, Failure> {
    let reference = dir.join("reference/adapter.safetensors");
    let bytes = match reference.exists() {
        true => std::fs::read(reference)?,
        false => std::fs::read(dir.join("adapter.safetensors"))?,
    };
    let file = SafeTensors::deserialize(&bytes)?;
    let mut weights = BTreeMap::new();
    let mut rank = 0;
    for (name, view) in file.tensors() {
        let (values, _) = view.data().as_chunks::<4>();
        let data = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let shape = view.shape().to_vec();
        if name.ends_with("lora_A.weight") {
            rank = shape[0];
        }
        weights.insert(name, HostTensor { shape, data });
    }
    let train_unembed = weights.keys().any(|name| name.contains("lm_head"));
    Ok(AdapterState {
        spec: LoraSpec {
            rank,
            seed: 0,
            train_attn: true,
            train_mlp: true,
            train_unembed,
        },
        weights,
        moments: BTreeMap::new(),
        gradient: BTreeMap::new(),
        step: 0,
    })
}
