//! The learning rate that suits a model, with the reason for it; never a silent default.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Learning rates found by trying, by model name.
///
/// `tinker/nano`: held-out loss after 3 epochs in batches of 16 at 5e-4, 1e-3, 2e-3, 4e-3 and 8e-3
/// was 2.74, 2.05, 1.48, 1.19 and 1.04 on `pirate.jsonl`, 0.995, 0.472, 0.242, 0.050 and 0.020 on
/// `json_format.jsonl`, 0.069, 0.057, 0.050, 0.058 and 0.077 on `sums.jsonl`.
const CALIBRATED: &[(&str, f64)] = &[("tinker/nano", 4e-3)];

/// Hidden sizes of models that servers name by hub id: the start of the name in lower case, after
/// the organisation.
const HIDDEN_SIZES: &[(&str, usize)] = &[
    ("llama-3.2-1b", 2048),
    ("llama-3.2-3b", 3072),
    ("llama-3.1-8b", 4096),
    ("llama-3.1-70b", 8192),
    ("llama-3.3-70b", 8192),
    ("qwen3-0.6b", 1024),
    ("qwen3-1.7b", 2048),
    ("qwen3-4b", 2560),
    ("qwen3-8b", 4096),
    ("qwen3-14b", 5120),
    ("qwen3-30b-a3b", 2048),
    ("qwen3-32b", 5120),
    ("qwen3-235b-a22b", 4096),
    ("qwen3.5-4b", 2560),
    ("qwen3.5-9b", 4096),
    ("qwen3.5-27b", 5120),
    ("qwen3.5-35b-a3b", 2048),
    ("qwen3.5-397b-a17b", 4096),
    ("qwen3.6-27b", 5120),
    ("qwen3.6-35b-a3b", 2048),
];

/// What is known of a base model when its learning rate is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelFacts {
    /// Name, as the server knows it.
    pub name: String,
    /// Architecture from its configuration, such as `llama` or `qwen3`; the name decides without.
    pub architecture: Option<String>,
    /// Width of the residual stream.
    pub hidden_size: Option<usize>,
}

impl ModelFacts {
    /// What the name alone says.
    pub fn from_name(name: impl Into<String>) -> Self {
        let name = name.into();
        let short = short_name(&name);
        let known = HIDDEN_SIZES
            .iter()
            .filter(|(prefix, _)| starts_with_word(&short, prefix));
        let hidden_size = known.map(|(_, size)| *size).next();
        Self {
            name,
            architecture: None,
            hidden_size,
        }
    }

    /// The exponent of the learning rate formula for the model's family.
    fn family_exponent(&self) -> Option<(&'static str, f64)> {
        let family = self
            .architecture
            .clone()
            .unwrap_or_else(|| short_name(&self.name));
        let family = family.to_ascii_lowercase();
        if family.contains("llama") {
            Some(("Llama", 0.781))
        } else if family.contains("qwen") {
            Some(("Qwen", 0.0775))
        } else {
            None
        }
    }
}

/// A learning rate and where it comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LearningRate {
    /// Peak step size of Adam, above 0.
    pub value: f64,
    /// Why this value, for people.
    pub reason: String,
}

/// The learning rate for LoRA fine-tuning of a model; it does not depend on the rank.
///
/// # Errors
/// [`Error::NoLearningRate`] if the model is neither calibrated nor of a family with a formula.
pub fn recommended_learning_rate(model: &ModelFacts) -> Result<LearningRate> {
    if let Some((_, value)) = CALIBRATED.iter().find(|(name, _)| *name == model.name) {
        return Ok(LearningRate {
            value: *value,
            reason: format!("calibrated for {}", model.name),
        });
    }
    let not_calibrated = || Error::NoLearningRate {
        model: model.name.clone(),
    };
    let (family, exponent) = model.family_exponent().ok_or_else(not_calibrated)?;
    let hidden_size = model.hidden_size.ok_or_else(not_calibrated)?;
    // The Tinker cookbook's fit: full fine-tuning's 5e-5, ten times that for LoRA, falling with
    // the width by a power that was fitted per family.
    let value = 5e-5 * 10.0 * (2000.0 / hidden_size as f64).powf(exponent);
    let reason = format!("{family} formula for hidden size {hidden_size}");
    Ok(LearningRate { value, reason })
}

fn short_name(name: &str) -> String {
    name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase()
}

fn starts_with_word(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', ':']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, expected: f64) {
        let rate = recommended_learning_rate(&ModelFacts::from_name(name)).unwrap();

        let relative = (rate.value - expected).abs() / expected;
        assert!(relative < 2e-4, "{name}: {} for {expected}", rate.value);
    }

    #[test]
    fn the_formula_gives_the_published_rates() {
        check("meta-llama/Llama-3.2-1B", 4.908e-4);
        check("meta-llama/Llama-3.2-3B-Instruct", 3.576e-4);
        check("meta-llama/Llama-3.1-8B", 2.856e-4);
        check("meta-llama/Llama-3.3-70B-Instruct", 1.662e-4);
        check("Qwen/Qwen3-8B", 4.7297898e-4);
        check("Qwen/Qwen3.5-4B", 4.905e-4);
        check("Qwen/Qwen3-32B", 4.649e-4);
        check("Qwen/Qwen3-30B-A3B-Instruct-2507", 4.991e-4);
    }

    #[test]
    fn a_calibrated_model_needs_no_formula() {
        let rate = recommended_learning_rate(&ModelFacts::from_name("tinker/nano")).unwrap();

        assert_eq!(rate.reason, "calibrated for tinker/nano");
    }

    #[test]
    fn a_local_model_is_judged_by_its_configuration() {
        let facts = ModelFacts {
            name: "/models/mine".to_owned(),
            architecture: Some("qwen3".to_owned()),
            hidden_size: Some(4096),
        };

        let rate = recommended_learning_rate(&facts).unwrap();

        assert_eq!(rate.reason, "Qwen formula for hidden size 4096");
    }

    #[test]
    fn other_models_must_be_told() {
        for name in ["openai/gpt-oss-20b", "Qwen/Qwen9-77B"] {
            let error = recommended_learning_rate(&ModelFacts::from_name(name)).unwrap_err();

            let expected = format!("no calibrated learning rate for `{name}`; give one");
            assert!(error.to_string().starts_with(&expected), "{error}");
        }
    }
}
