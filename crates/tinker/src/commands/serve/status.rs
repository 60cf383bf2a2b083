//! `tinker serve status`: whether the embedded server runs, and where.

use jiff::Timestamp;
use serde_json::json;
use tinker_server::{ApiToken, LockInfo};

use crate::context::Ctx;
use crate::failure::{Failure, Result};
use crate::output::Output;
use crate::{human, local};

/// Show whether the server on this machine runs, and where
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print the two lines that point a Tinker client at it
    #[arg(long)]
    export: bool,
}

pub(super) fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    match local::find(&ctx.settings.home)? {
        Some(server) if args.export => {
            let key = ApiToken::new(&server.token)?;
            Ok(super::foreground::exports(&server.base_url(), &key))
        }
        Some(server) => Ok(describe(ctx, &server)),
        None if args.export => Err(Failure::not_found("no server runs on this machine")
            .hint("start one with `tinker serve`")),
        None => Ok(Output::text(
            "no server runs on this machine; commands start one when they need it",
            json!({ "running": false, "home": ctx.settings.home }),
        )),
    }
}

fn describe(ctx: &Ctx, server: &LockInfo) -> Output {
    let log = local::log_path(&ctx.settings.home);
    let rows = [
        ("Address", server.base_url()),
        ("Process", server.pid.to_string()),
        ("Version", server.version.clone()),
        ("Started", human::age(&server.started, Timestamp::now())),
        ("Data", ctx.settings.home.display().to_string()),
        ("Log", log.display().to_string()),
    ];
    let json = json!({
        "running": true,
        "base_url": server.base_url(),
        "pid": server.pid,
        "version": server.version,
        "started": server.started,
        "home": ctx.settings.home,
        "log": log,
    });
    let rows = rows.map(|(key, value)| (key.to_owned(), value));
    Output::properties(rows.into(), json)
}
