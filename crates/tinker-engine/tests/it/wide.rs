//! The GPU backend on sizes that the reference models do not have: products of several segments, wide
//! heads, prompts of several chunks. The models are random.

use std::collections::BTreeMap;
use std::path::PathBuf;

use safetensors::Dtype;
use serde_json::json;
use tinker_engine::cuda::load_on;
use tinker_engine::rng::uniform;
use tinker_engine::{AdapterState, Backend, HostTensor, Loss, SlotId, TrainSequence, load_cpu};

use crate::common::{all_modules, relative, write_tensors};
use crate::emulated::open;
use crate::gpu::{check_tensors, prompt};

const VOCAB: usize = 320;

/// A Llama of random numbers.
pub(crate) struct Shape {
    name: &'static str,
    hidden: usize,
    /// Query heads, key heads, width of each.
    heads: [usize; 3],
    mlp: usize,
    dtype: Dtype,
    /// Tokens of the longest prompt.
    prompt: usize,
}

/// Three segments in the MLP's last layer, or in that of attention and in the others; a segment that is
/// full and one of a few numbers. Attention of several chunks of keys, by blocks for each chunk and, with
/// many heads, by blocks that take all of them; more heads of a group than a block has rows.
pub(crate) const SHAPES: [Shape; 4] = [
    Shape {
        name: "heads of 80",
        hidden: 64,
        heads: [2, 1, 80],
        mlp: 600,
        dtype: Dtype::BF16,
        prompt: 530,
    },
    Shape {
        name: "heads of 200",
        hidden: 516,
        heads: [3, 1, 200],
        mlp: 512,
        dtype: Dtype::F32,
        prompt: 60,
    },
    Shape {
        name: "eight key heads",
        hidden: 32,
        heads: [8, 8, 16],
        mlp: 32,
        dtype: Dtype::BF16,
        prompt: 540,
    },
    Shape {
        name: "a group of 20 heads",
        hidden: 32,
        heads: [20, 1, 16],
        mlp: 32,
        dtype: Dtype::BF16,
        prompt: 270,
    },
];

/// Uniform numbers whose products keep the size of their input.
fn random(seed: u64, shape: &[usize]) -> HostTensor {
    let bound = (3.0 / shape[shape.len() - 1] as f64).sqrt();
    let value = |i| ((2.0 * uniform(seed, i) - 1.0) * bound) as f32;
    HostTensor {
        shape: shape.to_vec(),
        data: (0..shape.iter().product::<usize>() as u64)
            .map(value)
            .collect(),
    }
}

/// A model on disk, and an adapter of all its layers whose `B` is not zero.
pub(crate) struct Made {
    pub(crate) dir: PathBuf,
    pub(crate) adapter: AdapterState,
    _held: tempfile::TempDir,
}

impl Shape {
    fn tensors(&self) -> BTreeMap<String, HostTensor> {
        let [q, kv] = [0, 1].map(|i| self.heads[i] * self.heads[2]);
        let (hidden, mlp) = (self.hidden, self.mlp);
        let mut shapes = vec![
            ("model.embed_tokens".to_owned(), vec![VOCAB, hidden]),
            ("lm_head".to_owned(), vec![VOCAB, hidden]),
            ("model.norm".to_owned(), vec![hidden]),
        ];
        for (part, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![q, hidden]),
            ("self_attn.k_proj", vec![kv, hidden]),
            ("self_attn.v_proj", vec![kv, hidden]),
            ("self_attn.o_proj", vec![hidden, q]),
            ("mlp.gate_proj", vec![mlp, hidden]),
            ("mlp.up_proj", vec![mlp, hidden]),
            ("mlp.down_proj", vec![hidden, mlp]),
        ] {
            shapes.push((format!("model.layers.0.{part}"), shape));
        }
        let tensors = shapes.into_iter().zip(0..).map(|((name, shape), seed)| {
            let mut tensor = random(seed, &shape);
            if shape.len() == 1 {
                tensor.data.fill(1.0);
            }
            (format!("{name}.weight"), tensor)
        });
        tensors.collect()
    }

    pub(crate) fn make(&self) -> Made {
        let held = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let dir = held.path().to_path_buf();
        let [n_heads, n_kv_heads, head_dim] = self.heads;
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB,
            "hidden_size": self.hidden, "intermediate_size": self.mlp,
            "num_hidden_layers": 1, "num_attention_heads": n_heads,
            "num_key_value_heads": n_kv_heads, "head_dim": head_dim,
            "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "hidden_act": "silu", "tie_word_embeddings": false,
        });
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let bytes = |x: f32| match self.dtype {
            Dtype::BF16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        let file = dir.join("model.safetensors");
        write_tensors(&file, self.dtype, self.tensors().iter(), bytes);
        let mut cpu = load_cpu(&dir, 1).unwrap();
        let adapter = cpu.create_adapter(&all_modules(4)).unwrap();
        let mut adapter = cpu.export_adapter(adapter).unwrap();
        for (tensor, seed) in adapter.weights.values_mut().zip(100..) {
            *tensor = random(seed, &tensor.shape);
            // Small beside the weights, so that no softmax is a choice of one key.
            tensor.data.iter_mut().for_each(|x| *x *= 0.1);
        }
        Made {
            dir,
            adapter,
            _held: held,
        }
    }
}

impl Made {
    /// The CPU, then the emulated GPU.
    fn on_both(&self) -> [Box<dyn Backend>; 2] {
        let gpu = load_on(&|head| open(head, 1 << 30), &self.dir, None).unwrap();
        [load_cpu(&self.dir, 2).unwrap(), gpu]
    }
}

fn sequence(n: usize) -> TrainSequence {
    let tokens = prompt(n + 1);
    TrainSequence {
        tokens: tokens[..n].to_vec(),
        targets: tokens[1..].to_vec(),
        k: 1,
        loss: Loss::CrossEntropy {
            weights: vec![1.0; n],
        },
    }
}

#[test]
fn gradients_of_several_segments_and_wide_heads_agree_with_those_of_the_cpu() {
    for shape in SHAPES {
        let (made, name) = (shape.make(), shape.name);
        let batch = [1, 70, 24].map(sequence);

        let [(wanted, wanted_gradient), (found, gradient)] = made.on_both().map(|mut backend| {
            let adapter = backend.import_adapter(&made.adapter).unwrap();
            let outputs = backend.forward_backward(adapter, &batch).unwrap();
            (outputs, backend.export_adapter(adapter).unwrap().gradient)
        });

        for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            let off = relative(&found.logprobs, &wanted.logprobs);
            assert!(off < 1e-5, "{name}, sequence {i}: log-probs off by {off:e}");
        }
        assert!(!gradient.is_empty());
        // Terms of the gradients of keys nearly cancel: both devices round them by some 1e-5.
        check_tensors(name, &gradient, &wanted_gradient, 5e-5);
    }
}

#[test]
fn prompts_of_several_chunks_have_the_bits_of_decoding_and_scoring() {
    for shape in SHAPES {
        let (made, name) = (shape.make(), shape.name);
        let (prompt, n) = (prompt(shape.prompt), shape.prompt);
        let [mut cpu, mut gpu] = made.on_both();
        let [on_cpu, on_gpu] = [&mut cpu, &mut gpu].map(|backend| {
            let adapter = backend.import_adapter(&made.adapter).unwrap();
            let slot = backend.open_slot(Some(adapter), n).unwrap();
            (adapter, backend.prefill(slot, &prompt, true).unwrap())
        });
        let (adapter, whole) = on_gpu;

        let off = relative(&whole.next_logits, &on_cpu.1.next_logits);
        assert!(off < 1e-5, "{name}: logits off by {off:e}");
        let off = relative(&whole.prompt_logprobs, &on_cpu.1.prompt_logprobs);
        assert!(off < 1e-5, "{name}: log-probs off by {off:e}");

        let scored = gpu.forward(Some(adapter), &[sequence(n - 1)]).unwrap();
        assert_eq!(scored[0].logprobs, whole.prompt_logprobs, "{name}, scored");

        let shown_by = gpu.open_slot(Some(adapter), n).unwrap();
        let mut shown = Vec::new();
        let mut show = |i: usize, logits: &[f32]| {
            shown.push((i, logits.to_vec()));
            Ok(())
        };
        let last = gpu.prefill_logits(shown_by, &prompt, n - 22, &mut show);
        assert_eq!(last.unwrap(), whole.next_logits, "{name}, shown");

        let decoded = gpu.open_slot(Some(adapter), n).unwrap();
        gpu.prefill(decoded, &prompt[..n - 25], false).unwrap();
        let mut logits = Vec::new();
        for (i, token) in (n - 25..).zip(&prompt[n - 25..]) {
            logits = gpu.decode_step(&[(decoded, *token)]).unwrap();
            if let Some((_, wanted)) = shown.iter().find(|(j, _)| *j == i) {
                assert_eq!(logits, *wanted, "{name}, decoded at {i}");
            }
        }
        assert_eq!(logits, whole.next_logits, "{name}, decoded");
        assert_eq!(shown.len(), 21);
    }
}

#[test]
fn rows_have_the_same_bits_whether_their_segments_get_blocks_of_their_own() {
    for shape in SHAPES {
        let (made, name) = (shape.make(), shape.name);
        let [_, mut gpu] = made.on_both();
        let adapter = gpu.import_adapter(&made.adapter).unwrap();
        let slots: Vec<SlotId> = (0..66)
            .map(|i| {
                let slot = gpu.open_slot(Some(adapter), 64).unwrap();
                gpu.prefill(slot, &prompt(1 + i % 5), false).unwrap();
                slot
            })
            .collect();
        let rows = |gpu: &mut dyn Backend| -> Vec<(SlotId, u32)> {
            let forks = slots.iter().map(|slot| gpu.fork_slot(*slot).unwrap());
            forks.zip(0..).collect()
        };
        let alone: Vec<Vec<f32>> = rows(&mut *gpu)
            .iter()
            .map(|row| gpu.decode_step(&[*row]).unwrap())
            .collect();

        // Two blocks of few rows, and more rows than there are kernels for few of.
        for n in [9, 66] {
            let rows = rows(&mut *gpu);
            let together = gpu.decode_step(&rows[..n]).unwrap();

            for (logits, alone) in together.chunks(VOCAB).zip(&alone) {
                assert_eq!(logits, alone, "{name}, {n} rows");
            }
        }
    }
}
