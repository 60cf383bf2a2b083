//! `tinker checkpoint info`.

use serde_json::json;
use tinker_types::{Checkpoint, TinkerPath, WeightsInfo};

use super::{created, expires, kind, public, size};
use crate::commands::train;
use crate::connect::Connection;
use crate::context::Ctx;
use crate::failure::{Failure, Result};
use crate::output::Output;
use crate::weights::find_checkpoint;

/// Show a checkpoint
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Path such as tinker://RUN/weights/NAME, or RUN@NAME of a run folder
    #[arg(value_name = "PATH")]
    path: String,
}

pub(super) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    let path = find_checkpoint(&train::runs(ctx), &args.path)?;
    let connection = Connection::open(ctx, ctx.settings.target(None)?).await?;
    let checkpoint = find(&connection, &path).await?;
    let weights = connection.weights_info(&path).await?;
    let mut json = serde_json::to_value(&checkpoint)?;
    json["base_model"] = json!(weights.base_model);
    json["is_lora"] = json!(weights.is_lora);
    json["lora_rank"] = json!(weights.lora_rank);
    Ok(Output::properties(properties(&checkpoint, &weights), json))
}

async fn find(connection: &Connection, path: &TinkerPath) -> Result<Checkpoint> {
    let checkpoints = connection.list_checkpoints(&path.run).await?;
    let names: Vec<String> = checkpoints
        .iter()
        .map(|c| c.checkpoint_id.to_string())
        .collect();
    checkpoints
        .into_iter()
        .find(|checkpoint| checkpoint.checkpoint_id == path.checkpoint)
        .ok_or_else(|| {
            let known = match names.as_slice() {
                [] => "the run has no checkpoints".to_owned(),
                names => format!("the run has: {}", names.join(", ")),
            };
            Failure::not_found(format!("checkpoint {path} does not exist")).hint(known)
        })
}

fn properties(checkpoint: &Checkpoint, weights: &WeightsInfo) -> Vec<(String, String)> {
    let lora = match (weights.is_lora, weights.lora_rank) {
        (true, Some(rank)) => format!("Yes (Rank {rank})"),
        (true, None) => "Yes".to_owned(),
        (false, _) => "No".to_owned(),
    };
    let rows = [
        ("Checkpoint ID", checkpoint.checkpoint_id.to_string()),
        ("Type", kind(checkpoint).to_owned()),
        ("Tinker Path", checkpoint.tinker_path.to_string()),
        ("Size", size(checkpoint)),
        ("Public", public(checkpoint)),
        ("Created", created(checkpoint)),
        ("Expires", expires(checkpoint)),
        ("Training Run ID", checkpoint.tinker_path.run.to_string()),
        ("Base Model", weights.base_model.clone()),
        ("LoRA", lora),
    ];
    rows.map(|(key, value)| (key.to_owned(), value)).into()
}
