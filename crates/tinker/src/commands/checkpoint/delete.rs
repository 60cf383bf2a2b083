//! `tinker checkpoint delete`: says what it will delete, asks, and reports what it could not.

use serde_json::json;
use tinker_types::{CheckpointKind, TinkerPath};

use crate::commands::train;
use crate::connect::Connection;
use crate::context::Ctx;
use crate::failure::{Failure, FailureKind, Result};
use crate::human;
use crate::output::Output;
use crate::weights::find_checkpoint;

/// Delete checkpoints for good
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Paths such as tinker://RUN/weights/NAME, or RUN@NAME of a run folder
    #[arg(
        value_name = "PATH",
        required_unless_present = "run_id",
        conflicts_with = "run_id"
    )]
    paths: Vec<String>,
    /// Delete those of one run: its id or the beginning of it, or the name of a run folder
    #[arg(long, value_name = "RUN")]
    run_id: Option<String>,
    /// With --run-id: only this type, weights or sampler_weights
    #[arg(long = "type", value_name = "TYPE", requires = "run_id", value_parser = parse_kind)]
    kind: Option<CheckpointKind>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

pub(super) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    // Every path is read before anything is deleted.
    let runs = train::runs(ctx);
    let paths: Result<Vec<TinkerPath>> = args
        .paths
        .iter()
        .map(|text| find_checkpoint(&runs, text))
        .collect();
    let mut paths = paths?;
    let connection = Connection::open(ctx, ctx.settings.target(None)?).await?;
    if let Some(run) = &args.run_id {
        let run = connection.find_run(ctx, run).await?;
        let checkpoints = connection.list_checkpoints(&run.training_run_id).await?;
        let is_wanted = |path: &TinkerPath| args.kind.is_none_or(|k| path.checkpoint.kind == k);
        paths.extend(
            checkpoints
                .into_iter()
                .map(|c| c.tinker_path)
                .filter(is_wanted),
        );
        if paths.is_empty() {
            let what = format!("run {} has no such checkpoints", run.training_run_id);
            return Err(Failure::not_found(what));
        }
    }
    if !args.yes && !confirm(ctx, &paths)? {
        ctx.ui.note("nothing was deleted");
        return Ok(Output::text(
            "",
            json!({ "deleted_count": 0, "failed": [] }),
        ));
    }
    delete(ctx, &connection, &paths).await
}

fn confirm(ctx: &Ctx, paths: &[TinkerPath]) -> Result<bool> {
    ctx.ui.note(format_args!(
        "will delete {}:",
        human::counted(paths.len() as u64, "checkpoint")
    ));
    for path in paths {
        ctx.ui.note(format_args!("  {path}"));
    }
    ctx.ui.confirm("This cannot be undone. Delete?")
}

async fn delete(ctx: &Ctx, connection: &Connection, paths: &[TinkerPath]) -> Result<Output> {
    let mut failed = Vec::new();
    for path in paths {
        if let Err(failure) = connection.delete_checkpoint(path).await {
            failed.push((path, failure));
        }
    }
    let n_deleted = (paths.len() - failed.len()) as u64;
    let text = format!("deleted {}", human::counted(n_deleted, "checkpoint"));
    let rows: Vec<_> = failed
        .iter()
        .map(|(path, failure)| json!({ "path": path, "error": failure.what() }))
        .collect();
    let output = Output::text(text, json!({ "deleted_count": n_deleted, "failed": rows }));
    if failed.is_empty() {
        return Ok(output);
    }
    // Both halves are reported: what was done as data, what was not as the failure.
    output.print(ctx.format).map_err(anyhow::Error::new)?;
    let lines: Vec<String> = failed
        .iter()
        .map(|(path, f)| format!("{path}: {}", f.what()))
        .collect();
    let what = format!(
        "{} could not be deleted: {}",
        human::counted(failed.len() as u64, "checkpoint"),
        lines.join("; ")
    );
    Err(Failure::new(common_kind(&failed, n_deleted), what)
        .hint("`tinker checkpoint list` shows what this server has"))
}

/// Of failures that are all alike, with nothing done beside them, their own.
fn common_kind(failed: &[(&TinkerPath, Failure)], n_deleted: u64) -> FailureKind {
    let mut kinds = failed.iter().map(|(_, failure)| failure.kind);
    match kinds.next() {
        Some(first) if n_deleted == 0 && kinds.all(|kind| kind == first) => first,
        _ => FailureKind::General,
    }
}

fn parse_kind(text: &str) -> std::result::Result<CheckpointKind, String> {
    CheckpointKind::from_segment(text)
        .ok_or_else(|| "there are weights, sampler_weights and external_weights".to_owned())
}
