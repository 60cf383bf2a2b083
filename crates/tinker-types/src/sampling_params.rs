//! How to sample.

use serde::{Deserialize, Serialize};

/// Settings of a sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// Most tokens to generate; absent means as many as the context holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Seed of the draws; absent lets the server choose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// When to stop; absent means at the end-of-sequence token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
    /// Softens the distribution above 1, sharpens it below; 0 is greedy. Default 1.
    pub temperature: f64,
    /// Keeps the `k` most likely tokens; -1, the default, keeps all.
    pub top_k: i64,
    /// Keeps the most likely tokens up to this mass, in `(0, 1]`. Default 1.
    pub top_p: f64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_tokens: None,
            seed: None,
            stop: None,
            temperature: 1.0,
            top_k: -1,
            top_p: 1.0,
        }
    }
}

/// Stop conditions. An empty list turns every stop off, the end-of-sequence token included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    /// One text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// Several texts.
    Texts(Vec<String>),
}
