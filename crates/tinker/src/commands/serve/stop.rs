//! `tinker serve stop`: asks the server to finish its operation and leave.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use tinker_server::LockInfo;

use crate::context::Ctx;
use crate::failure::{Failure, FailureKind, Result};
use crate::output::Output;

/// How long the operation that runs may take to finish.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How long a server that starts may take to say which process it is.
const SIGN_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_EVERY: Duration = Duration::from_millis(20);

/// Stop the server on this machine
///
/// The operation that runs is finished first. Nothing is lost: training goes on where it was when
/// a command next needs the server.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(super) async fn run(ctx: &Ctx) -> Result<Output> {
    let home = &ctx.settings.home;
    let Some(server) = holder(home).await? else {
        return Ok(Output::text(
            "no server runs on this machine",
            json!({ "stopped": false }),
        ));
    };
    terminate(server.pid)?;
    wait_until_left(home, server.pid).await?;
    Ok(Output::text(
        format!("stopped the server (process {})", server.pid),
        json!({ "stopped": true, "pid": server.pid }),
    ))
}

/// The server that holds the data directory.
///
/// It puts up its sign some time after it takes the lock, and takes an old sign down at once: a
/// sign that is there at two looks while the lock is held is its own.
///
/// # Errors
/// It did not say who it is.
async fn holder(home: &Path) -> Result<Option<LockInfo>> {
    let deadline = Instant::now() + SIGN_TIMEOUT;
    let mut last = None;
    while tinker_server::is_running(home)? {
        let sign = tinker_server::read_lock(home)?;
        if sign.is_some() && sign == last {
            return Ok(sign);
        }
        last = sign;
        if Instant::now() > deadline {
            let what = "a server is starting and has not said yet which process it is";
            return Err(Failure::new(FailureKind::Conflict, what).hint("try again in a moment"));
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
    Ok(None)
}

#[cfg(unix)]
fn terminate(pid: u32) -> Result<()> {
    use rustix::process::{Pid, Signal, kill_process};
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let Some(process) = process else {
        return Err(Failure::new(
            FailureKind::General,
            format!("process id {pid} of the server is not usable"),
        ));
    };
    kill_process(process, Signal::TERM).map_err(|error| {
        let what = format!("cannot stop process {pid}: {error}");
        Failure::new(FailureKind::General, what)
    })
}

#[cfg(not(unix))]
fn terminate(pid: u32) -> Result<()> {
    Err(Failure::new(
        FailureKind::Unsupported,
        format!("cannot stop process {pid} on this system"),
    )
    .hint("end it with the system's own task manager"))
}

async fn wait_until_left(home: &Path, pid: u32) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while tinker_server::is_running(home)? {
        if Instant::now() > deadline {
            let what = format!(
                "process {pid} has not left after {} seconds",
                TIMEOUT.as_secs()
            );
            return Err(Failure::new(FailureKind::General, what).hint(
                "it may be finishing a long operation; look into its log, or end it by force",
            ));
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
    Ok(())
}
