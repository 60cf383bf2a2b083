//! `tinker run list`.

use jiff::Timestamp;
use tinker_types::TrainingRun;

use crate::commands::paging;
use crate::connect::Connection;
use crate::context::Ctx;
use crate::failure::{Failure, Result};
use crate::human;
use crate::output::Output;

/// List training runs, newest first
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    page: paging::Flags,
    /// Columns to show, separated by commas
    #[arg(short, long, value_name = "NAMES", value_delimiter = ',', default_value = DEFAULT)]
    columns: Vec<String>,
}

/// A column of the list.
struct Column {
    name: &'static str,
    header: &'static str,
    cell: fn(&TrainingRun) -> String,
}

const DEFAULT: &str = "id,model,lora,updated,status";
const COLUMNS: [Column; 8] = [
    Column {
        name: "id",
        header: "Run ID",
        cell: |run| run.training_run_id.to_string(),
    },
    Column {
        name: "model",
        header: "Base Model",
        cell: |run| run.base_model.clone(),
    },
    Column {
        name: "owner",
        header: "Owner",
        cell: |run| run.model_owner.clone(),
    },
    Column {
        name: "lora",
        header: "LoRA",
        cell: lora,
    },
    Column {
        name: "updated",
        header: "Last Update",
        cell: updated,
    },
    Column {
        name: "status",
        header: "Status",
        cell: status,
    },
    Column {
        name: "checkpoint",
        header: "Last Checkpoint",
        cell: checkpoint,
    },
    Column {
        name: "checkpoint_time",
        header: "Checkpoint Time",
        cell: checkpoint_time,
    },
];

pub(super) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    let columns = columns(&args.columns)?;
    let connection = Connection::open(ctx, ctx.settings.target(None)?).await?;
    let runs = connection.list_runs(args.page.limit()).await?;
    let header: Vec<&'static str> = columns.iter().map(|column| column.header).collect();
    let row = |run: &TrainingRun| columns.iter().map(|column| (column.cell)(run)).collect();
    let list = Output::list("runs", &runs, &header, row)?;
    Ok(list.or_note("no training runs yet; `tinker train sft DATA` makes one"))
}

fn columns(names: &[String]) -> Result<Vec<&'static Column>> {
    let find = |name: &String| {
        COLUMNS
            .iter()
            .find(|column| column.name == name)
            .ok_or_else(|| {
                let known = COLUMNS.each_ref().map(|column| column.name).join(", ");
                Failure::usage(format!("unknown column `{name}`"))
                    .hint(format!("there are: {known}"))
            })
    };
    names.iter().map(find).collect()
}

pub(super) fn lora(run: &TrainingRun) -> String {
    match (run.is_lora, run.lora_rank) {
        (true, Some(rank)) => format!("Rank {rank}"),
        (true, None) => "Yes".to_owned(),
        (false, _) => "No".to_owned(),
    }
}

pub(super) fn status(run: &TrainingRun) -> String {
    if run.corrupted { "Failed" } else { "OK" }.to_owned()
}

pub(super) fn updated(run: &TrainingRun) -> String {
    human::age(&run.last_request_time.0, Timestamp::now())
}

fn checkpoint(run: &TrainingRun) -> String {
    run.last_checkpoint
        .as_ref()
        .map_or_else(|| "-".to_owned(), |last| last.checkpoint_id.to_string())
}

fn checkpoint_time(run: &TrainingRun) -> String {
    run.last_checkpoint.as_ref().map_or_else(
        || "-".to_owned(),
        |last| human::age(&last.time.0, Timestamp::now()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_columns_are_answered_with_the_known_ones() {
        let names = ["id".to_owned(), "foo".to_owned()];

        let failure = columns(&names).map(|_| ()).unwrap_err().to_string();

        assert!(failure.starts_with("error: unknown column `foo`\nhint: there are: id, model,"));
    }
}
