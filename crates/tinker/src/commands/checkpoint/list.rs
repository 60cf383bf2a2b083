//! `tinker checkpoint list`.

use tinker_types::Checkpoint;

use super::{created, expires, kind, public, size};
use crate::commands::paging;
use crate::connect::Connection;
use crate::context::Ctx;
use crate::failure::Result;
use crate::output::Output;

/// List checkpoints, newest first
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Show those of one run: its id or the beginning of it, @last, or the name of a run folder
    #[arg(long, visible_alias = "run", value_name = "RUN")]
    run_id: Option<String>,
    #[command(flatten)]
    page: paging::Flags,
}

pub(super) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    let connection = Connection::open(ctx, ctx.settings.target(None)?).await?;
    let limit = args.page.limit();
    let checkpoints = match &args.run_id {
        Some(run) => {
            let run = connection.find_run(ctx, run).await?;
            let mut checkpoints = connection.list_checkpoints(&run.training_run_id).await?;
            let limit = limit.and_then(|limit| usize::try_from(limit).ok());
            checkpoints.truncate(limit.unwrap_or(usize::MAX));
            checkpoints
        }
        None => connection.list_all_checkpoints(limit).await?,
    };
    let header = [
        "Checkpoint ID",
        "Type",
        "Size",
        "Public",
        "Created",
        "Expires",
        "Path",
    ];
    let row = |checkpoint: &Checkpoint| {
        vec![
            checkpoint.checkpoint_id.to_string(),
            kind(checkpoint).to_owned(),
            size(checkpoint),
            public(checkpoint),
            created(checkpoint),
            expires(checkpoint),
            checkpoint.tinker_path.to_string(),
        ]
    };
    let list = Output::list("checkpoints", &checkpoints, &header, row)?;
    Ok(list.or_note("no checkpoints yet; `tinker train sft DATA` makes some"))
}
