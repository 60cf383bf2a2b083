//! Optimizers and the hyper-parameters of one step.

use serde::{Deserialize, Serialize};

/// One AdamW step (Loshchilov and Hutter 2019). All fields are always sent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdamParams {
    /// Step size, at least 0. Default 1e-4.
    pub learning_rate: f64,
    /// Decay of the first moment, in `[0, 1)`. Default 0.9.
    pub beta1: f64,
    /// Decay of the second moment, in `[0, 1)`. Default 0.95.
    pub beta2: f64,
    /// Added to the root of the second moment, above 0. Default 1e-12.
    pub eps: f64,
    /// Decoupled weight decay. Default 0.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0, the default, turns clipping off.
    pub grad_clip_norm: f64,
}

impl Default for AdamParams {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-12,
            weight_decay: 0.0,
            grad_clip_norm: 0.0,
        }
    }
}

/// The optimizer of a training run, chosen at creation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    /// Family, such as `adamw` or `dimuon`.
    #[serde(rename = "type")]
    pub family: String,
    /// Settings of other families.
    #[serde(flatten)]
    pub settings: serde_json::Map<String, serde_json::Value>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            family: "adamw".into(),
            settings: serde_json::Map::new(),
        }
    }
}

/// One step of Dimuon. All fields are always sent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DimuonParams {
    /// Step size, at least 0.
    pub learning_rate: f64,
    /// Largest global gradient norm; 0, the default, turns clipping off.
    #[serde(default)]
    pub grad_clip_norm: f64,
    /// Decay of the momentum, in `[0, 1)`. Default 0.9.
    #[serde(default = "dimuon_beta1")]
    pub beta1: f64,
}

const fn dimuon_beta1() -> f64 {
    0.9
}

impl DimuonParams {
    /// A step of this size with the defaults.
    #[must_use]
    pub const fn new(learning_rate: f64) -> Self {
        Self {
            learning_rate,
            grad_clip_norm: 0.0,
            beta1: dimuon_beta1(),
        }
    }
}

/// The hyper-parameters of one step, whatever the optimizer.
#[derive(Debug, Clone, PartialEq)]
pub enum OptimizerParams {
    /// AdamW, which travels in a field of its own.
    Adam(AdamParams),
    /// Dimuon.
    Dimuon(DimuonParams),
    /// Another family, as its fields.
    Other {
        /// Family.
        family: String,
        /// Its fields.
        settings: serde_json::Map<String, serde_json::Value>,
    },
}

impl From<AdamParams> for OptimizerParams {
    fn from(adam: AdamParams) -> Self {
        Self::Adam(adam)
    }
}

impl From<DimuonParams> for OptimizerParams {
    fn from(dimuon: DimuonParams) -> Self {
        Self::Dimuon(dimuon)
    }
}

impl OptimizerParams {
    /// The two fields of [`OptimStepRequest`](crate::OptimStepRequest), one of which is set:
    /// `adam_params` and `optimizer_params`.
    #[must_use]
    pub fn into_fields(self) -> (Option<AdamParams>, Option<serde_json::Value>) {
        let (family, mut settings) = match self {
            Self::Adam(adam) => return (Some(adam), None),
            Self::Dimuon(dimuon) => {
                let fields = [
                    ("learning_rate", dimuon.learning_rate),
                    ("grad_clip_norm", dimuon.grad_clip_norm),
                    ("beta1", dimuon.beta1),
                ];
                let settings = fields.map(|(name, x)| (name.to_owned(), x.into()));
                ("dimuon".to_owned(), settings.into_iter().collect())
            }
            Self::Other { family, settings } => (family, settings),
        };
        settings.insert("type".to_owned(), family.into());
        (None, Some(settings.into()))
    }
}

impl OptimizerConfig {
    /// Dimuon, version 1.
    #[must_use]
    pub fn dimuon() -> Self {
        Self {
            family: "dimuon".into(),
            settings: serde_json::Map::from_iter([("version".to_owned(), 1.into())]),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_optimizer_has_its_field() {
        let (adam, other) = OptimizerParams::from(AdamParams::default()).into_fields();
        assert!(adam.is_some() && other.is_none());

        let (adam, other) = OptimizerParams::from(DimuonParams::new(0.5)).into_fields();
        let expected =
            json!({"type": "dimuon", "learning_rate": 0.5, "grad_clip_norm": 0.0, "beta1": 0.9});
        assert_eq!((adam, other), (None, Some(expected)));

        let lion = OptimizerParams::Other {
            family: "lion".into(),
            settings: serde_json::Map::from_iter([("lr".to_owned(), json!(1))]),
        };
        assert_eq!(lion.into_fields().1, Some(json!({"type": "lion", "lr": 1})));
    }

    #[test]
    fn dimuon_is_chosen_by_type_and_version() {
        let json = serde_json::to_value(OptimizerConfig::dimuon()).unwrap();

        assert_eq!(json, json!({"type": "dimuon", "version": 1}));
    }
}
