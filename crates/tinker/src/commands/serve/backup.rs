//! `tinker serve backup`: a copy of the server's data from which a server starts.

use std::path::{Path, PathBuf};

use serde_json::json;
use tinker_server::Backup;

use crate::connect::Connection;
use crate::context::Ctx;
use crate::failure::{Failure, FailureKind, Result};
use crate::output::Output;
use crate::settings::Target;
use crate::{human, local};

/// Copy the data of the server on this machine to a new directory, while it runs or not
///
/// The copy has every checkpoint, every training run with its unfinished operations, and the key; not
/// the base models. A server starts from it with TINKER_HOME=DIR.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to put it: a directory that is not there yet, or is empty
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub(super) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    // Before anything is done.
    tinker_server::check_free(&args.dir)?;
    let backup = back_up(ctx, &args.dir).await?;
    for damage in &backup.damaged {
        ctx.ui.note(format_args!("copied as it was: {damage}"));
    }
    Ok(describe(&backup, &args.dir))
}

/// Copies the data directory, with an image that the server takes if one runs.
async fn back_up(ctx: &Ctx, dir: &Path) -> Result<Backup> {
    let home = &ctx.settings.home;
    if local::find(home)?.is_some() {
        let connection = Connection::open(ctx, Target::Embedded).await?;
        let image = connection.take_backup_image().await?;
        return Ok(tinker_server::place_backup(&image, dir)?);
    }
    tinker_server::back_up(home, dir).map_err(|error| match error {
        tinker_server::Error::AlreadyRunning { .. } => {
            let what = "a server is starting or leaving";
            Failure::new(FailureKind::Conflict, what).hint("try again in a moment")
        }
        error => error.into(),
    })
}

fn describe(backup: &Backup, dir: &Path) -> Output {
    let text = format!(
        "copied {} ({}) to {}; `TINKER_HOME={} tinker serve` starts from it",
        human::counted(backup.n_files, "file"),
        human::size(backup.n_bytes),
        dir.display(),
        dir.display()
    );
    let json = json!({
        "dir": dir,
        "files": backup.n_files,
        "size_bytes": backup.n_bytes,
        "damaged": backup.damaged,
    });
    Output::text(text, json)
}
