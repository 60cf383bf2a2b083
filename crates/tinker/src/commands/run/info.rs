//! `tinker run info`.

use jiff::Timestamp;
use tinker_types::{Checkpoint, TrainingRun};

use super::list;
use crate::connect::Connection;
use crate::context::Ctx;
use crate::failure::Result;
use crate::human;
use crate::output::Output;

/// Show a training run
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run id or the beginning of one, @last, or the name of a run folder
    #[arg(value_name = "RUN")]
    run: String,
}

pub(super) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    let connection = Connection::open(ctx, ctx.settings.target(None)?).await?;
    let run = connection.find_run(ctx, &args.run).await?;
    Ok(Output::properties(
        properties(&run),
        serde_json::to_value(&run)?,
    ))
}

fn properties(run: &TrainingRun) -> Vec<(String, String)> {
    let lora = match list::lora(run).as_str() {
        rank if rank.starts_with("Rank") => format!("Yes ({rank})"),
        other => other.to_owned(),
    };
    let mut rows = vec![
        row("Run ID", &run.training_run_id),
        row("Base Model", &run.base_model),
        row("Owner", &run.model_owner),
        row("LoRA", lora),
        row("Last Update", list::updated(run)),
        row("Status", list::status(run)),
    ];
    for (title, last) in [
        ("Last Training Checkpoint", &run.last_checkpoint),
        ("Last Sampler Checkpoint", &run.last_sampler_checkpoint),
    ] {
        rows.extend(last.iter().flat_map(|last| checkpoint(title, last)));
    }
    if let Some(metadata) = run.user_metadata.as_ref().filter(|map| !map.is_empty()) {
        rows.push(row("Metadata", ""));
        rows.extend(
            metadata
                .iter()
                .map(|(key, value)| row(&format!("  - {key}"), plain(value))),
        );
    }
    rows
}

fn checkpoint(title: &str, last: &Checkpoint) -> [(String, String); 3] {
    [
        row(title, &last.checkpoint_id),
        row("  - Time", human::age(&last.time.0, Timestamp::now())),
        row("  - Path", &last.tinker_path),
    ]
}

fn row(key: &str, value: impl ToString) -> (String, String) {
    (key.to_owned(), value.to_string())
}

fn plain(value: &serde_json::Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}
