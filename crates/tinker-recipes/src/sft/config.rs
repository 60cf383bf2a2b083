//! Every setting of a run: what a person may choose, and what a run resolves and records.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tinker_chat::{RendererName, Tokenizer, TrainOnWhat};
use tinker_types::{AdamParams, LoraConfig, TinkerPath};

use super::batches::BatchPlan;
use super::data::Dataset;
use crate::error::{Error, Result};
use crate::hyperparams::{LearningRate, ModelFacts, recommended_learning_rate};
use crate::schedule::LrSchedule;

/// How many rows are kept from training to evaluate on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldOut {
    /// This many.
    Rows(usize),
    /// This share, in `[0, 1)`, rounded down.
    Fraction(f64),
}

impl HeldOut {
    /// How many of `n_rows` rows these are.
    ///
    /// # Errors
    /// They leave no row to train on, or the share is out of range.
    pub fn resolve(self, n_rows: usize) -> Result<usize> {
        match self {
            Self::Rows(n) if n < n_rows => Ok(n),
            Self::Rows(n) => {
                let reason = format!("must leave at least one of the {n_rows} rows to train on");
                Err(bad("test_size", n, &reason))
            }
            Self::Fraction(share) if (0.0..1.0).contains(&share) => {
                Ok((share * n_rows as f64).floor() as usize)
            }
            Self::Fraction(share) => Err(bad(
                "test_size",
                share,
                "a share must be at least 0 and below 1",
            )),
        }
    }
}

/// What a person may choose; `None` is resolved for the model and the data.
#[derive(Debug, Clone, PartialEq)]
pub struct SftOptions {
    /// Chat format; that of the model if `None`.
    pub renderer: Option<RendererName>,
    /// Which messages are trained.
    pub train_on_what: TrainOnWhat,
    /// Rows to evaluate on.
    pub held_out: HeldOut,
    /// Longest rendered row in tokens; the model's context if `None`.
    pub max_length: Option<usize>,
    /// Cut longer rows at the end instead of refusing them.
    pub truncate: bool,
    /// Rows per step.
    pub batch_size: usize,
    /// Passes over the data.
    pub num_epochs: u64,
    /// Steps to stop after, if that is sooner.
    pub max_steps: Option<u64>,
    /// Peak learning rate; calibrated for the model if `None`.
    pub learning_rate: Option<f64>,
    /// How it changes.
    pub lr_schedule: LrSchedule,
    /// Inner dimension of the adapter.
    pub lora_rank: u32,
    /// Global gradient norm to clip at; 0 does not clip.
    pub grad_clip_norm: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Steps between evaluations; 0 evaluates at the start and the end alone.
    pub eval_every: u64,
    /// Steps between checkpoints; 0 saves at the end alone.
    pub save_every: u64,
    /// Seconds that checkpoints before the last are kept; `None` keeps them.
    pub ttl_seconds: Option<u64>,
    /// Decides the split, the order of rows and the adapter's initial weights.
    pub seed: u64,
    /// Weights to start from instead of a new adapter.
    pub load_checkpoint_path: Option<TinkerPath>,
}

impl Default for SftOptions {
    fn default() -> Self {
        Self {
            renderer: None,
            train_on_what: TrainOnWhat::AllAssistantMessages,
            held_out: HeldOut::Fraction(0.1),
            max_length: None,
            truncate: false,
            batch_size: 16,
            num_epochs: 5,
            max_steps: None,
            learning_rate: None,
            lr_schedule: LrSchedule::Linear,
            lora_rank: 32,
            grad_clip_norm: 0.0,
            weight_decay: 0.0,
            eval_every: 10,
            save_every: 20,
            ttl_seconds: None,
            seed: 0,
            load_checkpoint_path: None,
        }
    }
}

/// The server that a run is trained on; its checkpoints are on no other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainedOn {
    /// The embedded server of the data directory.
    Embedded,
    /// The server at this address, without a slash at its end.
    BaseUrl(String),
}

/// Every resolved setting of a run, as `config.json` records it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SftConfig {
    /// Always `sft`.
    pub recipe: String,
    /// Version of this program.
    pub tinker_version: String,
    /// Base model.
    pub model_name: String,
    /// Inner dimension of the adapter.
    pub lora_rank: u32,
    /// Weights that the run starts from, if not a new adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_checkpoint_path: Option<TinkerPath>,
    /// Chat format.
    pub renderer_name: RendererName,
    /// Which messages are trained.
    pub train_on_what: TrainOnWhat,
    /// The data file.
    pub file_path: PathBuf,
    /// SHA-256 of the data file.
    pub file_sha256: String,
    /// Rows held out.
    pub test_size: usize,
    /// Longest rendered row in tokens.
    pub max_length: usize,
    /// Whether longer rows are cut.
    pub truncate: bool,
    /// Rows per step.
    pub batch_size: usize,
    /// Passes over the data.
    pub num_epochs: u64,
    /// Steps to stop after, if that is sooner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Where it comes from.
    pub learning_rate_reason: String,
    /// How it changes.
    pub lr_schedule: LrSchedule,
    /// Decay of Adam's first moment.
    pub adam_beta1: f64,
    /// Decay of Adam's second moment.
    pub adam_beta2: f64,
    /// Added to the root of Adam's second moment.
    pub adam_eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Global gradient norm to clip at; 0 does not clip.
    pub grad_clip_norm: f64,
    /// Steps between evaluations; 0 evaluates at the start and the end alone.
    pub eval_every: u64,
    /// Steps between checkpoints; 0 saves at the end alone.
    pub save_every: u64,
    /// Seconds that checkpoints before the last are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
    /// Decides the split, the order of rows and the adapter's initial weights.
    pub seed: u64,
    /// The server; `None` if whoever began the run did not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<TrainedOn>,
}

impl SftOptions {
    /// Settles every setting for `model`, whose longest sequence is `context_length` tokens.
    ///
    /// # Errors
    /// A setting is out of range, or the model's learning rate or renderer is not known and not
    /// given.
    pub fn resolve(
        &self,
        data: &Dataset,
        model: &ModelFacts,
        context_length: usize,
        tokenizer: &Tokenizer,
    ) -> Result<SftConfig> {
        self.check(context_length)?;
        let learning_rate = match self.learning_rate {
            Some(value) => LearningRate {
                value,
                reason: "given".to_owned(),
            },
            None => recommended_learning_rate(model)?,
        };
        let adam = AdamParams {
            eps: 1e-8,
            ..AdamParams::default()
        };
        Ok(SftConfig {
            recipe: "sft".to_owned(),
            tinker_version: env!("CARGO_PKG_VERSION").to_owned(),
            model_name: model.name.clone(),
            lora_rank: self.lora_rank,
            load_checkpoint_path: self.load_checkpoint_path.clone(),
            renderer_name: self.resolve_renderer(model, tokenizer)?,
            train_on_what: self.train_on_what,
            file_path: std::path::absolute(&data.path).unwrap_or_else(|_| data.path.clone()),
            file_sha256: data.sha256.clone(),
            test_size: self.held_out.resolve(data.rows.len())?,
            max_length: self.max_length.unwrap_or(context_length),
            truncate: self.truncate,
            batch_size: self.batch_size,
            num_epochs: self.num_epochs,
            max_steps: self.max_steps,
            learning_rate: learning_rate.value,
            learning_rate_reason: learning_rate.reason,
            lr_schedule: self.lr_schedule,
            adam_beta1: adam.beta1,
            adam_beta2: adam.beta2,
            adam_eps: adam.eps,
            weight_decay: self.weight_decay,
            grad_clip_norm: self.grad_clip_norm,
            eval_every: self.eval_every,
            save_every: self.save_every,
            ttl_seconds: self.ttl_seconds,
            seed: self.seed,
            server: None,
        })
    }

    fn check(&self, context_length: usize) -> Result<()> {
        let positive = |name, value: u64| match value {
            0 => Err(bad(name, value, "must be at least 1")),
            _ => Ok(()),
        };
        positive("batch_size", self.batch_size as u64)?;
        positive("num_epochs", self.num_epochs)?;
        positive("max_steps", self.max_steps.unwrap_or(1))?;
        positive("lora_rank", u64::from(self.lora_rank))?;
        if let Some(ttl) = self.ttl_seconds.filter(|ttl| *ttl < 3600) {
            return Err(bad("ttl_seconds", ttl, "must be at least 3600, one hour"));
        }
        if let Some(rate) = self
            .learning_rate
            .filter(|rate| !(rate.is_finite() && *rate > 0.0))
        {
            return Err(bad("learning_rate", rate, "must be a number above 0"));
        }
        for (name, value) in [
            ("grad_clip_norm", self.grad_clip_norm),
            ("weight_decay", self.weight_decay),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(bad(name, value, "must be a number of at least 0"));
            }
        }
        match self.max_length {
            Some(length) if length < 2 || length > context_length => {
                let reason = format!("must be 2 to {context_length}, the model's context");
                Err(bad("max_length", length, &reason))
            }
            _ => Ok(()),
        }
    }

    fn resolve_renderer(&self, model: &ModelFacts, tokenizer: &Tokenizer) -> Result<RendererName> {
        self.renderer
            .or_else(|| RendererName::recommended(&model.name, tokenizer))
            .ok_or_else(|| Error::NoRenderer {
                model: model.name.clone(),
                known: RendererName::ALL.map(RendererName::as_str).join(", "),
            })
    }
}

impl SftConfig {
    /// The optimizer's settings at `step` of `n_steps`.
    pub(crate) fn adam(&self, step: u64, n_steps: u64) -> AdamParams {
        AdamParams {
            learning_rate: self.learning_rate * self.lr_schedule.multiplier(step, n_steps),
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            eps: self.adam_eps,
            weight_decay: self.weight_decay,
            grad_clip_norm: self.grad_clip_norm,
        }
    }

    /// The adapter to create.
    pub fn lora(&self) -> LoraConfig {
        LoraConfig {
            rank: self.lora_rank,
            seed: Some(self.seed),
            ..LoraConfig::default()
        }
    }

    /// The order of training over `n_rows` rows.
    pub fn batch_plan(&self, n_rows: usize) -> BatchPlan {
        BatchPlan::new(
            n_rows,
            self.batch_size,
            self.num_epochs,
            self.max_steps,
            self.seed,
        )
    }

    /// Refuses data that are not those the run began with.
    ///
    /// # Errors
    /// [`Error::DataChanged`].
    pub fn check_data(&self, data: &Dataset) -> Result<()> {
        if data.sha256 == self.file_sha256 {
            return Ok(());
        }
        let (expected, found) = (self.file_sha256.clone(), data.sha256.clone());
        Err(Error::DataChanged {
            path: data.path.clone(),
            expected,
            found,
        })
    }
}

fn bad(name: &'static str, value: impl ToString, reason: &str) -> Error {
    Error::BadOption {
        name,
        value: value.to_string(),
        reason: reason.to_owned(),
    }
}
