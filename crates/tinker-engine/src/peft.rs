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
                !self.alpha_pattern.is_empty(),
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
    fn scale(&self, r: usize) -> f64 {
        let r = r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }
}

/// Reads an adapter directory for the base model in `base`.
///
/// The result computes what the adapter computes; its rank is the largest of its modules. There is no
/// optimizer state.
///
/// # Errors
/// If a file cannot be read, is no plain LoRA, or has tensors that the base model has no module for
/// or that have other shapes.
pub fn read_peft(dir: &Path, base: &Path) -> Result<AdapterState> {
    let path = dir.join("adapter_config.json");
    let refuse = |message: String| Error::Model {
        path: path.clone(),
        message,
    };
    let text = std::fs::read_to_string(&path).map_err(|e| refuse(e.to_string()))?;
    let config: Config = serde_json::from_str(&text).map_err(|e| refuse(e.to_string()))?;
    config.check().map_err(refuse)?;
    let arch = Arch::load(base)?;
    let weights = Weights::open_file(&dir.join("adapter_model.safetensors"))?;
    let spec = spec(&config, &weights)?;
    let mut places = BTreeMap::new();
    for (name, shape) in tensor_shapes(&arch, &spec)? {
        places.insert(name, shape);
    }
    if let Some((name, _)) = weights
        .shapes()
        .find(|(name, _)| !places.contains_key(*name))
    {
        let message = format!("`{name}` is of no LoRA module of {}", arch.name);
        return Err(Error::Invalid(message));
    }
    let tensor = |(name, shape): (String, [usize; 2])| {
        let data = read(&config, &weights, &name, shape, spec.rank)?;
        let shape = shape.to_vec();
        Ok((name, HostTensor { shape, data }))
    };
    Ok(AdapterState {
        spec,
        weights: places.into_iter().map(tensor).collect::<Result<_>>()?,
        moments: BTreeMap::new(),
        gradient: BTreeMap::new(),
        step: 0,
    })
}

/// The largest rank, and the groups that have modules.
fn spec(config: &Config, weights: &Weights) -> Result<LoraSpec> {
    let mut spec = LoraSpec {
        rank: config.r,
        seed: 0,
        train_attn: false,
        train_mlp: false,
        train_unembed: false,
    };
    let mut widest = 0;
    for (name, shape) in weights.shapes() {
        if name.ends_with(".lora_A.weight") {
            widest = widest.max(shape.first().copied().unwrap_or(0));
        }
        spec.train_attn |= name.contains(".self_attn.");
        spec.train_mlp |= name.contains(".mlp.");
        spec.train_unembed |= name.contains(".lm_head.");
    }
    if widest != config.r && config.rank_pattern.is_empty() {
        let r = config.r;
        return Err(Error::Invalid(format!(
            "the adapter's tensors have rank {widest}, adapter_config.json says {r}"
        )));
    }
    spec.rank = widest.max(1);
    Ok(spec)
}

/// One tensor, `A [rank, in]` or `B [out, rank]`: padded with zeros, or all zeros if it is not there.
fn read(
    config: &Config,
    weights: &Weights,
    name: &str,
    [rows, columns]: [usize; 2],
    rank: usize,
) -> Result<Vec<f32>> {
    let mut data = vec![0.0; rows * columns];
    let is_a = name.ends_with(".lora_A.weight");
    let (own, found) = match weights.shape(name) {
        None => return Ok(data),
        // A rank of its own is padded; any other difference is refused below.
        Some(&[own, _]) if is_a => (own, [own, columns]),
        Some(&[_, own]) => (own, [rows, own]),
        Some(_) => (rank, [rows, columns]),
    };
    let tensor = weights.tensor(name, &found)?;
    let mut values = vec![0.0; found[0] * found[1]];
    tensor.read(0, &mut values)?;
    let ours = f64::from(ALPHA) / rank as f64;
    let scale = if is_a { 1.0 } else { config.scale(own) / ours };
    for (row, values) in data
        .chunks_exact_mut(columns)
        .zip(values.chunks_exact(found[1]))
    {
        for (to, from) in row.iter_mut().zip(values) {
            *to = (f64::from(*from) * scale) as f32;
        }
    }
    Ok(data)
}
