//! The settings of supervised fine-tuning as flags, and how they meet those of a run on disk.

use serde_json::{Value, json};
use tinker_chat::{RendererName, TrainOnWhat};
use tinker_recipes::LrSchedule;
use tinker_recipes::sft::{HeldOut, SftConfig, SftOptions};
use tinker_types::TinkerPath;

use crate::base_model::server_name;
use crate::failure::{Failure, FailureKind, Result};
use crate::numbers::{number, whole};

/// What a run may be told; what is not given is resolved for the model and the data.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Training options")]
pub(super) struct Flags {
    /// Rank of the LoRA adapter [default: 32]
    #[arg(long, value_name = "N", alias = "lora-rank", value_parser = whole::<u32>)]
    rank: Option<u32>,
    /// Peak learning rate [default: calibrated for the model]
    #[arg(long, value_name = "X", alias = "learning-rate", value_parser = number)]
    lr: Option<f64>,
    /// How the learning rate changes: linear, cosine or constant [default: linear]
    #[arg(long, value_name = "NAME", alias = "lr-schedule")]
    schedule: Option<LrSchedule>,
    /// Rows per step [default: 16]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    batch_size: Option<usize>,
    /// Passes over the data [default: 5]
    #[arg(long, value_name = "N", alias = "num-epochs", value_parser = whole::<u64>)]
    epochs: Option<u64>,
    /// Stop after this many steps
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    max_steps: Option<u64>,
    /// Rows held out to evaluate on: a number such as 32, or a share such as 0.1 [default: 0.1]
    #[arg(long, value_name = "N|SHARE", value_parser = parse_held_out)]
    test_size: Option<HeldOut>,
    /// Which messages are trained [default: all_assistant_messages]
    #[arg(long, value_name = "WHICH", alias = "train-on-what")]
    train_on: Option<TrainOnWhat>,
    /// Chat format [default: that of the model]
    #[arg(long, value_name = "NAME")]
    renderer: Option<RendererName>,
    /// Longest row in tokens [default: the model's context]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    max_length: Option<usize>,
    /// Cut rows that are too long instead of refusing them
    #[arg(long)]
    truncate: bool,
    /// Global gradient norm to clip at; 0 does not clip [default: 0]
    #[arg(long, value_name = "X", value_parser = number)]
    grad_clip_norm: Option<f64>,
    /// Decoupled weight decay [default: 0]
    #[arg(long, value_name = "X", value_parser = number)]
    weight_decay: Option<f64>,
    /// Steps between checkpoints; 0 saves at the end alone [default: 20]
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    save_every: Option<u64>,
    /// Steps between evaluations; 0 evaluates at the start and the end alone [default: 10]
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    eval_every: Option<u64>,
    /// Seed of the split, the order of rows and the adapter [default: 0]
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    seed: Option<u64>,
    /// Start from the weights of this checkpoint instead of a new adapter
    #[arg(long, value_name = "PATH")]
    load_checkpoint: Option<TinkerPath>,
}

impl Flags {
    /// The settings of a new run.
    pub(super) fn options(&self) -> SftOptions {
        let default = SftOptions::default();
        SftOptions {
            renderer: self.renderer,
            train_on_what: self.train_on(),
            held_out: self.test_size.unwrap_or(default.held_out),
            max_length: self.max_length,
            truncate: self.truncate,
            batch_size: self.batch_size.unwrap_or(default.batch_size),
            num_epochs: self.epochs.unwrap_or(default.num_epochs),
            max_steps: self.max_steps,
            learning_rate: self.lr,
            lr_schedule: self.schedule.unwrap_or(default.lr_schedule),
            lora_rank: self.rank.unwrap_or(default.lora_rank),
            grad_clip_norm: self.grad_clip_norm.unwrap_or(default.grad_clip_norm),
            weight_decay: self.weight_decay.unwrap_or(default.weight_decay),
            eval_every: self.eval_every.unwrap_or(default.eval_every),
            save_every: self.save_every.unwrap_or(default.save_every),
            seed: self.seed.unwrap_or(default.seed),
            load_checkpoint_path: self.load_checkpoint.clone(),
            ..default
        }
    }

    /// Which messages are trained.
    pub(super) fn train_on(&self) -> TrainOnWhat {
        self.train_on.unwrap_or(SftOptions::default().train_on_what)
    }

    /// The flags that were given, with the field of `config.json` that each decides for data of
    /// `n_rows`.
    ///
    /// # Errors
    /// The rows held out leave none.
    fn given(&self, n_rows: usize) -> Result<Vec<(&'static str, &'static str, Value)>> {
        let held_out = self
            .test_size
            .map(|size| size.resolve(n_rows))
            .transpose()?;
        let start = self.load_checkpoint.as_ref();
        let all = [
            ("--rank", "lora_rank", self.rank.map(|v| json!(v))),
            ("--lr", "learning_rate", self.lr.map(|v| json!(v))),
            ("--schedule", "lr_schedule", self.schedule.map(|v| json!(v))),
            (
                "--batch-size",
                "batch_size",
                self.batch_size.map(|v| json!(v)),
            ),
            ("--epochs", "num_epochs", self.epochs.map(|v| json!(v))),
            ("--max-steps", "max_steps", self.max_steps.map(|v| json!(v))),
            ("--test-size", "test_size", held_out.map(|v| json!(v))),
            (
                "--train-on",
                "train_on_what",
                self.train_on.map(|v| json!(v)),
            ),
            (
                "--renderer",
                "renderer_name",
                self.renderer.map(|v| json!(v)),
            ),
            (
                "--max-length",
                "max_length",
                self.max_length.map(|v| json!(v)),
            ),
            (
                "--truncate",
                "truncate",
                self.truncate.then_some(json!(true)),
            ),
            (
                "--grad-clip-norm",
                "grad_clip_norm",
                self.grad_clip_norm.map(|v| json!(v)),
            ),
            (
                "--weight-decay",
                "weight_decay",
                self.weight_decay.map(|v| json!(v)),
            ),
            (
                "--save-every",
                "save_every",
                self.save_every.map(|v| json!(v)),
            ),
            (
                "--eval-every",
                "eval_every",
                self.eval_every.map(|v| json!(v)),
            ),
            ("--seed", "seed", self.seed.map(|v| json!(v))),
            (
                "--load-checkpoint",
                "load_checkpoint_path",
                start.map(|v| json!(v)),
            ),
        ];
        let given = all.into_iter();
        Ok(given
            .filter_map(|(flag, field, value)| Some((flag, field, value?)))
            .collect())
    }
}

/// What a person says of a run that is resumed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Given<'a> {
    /// Its base model.
    pub(super) model: Option<&'a str>,
    /// Its settings.
    pub(super) flags: &'a Flags,
}

impl Given<'_> {
    /// Refuses to go on with `recorded`, on data of `n_rows`, under other settings than it began
    /// with.
    ///
    /// # Errors
    /// A flag was given whose value differs from the recorded one.
    pub(super) fn check_against(&self, recorded: &SftConfig, n_rows: usize) -> Result<()> {
        let recorded = serde_json::to_value(recorded)?;
        let mut given = self.flags.given(n_rows)?;
        if let Some(model) = self.model {
            given.push(("--model", "model_name", json!(server_name(model)?)));
        }
        for (flag, field, given) in given {
            let recorded = &recorded[field];
            if given != *recorded {
                let recorded = match recorded {
                    Value::Null => "none".to_owned(),
                    value => value.to_string(),
                };
                let what = format!("{flag} {given} differs from the run's {recorded}");
                return Err(Failure::new(FailureKind::Conflict, what).hint(
                    "leave the flag out to resume, or begin a new run with another --run NAME",
                ));
            }
        }
        Ok(())
    }
}

/// `32` is rows; `0.1` and `10%` are shares.
fn parse_held_out(text: &str) -> std::result::Result<HeldOut, String> {
    let bad = |_| "write a number of rows such as 32, or a share such as 0.1".to_owned();
    if let Some(percent) = text.strip_suffix('%') {
        let percent: f64 = percent.parse().map_err(|_| bad(()))?;
        Ok(HeldOut::Fraction(percent / 100.0))
    } else if text.contains('.') {
        text.parse().map(HeldOut::Fraction).map_err(|_| bad(()))
    } else {
        text.parse().map(HeldOut::Rows).map_err(|_| bad(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_is_rows_or_a_share() {
        assert_eq!(parse_held_out("32"), Ok(HeldOut::Rows(32)));
        assert_eq!(parse_held_out("0.1"), Ok(HeldOut::Fraction(0.1)));
        assert_eq!(parse_held_out("25%"), Ok(HeldOut::Fraction(0.25)));
        assert!(parse_held_out("many").is_err());
    }

    #[test]
    fn flags_that_are_not_given_leave_the_defaults() {
        assert_eq!(Flags::default().options(), SftOptions::default());
    }

    #[test]
    fn the_help_states_the_defaults_of_the_recipe() {
        let defaults = SftOptions::default();

        assert_eq!(defaults.lora_rank, 32);
        assert_eq!(defaults.batch_size, 16);
        assert_eq!(defaults.num_epochs, 5);
        assert_eq!(defaults.held_out, HeldOut::Fraction(0.1));
        assert_eq!((defaults.save_every, defaults.eval_every), (20, 10));
    }
}
