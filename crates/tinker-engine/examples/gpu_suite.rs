//! Holds the GPU to the CPU, then times both; `cargo xtask gpu` packs it for a machine without Rust.
//!
//! `gpu_suite FIXTURES WORK [--torch PYTHON SCRIPT] [--rehearse]`: `FIXTURES` has the reference models,
//! each with `reference/adapter.safetensors`; random models to time are written into `WORK`. Exits with 0
//! if everything agrees, 1 if not, and 3 if there is no GPU to run on. A rehearsal puts the CPU in the
//! GPU's place, on the smallest model: it shows that the program works, and nothing about a GPU.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the result of the program"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize_to_file};
use serde_json::{Value, json};
use tinker_engine::rng::uniform;
use tinker_engine::{
    AdamW, AdapterId, AdapterState, Backend, HostTensor, LoraSpec, Loss, TrainSequence,
    cuda_is_available, load_cpu, load_cuda,
};

type Failure = Box<dyn std::error::Error>;

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

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let rehearses = arguments.iter().any(|argument| argument == "--rehearse");
    let given: Vec<&str> = arguments
        .iter()
        .map(String::as_str)
        .filter(|argument| *argument != "--rehearse")
        .collect();
    let (fixtures, work, torch) = match given[..] {
        [fixtures, work] => (fixtures, work, None),
        [fixtures, work, "--torch", python, script] => (fixtures, work, Some((python, script))),
        _ => {
            eprintln!("usage: gpu_suite FIXTURES WORK [--torch PYTHON SCRIPT] [--rehearse]");
            return ExitCode::from(2);
        }
    };
    let mut suite = Suite {
        load: |dir| Ok(load_cuda(dir, None)?),
        shapes: &SHAPES,
        device: "cuda",
    };
    if rehearses {
        suite = Suite {
            load: |dir| Ok(load_cpu(dir, 1)?),
            shapes: &SHAPES[..1],
            device: "cpu",
        };
        println!("a rehearsal: the CPU is in the GPU's place\n");
    } else if let Err(error) = cuda_is_available() {
        eprintln!("no GPU was tried: {error}");
        return ExitCode::from(3);
    }
    let (fixtures, work) = (Path::new(fixtures), Path::new(work));
    let outcome = parity(&suite, fixtures, work).and_then(|agrees| {
        speed(&suite, work, torch)?;
        Ok(agrees)
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What is held to the CPU, and what it is timed on.
struct Suite {
    load: fn(&Path) -> Result<Box<dyn Backend>, Failure>,
    shapes: &'static [Shape],
    /// As PyTorch's program calls it.
    device: &'static str,
}

/// Runs every reference model on both devices, and a larger one, whose products have several segments;
/// returns whether they agree.
fn parity(suite: &Suite, fixtures: &Path, work: &Path) -> Result<bool, Failure> {
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
        let on_cpu = Answers::of(&mut *load_cpu(&dir, 0)?, &adapter)?;
        let on_gpu = Answers::of(&mut *(suite.load)(&dir)?, &adapter)?;
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
        spec: spec(rank, train_unembed),
        weights,
        moments: BTreeMap::new(),
        gradient: BTreeMap::new(),
        step: 0,
    })
}

fn spec(rank: usize, train_unembed: bool) -> LoraSpec {
    LoraSpec {
        rank,
        seed: 0,
        train_attn: true,
        train_mlp: true,
        train_unembed,
    }
}

/// A Llama of random bf16 weights to time, and the batch that it trains on.
struct Shape {
    name: &'static str,
    hidden: usize,
    layers: usize,
    heads: [usize; 2],
    mlp: usize,
    vocab: usize,
    batch: [usize; 2],
    new_tokens: usize,
    /// Whether it is too large to wait for the CPU.
    gpu_alone: bool,
}

const HEAD: usize = 64;

static SHAPES: [Shape; 3] = [
    Shape {
        name: "small",
        hidden: 256,
        layers: 4,
        heads: [4, 2],
        mlp: 688,
        vocab: 4096,
        batch: [8, 256],
        new_tokens: 128,
        gpu_alone: false,
    },
    Shape {
        name: "large",
        hidden: 1024,
        layers: 8,
        heads: [16, 8],
        mlp: 2752,
        vocab: 32_000,
        batch: [2, 512],
        new_tokens: 32,
        gpu_alone: false,
    },
    Shape {
        name: "1B",
        hidden: 2048,
        layers: 16,
        heads: [32, 8],
        mlp: 8192,
        vocab: 32_000,
        batch: [8, 1024],
        new_tokens: 128,
        gpu_alone: true,
    },
];

impl Shape {
    fn linears(&self) -> [(&'static str, usize, usize); 7] {
        let [q, kv] = self.heads.map(|n| n * HEAD);
        let (hidden, mlp) = (self.hidden, self.mlp);
        [
            ("self_attn.q_proj", q, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, q),
            ("mlp.gate_proj", mlp, hidden),
            ("mlp.up_proj", mlp, hidden),
            ("mlp.down_proj", hidden, mlp),
        ]
    }

    /// Writes the model, and the tokens that PyTorch's program reads.
    fn write(&self, dir: &Path) -> Result<(), Failure> {
        std::fs::create_dir_all(dir)?;
        let mut shapes = vec![
            (
                "model.embed_tokens.weight".to_owned(),
                vec![self.vocab, self.hidden],
            ),
            ("lm_head.weight".to_owned(), vec![self.vocab, self.hidden]),
            ("model.norm.weight".to_owned(), vec![self.hidden]),
        ];
        let mut factors = Vec::new();
        for layer in 0..self.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                shapes.push((name(&format!("{norm}.weight")), vec![self.hidden]));
            }
            for (part, out, inner) in self.linears() {
                shapes.push((name(&format!("{part}.weight")), vec![out, inner]));
                let module = format!("base_model.model.{}", name(part));
                factors.push((format!("{module}.lora_A.weight"), vec![16, inner]));
                factors.push((format!("{module}.lora_B.weight"), vec![out, 16]));
            }
        }
        write_random(&dir.join("model.safetensors"), Dtype::BF16, &shapes)?;
        write_random(&dir.join("adapter.safetensors"), Dtype::F32, &factors)?;
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": self.vocab,
            "hidden_size": self.hidden, "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1], "head_dim": HEAD,
            "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "hidden_act": "silu", "tie_word_embeddings": false,
        });
        std::fs::write(dir.join("config.json"), config.to_string())?;
        let [batch, length] = self.batch;
        let shape = json!({
            "hidden": self.hidden, "layers": self.layers, "heads": self.heads[0],
            "kv_heads": self.heads[1], "mlp": self.mlp, "vocab": self.vocab, "batch": batch,
            "length": length, "new_tokens": self.new_tokens,
        });
        let work = json!({
            "shape": shape, "train": self.tokens(batch, length + 1),
            "prompts": self.tokens(8, 16), "new_tokens": self.new_tokens,
        });
        std::fs::write(dir.join("tokens.json"), work.to_string())?;
        Ok(())
    }

    fn tokens(&self, rows: usize, length: usize) -> Vec<Vec<u32>> {
        let token = |i: usize, j: usize| (uniform(i as u64, j as u64) * self.vocab as f64) as u32;
        let row = |i: usize| (0..length).map(|j| token(i, j)).collect();
        (0..rows).map(row).collect()
    }

    fn sequences(&self) -> Vec<TrainSequence> {
        let [batch, length] = self.batch;
        let rows = self.tokens(batch, length + 1).into_iter();
        let sequence = |row: Vec<u32>| TrainSequence {
            tokens: row[..length].to_vec(),
            targets: row[1..].to_vec(),
            k: 1,
            loss: Loss::CrossEntropy {
                weights: vec![1.0; length],
            },
        };
        rows.map(sequence).collect()
    }
}

/// Writes tensors of uniform numbers whose products keep the size of their input; norms are ones.
fn write_random(path: &Path, dtype: Dtype, shapes: &[(String, Vec<usize>)]) -> Result<(), Failure> {
    let mut tensors = Vec::new();
    for (i, (name, shape)) in shapes.iter().enumerate() {
        let n: usize = shape.iter().product();
        let bound = (3.0 / *shape.last().ok_or("a tensor has no shape")? as f64).sqrt();
        let value = |j: u64| match shape.len() {
            1 => 1.0,
            _ => ((2.0 * uniform(i as u64, j) - 1.0) * bound) as f32,
        };
        let values = (0..n as u64).map(value);
        let data: Vec<u8> = match dtype {
            Dtype::BF16 => values
                .flat_map(|x| half::bf16::from_f32(x).to_le_bytes())
                .collect(),
            _ => values.flat_map(f32::to_le_bytes).collect(),
        };
        tensors.push((name.clone(), shape.clone(), data));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, data)| {
            Ok((name.as_str(), TensorView::new(dtype, shape.clone(), data)?))
        })
        .collect::<Result<Vec<_>, Failure>>()?;
    Ok(serialize_to_file(views, None, path)?)
}

/// Prints tokens per second of training and of decoding one and eight sequences.
fn speed(suite: &Suite, work: &Path, torch: Option<(&str, &str)>) -> Result<(), Failure> {
    println!("tokens per second, best of three");
    println!(
        "{:<6} {:<44} {:>10} {:>10} {:>10}",
        "shape", "engine", "training", "decoding 1", "decoding 8"
    );
    for shape in suite.shapes {
        let dir = work.join(shape.name);
        shape.write(&dir)?;
        let row = |engine: &str, figures: [f64; 3]| {
            let figures = figures.map(|figure| format!("{figure:>10.0}")).join(" ");
            println!("{:<6} {engine:<44} {figures}", shape.name);
        };
        if !shape.gpu_alone {
            let mut backend = load_cpu(&dir, 0)?;
            let name = backend.info().precision.clone();
            row(&name, figures(&mut *backend, shape)?);
        }
        let mut backend = (suite.load)(&dir)?;
        let name = backend.info().precision.clone();
        row(&name, figures(&mut *backend, shape)?);
        drop(backend);
        let Some((python, script)) = torch else {
            continue;
        };
        for compute in ["f32", "bf16"] {
            let run = |task: &str, n: usize| -> Result<(f64, String), Failure> {
                let mut command = Command::new(python);
                command.args([script, task]).arg(&dir);
                command.args([
                    "--device",
                    suite.device,
                    "--repeats",
                    "3",
                    "--compute",
                    compute,
                ]);
                let output = command.args(["--sequences", &n.to_string()]).output()?;
                let report: Value = serde_json::from_slice(&output.stdout)
                    .map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned())?;
                let seconds = report["seconds"].as_array().ok_or("no seconds")?;
                let best = seconds
                    .iter()
                    .filter_map(Value::as_f64)
                    .fold(f64::MAX, f64::min);
                let tokens = report["n_tokens"].as_f64().ok_or("no n_tokens")?;
                let name = report["name"].as_str().unwrap_or("PyTorch").to_owned();
                Ok((tokens / best, name))
            };
            let all = || Ok([run("train", 1)?, run("decode", 1)?, run("decode", 8)?]);
            match all() {
                Ok([(train, name), (one, _), (eight, _)]) => row(&name, [train, one, eight]),
                Err::<_, Failure>(error) => {
                    let said = error.to_string();
                    let last = said.lines().last().unwrap_or_default();
                    println!("{:<6} PyTorch {compute} did not run: {last}", shape.name);
                }
            }
        }
    }
    Ok(())
}

fn figures(backend: &mut dyn Backend, shape: &Shape) -> Result<[f64; 3], Failure> {
    let adapter = backend.create_adapter(&spec(16, false))?;
    let batch = shape.sequences();
    let [rows, length] = shape.batch;
    let train = best(|| {
        backend.forward_backward(adapter, &batch)?;
        backend.optim_step(adapter, &STEP.into())?;
        Ok(rows * length)
    })?;
    let one = best_decoding(backend, adapter, shape, 1)?;
    let eight = best_decoding(backend, adapter, shape, 8)?;
    Ok([train, one, eight])
}

/// Tokens per second of the best of three, after one to warm up; `work` returns its tokens.
fn best(mut work: impl FnMut() -> Result<usize, Failure>) -> Result<f64, Failure> {
    work()?;
    let mut best = 0.0f64;
    for _ in 0..3 {
        let start = Instant::now();
        let tokens = work()?;
        best = best.max(tokens as f64 / start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn best_decoding(
    backend: &mut dyn Backend,
    adapter: AdapterId,
    shape: &Shape,
    n_sequences: usize,
) -> Result<f64, Failure> {
    let prompts = shape.tokens(n_sequences, 16);
    let mut slots = Vec::new();
    for prompt in &prompts {
        // Room for the pass that warms up and the three that count.
        let slot = backend.open_slot(Some(adapter), 16 + 4 * shape.new_tokens)?;
        backend.prefill(slot, prompt, false)?;
        slots.push(slot);
    }
    let figure = best(|| {
        for i in 0..shape.new_tokens {
            let token = (i % shape.vocab) as u32;
            let rows: Vec<_> = slots.iter().map(|slot| (*slot, token)).collect();
            backend.decode_step(&rows)?;
        }
        Ok(n_sequences * shape.new_tokens)
    })?;
    slots.iter().for_each(|slot| backend.close_slot(*slot));
    Ok(figure)
}
