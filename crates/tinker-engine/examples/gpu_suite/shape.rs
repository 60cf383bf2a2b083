//! Models of random weights, and the work that they are timed on.

use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};
use serde_json::json;
use tinker_engine::rng::uniform;

use super::timed::Failure;

/// A Llama of random bf16 weights to time, and the batch that it trains on.
pub(super) struct Shape {
    pub(super) name: &'static str,
    hidden: usize,
    layers: usize,
    heads: [usize; 2],
    mlp: usize,
    vocab: usize,
    batch: [usize; 2],
    new_tokens: usize,
    /// Whether it is too large to wait for the CPU.
    pub(super) gpu_alone: bool,
}

const HEAD: usize = 64;

pub(super) static SHAPES: [Shape; 3] = [
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
    pub(super) fn write(&self, dir: &Path) -> Result<(), Failure> {
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
