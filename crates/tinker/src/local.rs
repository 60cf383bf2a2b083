//! The embedded server: found by its sign in the data directory, or started detached.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tinker_server::LockInfo;

use crate::env;
use crate::failure::{Failure, FailureKind, Result};
use crate::ui::Ui;

/// How long a started server may take to answer; reading a large model takes seconds.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often it is looked for meanwhile.
const POLL_EVERY: Duration = Duration::from_millis(20);
/// How long one look may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// A server that a command started leaves after this long without work.
const IDLE_TIMEOUT: &str = "15m";
/// A log that has grown beyond this is put aside when the next server starts.
const MAX_LOG_BYTES: u64 = 16 << 20;
/// How often a server that keeps dying is started again within one command.
const MAX_RESTARTS: u32 = 5;
/// A server that was started again and answers after this long has stayed: one that dies of the
/// work it finds is gone by then.
const STAYS_AFTER: Duration = Duration::from_secs(1);
/// How many lines of the log a failure to start shows.
const N_LOG_LINES: usize = 12;

/// Where the server of `home` writes its log when it is started detached.
pub(crate) fn log_path(home: &Path) -> PathBuf {
    tinker_server::server_dir(home).join("server.log")
}

/// The server that runs on `home` and answers, if there is one.
///
/// # Errors
/// The data directory cannot be read.
pub(crate) fn find(home: &Path) -> Result<Option<LockInfo>> {
    if !tinker_server::is_running(home)? {
        return Ok(None);
    }
    Ok(tinker_server::read_lock(home)?.filter(answers))
}

/// The server of `home`, started if none runs, and said so.
///
/// # Errors
/// It cannot be started, or does not answer in time; the failure shows the end of its log.
pub(crate) async fn ensure(home: &Path, ui: &Ui) -> Result<LockInfo> {
    if let Some(server) = find(home)? {
        if server.version != env!("CARGO_PKG_VERSION") {
            ui.note(format_args!(
                "the embedded server that runs is version {}, this is {}: `tinker serve stop` lets the next command start a new one",
                server.version,
                env!("CARGO_PKG_VERSION"),
            ));
        }
        return Ok(server);
    }
    let mut child = None;
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        // One that is starting or leaving holds the lock: it comes up, or makes room.
        if !tinker_server::is_running(home)? {
            child = match child {
                Some(started) => still_starting(started, home)?,
                None => Some(start(home, 0, None)?),
            };
        } else if let Some(server) = tinker_server::read_lock(home)?.filter(answers) {
            if child.is_some() {
                let log = log_path(home);
                ui.note(format_args!(
                    "started the embedded server (log: {})",
                    log.display()
                ));
            }
            return Ok(server);
        }
        if Instant::now() > deadline {
            return Err(not_answering(home));
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
}

/// Keeps the embedded server there while a long command needs it.
///
/// A server that died is started again on its old port, with its old token: to the client it looks
/// like an outage, which its retries bridge. One that was told to leave is let go.
#[derive(Debug)]
pub(crate) struct Keeper {
    home: PathBuf,
    server: LockInfo,
    ui: Ui,
    child: Option<Child>,
    /// Starts since it last stayed.
    n_starts: u32,
    started: Instant,
}

impl Keeper {
    /// A keeper of `server`, the embedded server of `home`.
    pub(crate) fn new(home: &Path, server: &LockInfo, ui: &Ui) -> Self {
        Self {
            home: home.to_owned(),
            server: server.clone(),
            ui: ui.clone(),
            child: None,
            n_starts: 0,
            started: Instant::now(),
        }
    }

    /// Starts the server again if it died. Does not wait for it.
    ///
    /// # Errors
    /// It was told to leave, another one took its place, or it was started a few times and did not
    /// stay.
    pub(crate) fn look(&mut self) -> Result<()> {
        if tinker_server::is_running(&self.home)? {
            return self.look_at_sign();
        }
        let was_told_to_leave = match &mut self.child {
            Some(child) => match child.try_wait() {
                Ok(None) => return Ok(()),
                Ok(Some(status)) => status.success(),
                Err(_) => false,
            },
            // A server that leaves takes its sign down; one that dies cannot.
            None => tinker_server::read_lock(&self.home)?.is_none(),
        };
        if was_told_to_leave {
            let what = "the embedded server was stopped while it was needed";
            return Err(Failure::new(FailureKind::General, what));
        }
        self.start_again()
    }

    /// Looks whether the server that runs is the one that is needed, and has stayed.
    fn look_at_sign(&mut self) -> Result<()> {
        // One that starts has not put up its sign yet.
        let Some(sign) = tinker_server::read_lock(&self.home)? else {
            return Ok(());
        };
        if (sign.port, &sign.token) != (self.server.port, &self.server.token) {
            let what = format!(
                "the embedded server is another one now, at {} and no longer at {}",
                sign.base_url(),
                self.server.base_url()
            );
            return Err(Failure::new(FailureKind::General, what));
        }
        if self.n_starts > 0 && self.started.elapsed() > STAYS_AFTER && answers(&sign) {
            self.n_starts = 0;
        }
        Ok(())
    }

    fn start_again(&mut self) -> Result<()> {
        if self.n_starts == MAX_RESTARTS {
            let what = format!("the embedded server ended {MAX_RESTARTS} times in a row");
            return Err(with_log(
                Failure::new(FailureKind::General, what),
                &self.home,
            ));
        }
        self.n_starts += 1;
        self.ui
            .warn("the embedded server has ended; starting it again, nothing is lost");
        self.started = Instant::now();
        let (port, token) = (self.server.port, Some(self.server.token.as_str()));
        self.child = Some(start(&self.home, port, token)?);
        Ok(())
    }
}

/// Starts `tinker serve` in a process group of its own, so that Ctrl-C here does not reach it. It
/// asks for `token`, or else for that of the data directory.
fn start(home: &Path, port: u16, token: Option<&str>) -> Result<Child> {
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let log = open_log(home)?;
    let mut command = Command::new(&program);
    command
        .args([
            "serve",
            "--detached",
            "--idle-timeout",
            IDLE_TIMEOUT,
            "--port",
        ])
        .arg(port.to_string())
        .env(env::TINKER_HOME.name, home)
        // A key for the hosted service is not to become the key of this server.
        .env_remove(env::TINKER_API_KEY.name)
        .env_remove(env::TINKER_BASE_URL.name)
        .current_dir(home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    if let Some(token) = token {
        // The environment is for this user alone; arguments are for everybody to read.
        command.env(env::TINKER_API_KEY.name, token);
    }
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    Ok(child)
}

fn open_log(home: &Path) -> Result<File> {
    let path = log_path(home);
    let cannot_write = |error: std::io::Error| {
        Failure::from(anyhow::Error::new(error).context(format!("cannot write {}", path.display())))
            .hint("make the data directory writable, or choose another with TINKER_HOME")
    };
    tinker_server::create_server_dir(home)?;
    if path.metadata().is_ok_and(|log| log.len() > MAX_LOG_BYTES) {
        std::fs::rename(&path, path.with_extension("log.old")).map_err(cannot_write)?;
    }
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(&path).map_err(cannot_write)
}

/// The child while it has not ended; none if it made way for another server.
///
/// # Errors
/// It ended for another reason.
fn still_starting(mut child: Child, home: &Path) -> Result<Option<Child>> {
    let made_way = Some(i32::from(FailureKind::Conflict.code()));
    match child
        .try_wait()
        .context("cannot ask after the embedded server")?
    {
        None => Ok(Some(child)),
        // Looking whether a server runs takes the lock for a moment, in which none can start.
        Some(status) if status.code() == made_way => Ok(None),
        Some(status) => {
            let what = format!("the embedded server ended at its start ({status})");
            Err(with_log(Failure::new(FailureKind::General, what), home))
        }
    }
}

fn not_answering(home: &Path) -> Failure {
    let what = format!(
        "the embedded server did not answer within {} seconds",
        START_TIMEOUT.as_secs()
    );
    with_log(Failure::new(FailureKind::Capacity, what), home)
}

fn with_log(failure: Failure, home: &Path) -> Failure {
    let path = log_path(home);
    let log = std::fs::read_to_string(&path).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    let tail = &lines[lines.len().saturating_sub(N_LOG_LINES)..];
    failure.hint(format!(
        "the end of its log, {}:\n  {}",
        path.display(),
        tail.join("\n  ")
    ))
}

/// Whether the server behind the sign answers.
fn answers(server: &LockInfo) -> bool {
    probe(server).is_ok_and(|status| status.starts_with("HTTP/1.1 200"))
}

/// The status line of the health check, asked for without a runtime, and without the token: the
/// sign may be that of a server long gone, and a stranger at its port now.
fn probe(server: &LockInfo) -> std::io::Result<String> {
    let addr = SocketAddr::new(reachable(server.host), server.port);
    let mut stream = TcpStream::connect_timeout(&addr, PROBE_TIMEOUT)?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
    write!(
        stream,
        "GET /api/v1/healthz HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.take(64 << 10).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

/// A server bound to every address is reached on loopback.
fn reachable(host: IpAddr) -> IpAddr {
    match host {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
        other => other,
    }
}
