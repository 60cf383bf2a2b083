//! Adapters that PEFT or another trainer wrote: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Our own adapters scale by `ALPHA / rank` in every module and cover whole groups of them. Others
//! choose alpha, rank and modules freely, which is the same function with `B` scaled, factors padded
//! with zeros, and zeros for the modules that are left out. A module of zeros has no gradient, so
//! training leaves it out too.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::adapter::{ALPHA, AdapterState, HostTensor, LoraSpec};
use crate::arch::Arch;
use crate::cpu::tensor_shapes;
use crate::error::{Error, Result};
use crate::load::Weights;

/// The fields of `adapter_config.json` that are read.
#[derive(Debug, Deserialize)]
struct Config {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    bias: Option<String>,
    #[serde(default)]
    rank_pattern: BTreeMap<String, Value>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, Value>,
    modules_to_save: Option<Vec<String>>,
}

impl Config {
    /// Refuses what is not `W x + scale * B A x`.
    fn check(&self) -> Result<(), String> {
        let refused = [
            (
                self.peft_type != "LORA",
                format!("peft_type `{}`", self.peft_type),
            ),
            (self.use_dora, "use_dora".to_owned()),
            (self.fan_in_fan_out, "fan_in_fan_out".to_owned()),
            (
                self.bias.as_deref().is_some_and(|bias| bias != "none"),
                format!("bias `{}`", self.bias.as_deref().unwrap_or_default()),
            ),
            (
                self.alpha_pattern.keys().any(|key| !key.ends_with(EXPERTS)),
                "an alpha_pattern".to_owned(),
            ),
            (
                self.modules_to_save.as_ref().is_some_and(|m| !m.is_empty()),
                "modules_to_save".to_owned(),
            ),
        ];
        if let Some((_, what)) = refused.iter().find(|(is_refused, _)| *is_refused) {
            return Err(format!("{what} is not supported; supported: plain LoRA"));
        }
        if self.r == 0 || !self.lora_alpha.is_finite() {
            let (r, alpha) = (self.r, self.lora_alpha);
            return Err(format!("r is {r} and lora_alpha {alpha}"));
        }
        Ok(())
    }

    /// What PEFT multiplies `B A x` by in a module of rank `r`.
    fn scale(&self, r: usize, is_joined: bool) -> f64 {
        let r = r as f64;
        let own = self.alpha_pattern.iter().find(|_| is_joined);
        let alpha = own
            .and_then(|(_, alpha)| alpha.as_f64())
            .unwrap_or(self.lora_alpha);
        alpha / if self.use_rslora { r.sqrt() } else { r }
    }
}

/// How PEFT's pattern for the joined gate and up projections of experts ends.
const EXPERTS: &str = "gate_up_proj";

/// A factor of a module, `[rows, columns]`.
struct Factor {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
    /// Of the gate and up projections of experts, which PEFT takes for one module.
    is_joined: bool,
}

/// Reads an adapter directory for the base model in `base`.
///
/// The result computes what the adapter computes; its rank, the largest of its modules, must be `rank`,
/// since a module that is left out takes as much memory as one of this rank. There is no optimizer
/// state.
///
/// # Errors
/// If a file cannot be read, is no plain LoRA, is of another rank, or has tensors that the base model
/// has no module for or that have other shapes.
pub fn read_peft(dir: &Path, base: &Path, rank: usize) -> Result<AdapterState> {
    let path = dir.join("adapter_config.json");
    let refuse = |message: String| Error::Model {
        path: path.clone(),
        message,
    };
    let text = std::fs::read_to_string(&path).map_err(|e| refuse(e.to_string()))?;
    let config: Config = serde_json::from_str(&text).map_err(|e| refuse(e.to_string()))?;
    config.check().map_err(refuse)?;
    let arch = Arch::load(base)?;
    let mut factors = factors(&arch, dir)?;
    split_experts(&arch, &mut factors)?;
    let spec = spec(&config, &factors)?;
    if spec.rank != rank {
        let found = spec.rank;
        let message = format!(
            "the adapter has rank {found} and rank {rank} was announced: announce the adapter's own"
        );
        return Err(Error::Invalid(message));
    }
    let places: BTreeMap<_, _> = tensor_shapes(&arch, &spec)?.collect();
    if let Some(name) = factors.keys().find(|name| !places.contains_key(*name)) {
        let message = format!("`{name}` is of no LoRA module of {}", arch.name);
        return Err(Error::Invalid(message));
    }
    let tensor = |(name, shape): (String, [usize; 2])| {
        let data = match factors.get(&name) {
            Some(factor) => fit(&config, &name, shape, spec.rank, factor)?,
            None => vec![0.0; shape[0] * shape[1]],
        };
        let shape = shape.to_vec();
        Ok((name, HostTensor { shape, data }))
    };
    let weights = places.into_iter().map(tensor).collect::<Result<_>>()?;
    Ok(AdapterState {
        spec,
        weights,
        moments: BTreeMap::new(),
        gradient: BTreeMap::new(),
        step: 0,
    })
}

/// All factors in the file, by name.
fn factors(arch: &Arch, dir: &Path) -> Result<BTreeMap<String, Factor>> {
    let weights = Weights::open_file(&dir.join("adapter_model.safetensors"))?;
    let mut factors = BTreeMap::new();
    for (name, shape) in weights.shapes() {
        // With a module of the head or of the embedding PEFT also writes the frozen weight.
        let is_frozen = [".base_layer.weight", ".embed_tokens.weight"];
        if is_frozen.iter().any(|end| name.ends_with(end)) {
            weights.tensor(name, &[arch.vocab_size, arch.hidden_size])?;
            continue;
        }
        let &[rows, columns] = shape else {
            return Err(Error::Invalid(format!("`{name}` has shape {shape:?}")));
        };
        if rows == 0 || columns == 0 {
            let message = format!("`{name}` has shape {shape:?}: a factor is not empty");
            return Err(Error::Invalid(message));
        }
        let mut values = vec![0.0; rows * columns];
        weights.tensor(name, shape)?.read(0, &mut values)?;
        let factor = Factor {
            rows,
            columns,
            values,
            is_joined: false,
        };
        factors.insert(name.to_owned(), factor);
    }
    Ok(factors)
}

/// Replaces the factors of all experts of a block, as PEFT writes them since transformers keeps these
/// in one tensor, by factors of each.
///
/// With `e` experts, `A` is `[e * rank, in]`, one expert after the other; `B` is `[out, rank * e]`,
/// where column `j * e + i` is column `j` of expert `i`. Gate and up are one module.
fn split_experts(arch: &Arch, factors: &mut BTreeMap<String, Factor>) -> Result<()> {
    let Some(moe) = &arch.moe else { return Ok(()) };
    for block in 0..arch.n_layers {
        let owner = format!("base_model.model.model.layers.{block}.mlp.experts");
        // The first of two parameters that PEFT wraps is inside the wrapper of the second.
        for wrapper in ["", ".base_layer"] {
            let name = |factor: &str| format!("{owner}{wrapper}.lora_{factor}.weight");
            let (a, b) = (factors.remove(&name("A")), factors.remove(&name("B")));
            let (a, b) = match (a, b) {
                (Some(a), Some(b)) => (a, b),
                (None, None) => continue,
                _ => {
                    let message = format!("`{}` or its B is missing", name("A"));
                    return Err(Error::Invalid(message));
                }
            };
            let down = (moe.width, arch.hidden_size);
            let parts: &[&str] = match (a.columns, b.rows) {
                sizes if sizes == (arch.hidden_size, 2 * moe.width) => &["gate_proj", "up_proj"],
                sizes if sizes == down => &["down_proj"],
                _ => &[],
            };
            let fits = a.rows.is_multiple_of(moe.n_experts) && b.columns == a.rows;
            if parts.is_empty() || !fits {
                let (a, b) = ([a.rows, a.columns], [b.rows, b.columns]);
                let name = name("A");
                let message = format!("`{name}` has shape {a:?} and its B {b:?}, of no experts");
                return Err(Error::Invalid(message));
            }
            for expert in 0..moe.n_experts {
                for (i, part) in parts.iter().enumerate() {
                    let [a, b] = expert_factors(&a, &b, moe.n_experts, expert, (i, parts.len()));
                    let name = |factor| format!("{owner}.{expert}.{part}.lora_{factor}.weight");
                    factors.insert(name("A"), a);
                    factors.insert(name("B"), b);
                }
            }
        }
    }
    Ok(())
}

/// `A` and `B` of part `i` of `n` of one of the experts.
fn expert_factors(
    a: &Factor,
    b: &Factor,
    n_experts: usize,
    expert: usize,
    (i, n): (usize, usize),
) -> [Factor; 2] {
    let (rank, out) = (a.rows / n_experts, b.rows / n);
    let start = expert * rank * a.columns;
    let rows = b.values.chunks_exact(b.columns).skip(i * out).take(out);
    let column =
        |row: &[f32]| -> Vec<f32> { row[expert..].iter().step_by(n_experts).copied().collect() };
    let is_joined = n > 1;
    [
        Factor {
            rows: rank,
            columns: a.columns,
            values: a.values[start..][..rank * a.columns].to_vec(),
            is_joined,
        },
        Factor {
            rows: out,
            columns: rank,
            values: rows.flat_map(column).collect(),
            is_joined,
        },
    ]
}

/// The largest rank, and the groups that have modules.
fn spec(config: &Config, factors: &BTreeMap<String, Factor>) -> Result<LoraSpec> {
    let mut spec = LoraSpec {
        rank: 0,
        seed: 0,
        train_attn: false,
        train_mlp: false,
        train_unembed: false,
    };
    for (name, factor) in factors {
        if name.ends_with(".lora_A.weight") {
            spec.rank = spec.rank.max(factor.rows);
        }
        spec.train_attn |= name.contains(".self_attn.");
        spec.train_mlp |= name.contains(".mlp.");
        spec.train_unembed |= name.contains(".lm_head.");
    }
    if spec.rank != config.r && config.rank_pattern.is_empty() {
        let (found, r) = (spec.rank, config.r);
        return Err(Error::Invalid(format!(
            "the adapter's tensors have rank {found}, adapter_config.json says {r}"
        )));
    }
    Ok(spec)
}

/// A factor in our shape, `A [rank, in]` or `B [out, rank]`: scaled, and padded with zeros.
fn fit(
    config: &Config,
    name: &str,
    [rows, columns]: [usize; 2],
    rank: usize,
    factor: &Factor,
) -> Result<Vec<f32>> {
    let is_a = name.ends_with(".lora_A.weight");
    let (own, fits) = if is_a {
        (factor.rows, factor.columns == columns)
    } else {
        (factor.columns, factor.rows == rows)
    };
    if !fits || own == 0 || own > rank {
        let found = [factor.rows, factor.columns];
        let wanted = [rows, columns];
        return Err(Error::Invalid(format!(
            "`{name}` has shape {found:?}, the base model asks for {wanted:?}"
        )));
    }
    let ours = f64::from(ALPHA) / rank as f64;
    let theirs = config.scale(own, factor.is_joined);
    let scale = if is_a { 1.0 } else { theirs / ours };
    let mut data = vec![0.0; rows * columns];
    let found = factor.values.chunks_exact(factor.columns);
    for (row, values) in data.chunks_exact_mut(columns).zip(found) {
        for (to, from) in row.iter_mut().zip(values) {
            *to = (f64::from(*from) * scale) as f32;
        }
    }
    Ok(data)
}
