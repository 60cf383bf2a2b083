//! `tinker checkpoint --base-model ... --output ...`: Tinkex's command that saves the sampler weights
//! of a new adapter and writes down where they are, for scripts that were written for it.

use std::path::PathBuf;

use jiff::Timestamp;
use serde_json::{Value, json};
use tinker_api::{SaveOptions, TrainingClient};
use tinker_types::LoraConfig;

use crate::base_model::server_name;
use crate::connect::Connection;
use crate::context::Ctx;
use crate::failure::{Failure, Result};
use crate::numbers::{positive, whole};
use crate::out_file;
use crate::output::Output;

/// Tinkex's flags; hidden, since training is what makes checkpoints worth having.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    #[arg(long, hide = true, requires = "output")]
    base_model: Option<String>,
    #[arg(short, long, hide = true, requires = "base_model")]
    output: Option<PathBuf>,
    #[arg(long, hide = true, requires = "base_model")]
    name: Option<String>,
    #[arg(long, hide = true, requires = "base_model", default_value_t = 32, value_parser = positive)]
    rank: u32,
    #[arg(long, hide = true, requires = "base_model", value_parser = whole::<u64>)]
    seed: Option<u64>,
    #[arg(
        long,
        hide = true,
        requires = "base_model",
        overrides_with = "no_train_mlp"
    )]
    train_mlp: bool,
    #[arg(long, hide = true, requires = "base_model")]
    no_train_mlp: bool,
    #[arg(
        long,
        hide = true,
        requires = "base_model",
        overrides_with = "no_train_attn"
    )]
    train_attn: bool,
    #[arg(long, hide = true, requires = "base_model")]
    no_train_attn: bool,
    #[arg(
        long,
        hide = true,
        requires = "base_model",
        overrides_with = "no_train_unembed"
    )]
    train_unembed: bool,
    #[arg(long, hide = true, requires = "base_model")]
    no_train_unembed: bool,
}

impl Args {
    fn lora(&self) -> LoraConfig {
        LoraConfig {
            rank: self.rank,
            seed: self.seed,
            train_mlp: !self.no_train_mlp,
            train_attn: !self.no_train_attn,
            train_unembed: !self.no_train_unembed,
        }
    }
}

pub(super) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    let (Some(model), Some(file)) = (&args.base_model, &args.output) else {
        return Err(Failure::usage(
            "`tinker checkpoint` needs a command, or --base-model and --output",
        )
        .hint("`tinker checkpoint list` shows checkpoints; `tinker train sft DATA` makes some"));
    };
    out_file::prepare(file)?;
    let model = server_name(model)?;
    let name = args.name.clone().unwrap_or_else(|| default_name(&model));
    let connection = Connection::open(ctx, ctx.settings.target(Some(&model))?).await?;
    let trainer = connection.create_lora(&model, args.lora()).await?;
    let record = save(&trainer, &model, &name).await;
    connection.close_after(&record).await;
    let record = record?;
    out_file::write(
        file,
        &format!("{}\n", serde_json::to_string_pretty(&record)?),
    )?;
    let text = format!("Checkpoint saved to {}\n", file.display());
    Ok(Output::text(text, record))
}

async fn save(trainer: &TrainingClient, model: &str, name: &str) -> Result<Value> {
    let path = trainer
        .save_weights_for_sampler(name, SaveOptions::default())
        .await?;
    Ok(json!({
        "base_model": model,
        "model_id": trainer.training_run_id(),
        "weights_path": path,
        "saved_at": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        "response": { "path": path },
    }))
}

/// As in `checkpoint-qwen-qwen3-8b`.
fn default_name(model: &str) -> String {
    let model = model.trim_start_matches('/').to_lowercase();
    format!("checkpoint-{}", model.replace(['/', ':'], "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_of_the_model() {
        assert_eq!(default_name("Qwen/Qwen3-8B"), "checkpoint-qwen-qwen3-8b");
        assert_eq!(default_name("/models/a:b"), "checkpoint-models-a-b");
    }
}
