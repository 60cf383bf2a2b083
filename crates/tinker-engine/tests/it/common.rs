//! The reference models and how to load them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};
use serde_json::Value;
use tinker_engine::{
    AdapterId, AdapterState, Backend, Clip, HostTensor, LoraSpec, Loss, TrainSequence, load_cpu,
    load_cpu_on_vectors,
};

/// Llama with llama3 rope scaling; Qwen2 with biases; Qwen3 with QK norm and a tied head.
pub(crate) const MODELS: [&str; 3] = ["llama", "qwen2", "qwen3"];

/// The same with their weights rounded to bf16, which a matrix unit takes as they are.
pub(crate) const ROUNDED: [&str; 3] = ["llama-bf16", "qwen2-bf16", "qwen3-bf16"];

/// Smaller models of other architectures, with bf16 weights: windows, local and global blocks, blocks
/// without rotation, joined projections, norms after each part, caps, biases, experts.
pub(crate) const ARCHITECTURES: [&str; 7] = [
    "mistral",
    "smollm3",
    "phi3",
    "gemma2",
    "gemma3",
    "qwen3_moe",
    "qwen3_moe_mixed",
];

/// All of these.
pub(crate) fn all_models() -> impl Iterator<Item = &'static str> {
    MODELS.into_iter().chain(ROUNDED).chain(ARCHITECTURES)
}

/// The models without experts.
#[cfg(feature = "cuda")]
pub(crate) fn dense() -> impl Iterator<Item = &'static str> {
    all_models().filter(|model| !model.contains("moe"))
}

/// Models that between them have everything that a kernel, or a block of the GPU, can have.
#[cfg(feature = "cuda")]
pub(crate) const FEW: [&str; 5] = ["llama", "qwen3-bf16", "gemma2", "phi3", "smollm3"];

/// Each model on the CPU, and a few on the emulated GPU.
pub(crate) fn on_every_device(
    models: impl IntoIterator<Item = &'static str>,
) -> Vec<(&'static str, Load)> {
    let models: Vec<_> = models.into_iter().collect();
    let on_cpu = models.iter().map(|model| (*model, load as Load));
    #[cfg(feature = "cuda")]
    let on_gpu = FEW
        .into_iter()
        .filter(|model| models.contains(model))
        .map(|model| (model, crate::emulated::load_emulated as Load));
    #[cfg(not(feature = "cuda"))]
    let on_gpu = std::iter::empty();
    on_cpu.chain(on_gpu).collect()
}

/// Each model, on each unit of this machine.
pub(crate) fn on_every_unit(
    models: impl IntoIterator<Item = &'static str>,
) -> impl Iterator<Item = (&'static str, Load)> {
    let each = |model| LOADS.into_iter().map(move |load| (model, load));
    models.into_iter().flat_map(each)
}

/// Where a model is; a rounded one is made on the way.
pub(crate) fn dir(model: &str) -> PathBuf {
    match model.strip_suffix("-bf16") {
        Some(original) => rounded(original),
        None => fixture(model),
    }
}

fn fixture(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fixtures/numerics")
        .join(model)
}

fn rounded(original: &str) -> PathBuf {
    static MADE: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
        let parent = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for model in MODELS {
            let (from, to) = (fixture(model), parent.path().join(model));
            std::fs::create_dir(&to).unwrap();
            std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
            let weights = tensors(&from.join("model.safetensors"));
            let bytes = |x| half::bf16::from_f32(x).to_le_bytes().to_vec();
            let file = to.join("model.safetensors");
            write_tensors(&file, Dtype::BF16, weights.iter(), bytes);
        }
        parent
    });
    MADE.path().join(original)
}

/// Writes tensors as one safetensors file, each value by `bytes`.
pub(crate) fn write_tensors<'a>(
    path: &Path,
    dtype: Dtype,
    tensors: impl Iterator<Item = (&'a String, &'a HostTensor)>,
    bytes: impl Fn(f32) -> Vec<u8>,
) {
    let encoded: Vec<_> = tensors
        .map(|(name, tensor)| {
            let data: Vec<u8> = tensor.data.iter().flat_map(|x| bytes(*x)).collect();
            (name, tensor.shape.clone(), data)
        })
        .collect();
    let views = encoded.iter().map(|(name, shape, data)| {
        let view = TensorView::new(dtype, shape.clone(), data).unwrap();
        (name.as_str(), view)
    });
    serialize_to_file(views, None, path).unwrap();
}

pub(crate) fn load(model: &str, threads: usize) -> Box<dyn Backend> {
    load_cpu(&dir(model), threads).unwrap()
}

/// As [`load`], without the matrix unit.
pub(crate) fn load_on_vectors(model: &str, threads: usize) -> Box<dyn Backend> {
    load_cpu_on_vectors(&dir(model), threads).unwrap()
}

/// A way to load a model: a model and a number of threads.
pub(crate) type Load = fn(&str, usize) -> Box<dyn Backend>;

/// Both ways, which differ where the machine has a matrix unit.
pub(crate) const LOADS: [Load; 2] = [load, load_on_vectors];

/// All tensors of a safetensors file of float32 or bf16.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, HostTensor> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter().map(|(name, view)| {
        let bytes = view.data();
        let data = match view.dtype() {
            Dtype::BF16 => bytes
                .chunks_exact(2)
                .map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
                .collect(),
            _ => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect(),
        };
        let shape = view.shape().to_vec();
        (name, HostTensor { shape, data })
    });
    tensors.collect()
}

pub(crate) fn all_modules(rank: usize) -> LoraSpec {
    LoraSpec {
        rank,
        seed: 1,
        train_attn: true,
        train_mlp: true,
        train_unembed: true,
    }
}

/// What PyTorch computed for a model; for a rounded one, what it computed for the original.
pub(crate) struct Reference {
    pub(crate) dir: PathBuf,
    pub(crate) json: Value,
}

impl Reference {
    pub(crate) fn of(model: &str) -> Self {
        let dir = fixture(model.trim_end_matches("-bf16")).join("reference");
        let text = std::fs::read_to_string(dir.join("reference.json")).unwrap();
        Self {
            json: serde_json::from_str(&text).unwrap(),
            dir,
        }
    }

    pub(crate) fn tensors(&self, name: &str) -> BTreeMap<String, HostTensor> {
        tensors(&self.dir.join(format!("{name}.safetensors")))
    }

    /// The adapter whose `B` is not zero.
    pub(crate) fn adapter(&self) -> AdapterState {
        AdapterState {
            spec: all_modules(self.json["rank"].as_u64().unwrap() as usize),
            weights: self.tensors("adapter"),
            moments: BTreeMap::new(),
            gradient: BTreeMap::new(),
            step: 0,
        }
    }

    pub(crate) fn import(&self, backend: &mut dyn Backend) -> AdapterId {
        backend.import_adapter(&self.adapter()).unwrap()
    }

    /// The reference batch with loss `name`.
    pub(crate) fn batch(&self, name: &str) -> Vec<TrainSequence> {
        let soft = name == "cross_entropy_k";
        let rows = self.json["batch"].as_array().unwrap();
        let sequence = |row: &Value| TrainSequence {
            tokens: tokens(&row["tokens"]),
            targets: tokens(&row[if soft { "targets_k" } else { "targets" }]),
            k: if soft {
                self.json["k"].as_u64().unwrap() as usize
            } else {
                1
            },
            loss: self.loss(name, row),
        };
        rows.iter().map(sequence).collect()
    }

    fn loss(&self, name: &str, row: &Value) -> Loss {
        let (logprobs, advantages) = (floats(&row["logprobs"]), floats(&row["advantages"]));
        let setting = |key: &str| self.json[name][key].as_f64().unwrap() as f32;
        match name {
            "cross_entropy" => Loss::CrossEntropy {
                weights: floats(&row["weights"]),
            },
            "cross_entropy_k" => Loss::CrossEntropy {
                weights: floats(&row["weights_k"]),
            },
            "importance_sampling" => Loss::ImportanceSampling {
                logprobs,
                advantages,
            },
            "ppo" | "cispo" => {
                let clip = Clip::between(setting("clip_low"), setting("clip_high"));
                if name == "ppo" {
                    Loss::Ppo {
                        logprobs,
                        advantages,
                        clip,
                    }
                } else {
                    Loss::Cispo {
                        logprobs,
                        advantages,
                        clip,
                    }
                }
            }
            "dro" => Loss::Dro {
                logprobs,
                advantages,
                beta: setting("beta"),
            },
            other => panic!("no loss {other}"),
        }
    }
}

/// Log-probabilities of calls that train the reference's adapter, and its state after them.
pub(crate) fn train(
    backend: &mut dyn Backend,
    reference: &Reference,
    calls: &[&[TrainSequence]],
) -> (Vec<Vec<f32>>, AdapterState) {
    let adapter = reference.import(backend);
    let mut logprobs = Vec::new();
    for call in calls {
        let outputs = backend.forward_backward(adapter, call).unwrap();
        logprobs.extend(outputs.into_iter().map(|o| o.logprobs));
    }
    (logprobs, backend.export_adapter(adapter).unwrap())
}

pub(crate) const LOSSES: [&str; 6] = [
    "cross_entropy",
    "cross_entropy_k",
    "importance_sampling",
    "ppo",
    "cispo",
    "dro",
];

pub(crate) fn tokens(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_u64().unwrap() as u32)
        .collect()
}

pub(crate) fn floats(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap() as f32)
        .collect()
}

/// `|a - b| / |b|`.
pub(crate) fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let off: f64 = a
        .iter()
        .zip(b)
        .map(|(x, y)| square(f64::from(*x) - f64::from(*y)))
        .sum();
    let size: f64 = b.iter().map(|y| square(f64::from(*y))).sum();
    off.sqrt() / size.sqrt().max(1e-30)
}
