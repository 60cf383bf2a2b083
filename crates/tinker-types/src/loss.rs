//! Loss functions by name and their settings.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::tags::wire_enum;

wire_enum! {
    /// A built-in loss. Every one is a sum over targets and data, not a mean.
    ///
    /// `l` is the learner's log-probability of a target, `q` the one supplied as `logprobs`,
    /// `A` the advantage and `r = exp(l - q)`.
    LossFn {
        /// `-sum w l`.
        CrossEntropy = "cross_entropy",
        /// `-sum r A`.
        ImportanceSampling = "importance_sampling",
        /// `-sum min(r A, clip(r, low, high) A)`; low 0.8 and high 1.2 unless configured.
        Ppo = "ppo",
        /// `-sum stop_gradient(clip(r, low, high)) l A`; low 0 and high 4 unless configured.
        Cispo = "cispo",
        /// `-sum (l A - beta/2 (l - q)^2)`.
        Dro = "dro",
        /// Sequence-level ratios.
        Gspo = "gspo",
        /// Defined by the server.
        StableReinforce = "stable_reinforce",
        /// Uploaded by the client.
        Custom = "custom",
    }
}

/// A setting of a loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum LossConfigValue {
    /// A number.
    Number(f64),
    /// A text, such as the id of an uploaded loss.
    Text(String),
}

/// Settings of a loss by name; empty means its defaults.
pub type LossConfig = BTreeMap<String, LossConfigValue>;
