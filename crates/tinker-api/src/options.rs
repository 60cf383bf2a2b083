//! Options of the clients' methods.

use std::collections::BTreeMap;
use std::time::Duration;

use tinker_types::{
    AdamParams, CheckpointId, CheckpointKind, DimuonParams, LoraConfig, OptimizerConfig,
    OptimizerParams, TensorData, TinkerPath, UserMetadata,
};

use crate::error::{Error, Result};

/// Shortest and longest life of a checkpoint.
const TTL_RANGE: std::ops::RangeInclusive<u64> = 3600..=10 * 365 * 24 * 3600;

/// What a new training run trains.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainingOptions {
    /// The adapter. Default rank 32 on attention, MLP and head.
    pub lora: LoraConfig,
    /// The optimizer. Default AdamW.
    pub optimizer: OptimizerConfig,
    /// Annotations of the run.
    pub user_metadata: Option<UserMetadata>,
}

impl From<LoraConfig> for TrainingOptions {
    fn from(lora: LoraConfig) -> Self {
        Self {
            lora,
            ..Self::default()
        }
    }
}

impl TrainingOptions {
    pub(crate) fn check(&self) -> Result<()> {
        let lora = &self.lora;
        if lora.rank == 0 {
            return invalid("LoRA rank 0: it must be 1 or more");
        }
        if !(lora.train_attn || lora.train_mlp || lora.train_unembed) {
            return invalid(
                "nothing to train: one of train_attn, train_mlp and train_unembed must be true",
            );
        }
        Ok(())
    }
}

/// How a training run continues from a checkpoint.
#[derive(Clone, Default, PartialEq)]
pub struct StateOptions {
    /// Insist on this base model; the checkpoint's own otherwise.
    pub base_model: Option<String>,
    /// Annotations of the new run.
    pub user_metadata: Option<UserMetadata>,
    /// The new optimizer, when its state is not loaded.
    pub optimizer: Option<OptimizerConfig>,
    /// Permission to read somebody else's weights. Never printed.
    pub weights_access_token: Option<String>,
}

impl std::fmt::Debug for StateOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StateOptions")
            .field("base_model", &self.base_model)
            .field("user_metadata", &self.user_metadata)
            .field("optimizer", &self.optimizer)
            .finish_non_exhaustive()
    }
}

/// How a checkpoint is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SaveOptions {
    /// Delete it after this time, one hour to ten years; kept if absent.
    pub ttl: Option<Duration>,
    /// Replace a checkpoint of the same name (training checkpoints only).
    pub overwrite: bool,
    /// Annotations.
    pub user_metadata: Option<BTreeMap<String, String>>,
}

impl SaveOptions {
    /// The life in seconds.
    pub(crate) fn ttl_seconds(&self) -> Result<Option<u64>> {
        seconds_to_live(self.ttl)
    }
}

/// The life of a checkpoint in seconds, checked.
pub(crate) fn seconds_to_live(ttl: Option<Duration>) -> Result<Option<u64>> {
    let Some(ttl) = ttl else { return Ok(None) };
    let secs = ttl.as_secs();
    if !TTL_RANGE.contains(&secs) {
        return invalid(format!(
            "ttl of {secs} seconds: it must be 3600 to {}",
            TTL_RANGE.end()
        ));
    }
    Ok(Some(secs))
}

/// How weights are saved for use outside the service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExportOptions {
    /// Delete it after this time, one hour to ten years; kept if absent.
    pub ttl: Option<Duration>,
    /// Encrypt the files for these, at most ten: age recipients (`age1…`) or SSH public keys. Empty
    /// leaves them as they are.
    pub age_encryption_recipients: Vec<String>,
}

/// How a checkpoint is copied.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct CopyOptions {
    /// Delete the copy after this time, one hour to ten years; kept if absent.
    pub ttl: Option<Duration>,
    /// Permission to read somebody else's weights. Never printed.
    pub weights_access_token: Option<String>,
}

impl std::fmt::Debug for CopyOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CopyOptions")
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

/// The name of a checkpoint, checked.
pub(crate) fn checkpoint_name(kind: CheckpointKind, name: &str) -> Result<String> {
    Ok(CheckpointId::new(kind, name)?.name().to_owned())
}

/// Checks the hyper-parameters of a step, as far as the optimizer is known.
pub(crate) fn check_step(params: &OptimizerParams) -> Result<()> {
    match params {
        OptimizerParams::Adam(adam) => check_adam(adam),
        OptimizerParams::Dimuon(dimuon) => check_dimuon(dimuon),
        OptimizerParams::Other { family, .. } if family.is_empty() => {
            invalid("the optimizer's family is empty")
        }
        OptimizerParams::Other { .. } => Ok(()),
    }
}

fn at_least_zero(name: &str, x: f64) -> Result<()> {
    match x.is_finite() && x >= 0.0 {
        true => Ok(()),
        false => invalid(format!("{name} {x}: it must be a number of at least 0")),
    }
}

fn decay(name: &str, x: f64) -> Result<()> {
    match (0.0..1.0).contains(&x) {
        true => Ok(()),
        false => invalid(format!("{name} {x}: it must be in [0, 1)")),
    }
}

fn check_dimuon(dimuon: &DimuonParams) -> Result<()> {
    at_least_zero("learning_rate", dimuon.learning_rate)?;
    decay("beta1", dimuon.beta1)?;
    if !dimuon.grad_clip_norm.is_finite() {
        let norm = dimuon.grad_clip_norm;
        return invalid(format!("grad_clip_norm {norm}: it must be a number"));
    }
    Ok(())
}

fn check_adam(adam: &AdamParams) -> Result<()> {
    at_least_zero("learning_rate", adam.learning_rate)?;
    at_least_zero("weight_decay", adam.weight_decay)?;
    at_least_zero("grad_clip_norm", adam.grad_clip_norm)?;
    decay("beta1", adam.beta1)?;
    decay("beta2", adam.beta2)?;
    if !(adam.eps.is_finite() && adam.eps > 0.0) {
        return invalid(format!("eps {}: it must be a number above 0", adam.eps));
    }
    Ok(())
}

/// What a sampler samples from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SamplingSource {
    /// A base model as it is.
    BaseModel(String),
    /// A sampler checkpoint.
    Checkpoint(TinkerPath),
}

impl From<TinkerPath> for SamplingSource {
    fn from(path: TinkerPath) -> Self {
        Self::Checkpoint(path)
    }
}

impl From<&TinkerPath> for SamplingSource {
    fn from(path: &TinkerPath) -> Self {
        Self::Checkpoint(path.clone())
    }
}

/// What a sample returns beside one continuation.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleOptions {
    /// Independent continuations, 1 or more. Default 1.
    pub num_samples: u32,
    /// Return the prompt's log-probabilities.
    pub prompt_logprobs: bool,
    /// Only those of the last n prompt tokens, `1..prompt length`.
    pub prompt_logprobs_last_n: Option<u32>,
    /// Return the k most likely tokens at each prompt position.
    pub topk_prompt_logprobs: u32,
    /// Return the k most likely tokens at each sampled position.
    pub topk_sample_logprobs: u32,
    /// Return the log-probabilities of these tokens: int64 `[prompt - 1, k]`, -1 skips a cell.
    pub target_prompt_logprobs: Option<TensorData>,
    /// Draw k alternatives at each prompt position.
    pub prompt_alt_tokens_k: u32,
    /// Keep what the `stable_reinforce` loss needs.
    pub record_stability_info: bool,
}

impl Default for SampleOptions {
    fn default() -> Self {
        Self {
            num_samples: 1,
            prompt_logprobs: false,
            prompt_logprobs_last_n: None,
            topk_prompt_logprobs: 0,
            topk_sample_logprobs: 0,
            target_prompt_logprobs: None,
            prompt_alt_tokens_k: 0,
            record_stability_info: false,
        }
    }
}

fn invalid<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::InvalidRequest(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn an_adapter_must_train_something() {
        let mut options = TrainingOptions::default();
        options.check().unwrap();

        options.lora = LoraConfig {
            train_attn: false,
            train_mlp: false,
            train_unembed: false,
            ..options.lora
        };
        assert_eq!(
            message(options.check()),
            "nothing to train: one of train_attn, train_mlp and train_unembed must be true"
        );
        options.lora.rank = 0;
        assert_eq!(
            message(options.check()),
            "LoRA rank 0: it must be 1 or more"
        );
    }

    #[test]
    fn lives_of_checkpoints_are_bounded() {
        let ttl = |secs| SaveOptions {
            ttl: Some(Duration::from_secs(secs)),
            ..SaveOptions::default()
        };

        assert_eq!(SaveOptions::default().ttl_seconds().unwrap(), None);
        assert_eq!(ttl(3600).ttl_seconds().unwrap(), Some(3600));
        for secs in [0, 3599, 315_360_001] {
            assert!(message(ttl(secs).ttl_seconds()).contains("must be 3600 to 315360000"));
        }
    }

    #[test]
    fn every_optimizer_is_checked_as_far_as_it_is_known() {
        let dimuon = |learning_rate, beta1| DimuonParams {
            beta1,
            ..DimuonParams::new(learning_rate)
        };
        let other = |family: &str| OptimizerParams::Other {
            family: family.into(),
            settings: serde_json::Map::new(),
        };

        check_step(&dimuon(0.1, 0.9).into()).unwrap();
        check_step(&other("lion")).unwrap();
        for (params, expected) in [
            (
                dimuon(-1.0, 0.9).into(),
                "learning_rate -1: it must be a number of at least 0",
            ),
            (dimuon(0.1, 1.0).into(), "beta1 1: it must be in [0, 1)"),
            (other(""), "the optimizer's family is empty"),
        ] {
            assert_eq!(message(check_step(&params)), expected);
        }
    }

    #[test]
    fn hyper_parameters_out_of_range_are_named() {
        check_adam(&AdamParams::default()).unwrap();
        for (adam, expected) in [
            (
                AdamParams {
                    learning_rate: f64::NAN,
                    ..AdamParams::default()
                },
                "learning_rate NaN: it must be a number of at least 0",
            ),
            (
                AdamParams {
                    beta2: 1.0,
                    ..AdamParams::default()
                },
                "beta2 1: it must be in [0, 1)",
            ),
            (
                AdamParams {
                    eps: 0.0,
                    ..AdamParams::default()
                },
                "eps 0: it must be a number above 0",
            ),
        ] {
            assert_eq!(message(check_adam(&adam)), expected);
        }
    }
}
