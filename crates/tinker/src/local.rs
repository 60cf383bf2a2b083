//! The embedded server: found by its sign in the data directory, or started detached.

use std::ffi::{OsStr, OsString};
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
    let server = find_or_start(home, None, ui).await?;
    if server.version != env!("CARGO_PKG_VERSION") {
        ui.note(format_args!(
            "the embedded server that runs is version {}, this is {}: `tinker serve stop` lets the next command start a new one",
            server.version,
            env!("CARGO_PKG_VERSION"),
        ));
    }
    Ok(server)
}

/// The server of `home`; if none runs, one is started, in the place of `earlier` if that was there.
///
/// # Errors
/// As [`ensure`].
pub(crate) async fn find_or_start(
    home: &Path,
    earlier: Option<&LockInfo>,
    ui: &Ui,
) -> Result<LockInfo> {
    if let Some(server) = find(home)? {
        return Ok(server);
    }
    let mut child = None;
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        // One that is starting or leaving holds the lock: it comes up, or makes room.
        if !tinker_server::is_running(home)? {
            child = match child {
                Some(started) => still_starting(started, home)?,
                None => Some(start(home, earlier)?),
            };
        } else if let Some(server) = tinker_server::read_lock(home)?.filter(answers) {
            if child.is_some() {
                let log = log_path(home);
                ui.note(format_args!(
                    "started the embedded server{} (log: {})",
                    earlier.map_or("", |_| " again"),
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

/// Starts `tinker serve` in a process group of its own, so that Ctrl-C here does not reach it: on
/// any port, or in the place of `earlier`, with what that one was told.
///
/// # Errors
/// It cannot be started; or the earlier one, or one that died here, was open to other machines.
pub(crate) fn start(home: &Path, earlier: Option<&LockInfo>) -> Result<Child> {
    refuse_to_replace(earlier)?;
    // A sign that cannot be read says nothing of other machines, and the next server replaces it.
    refuse_to_replace(tinker_server::read_lock(home).ok().flatten().as_ref())?;
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let mut command = Command::new(&program);
    command
        .args(["serve", "--detached", "--idle-timeout", IDLE_TIMEOUT])
        .env(env::TINKER_HOME.name, home)
        .current_dir(home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(open_log(home)?);
    // A key for the hosted service is not to become the key of this server.
    for variable in env::FOR_THE_SERVICE {
        command.env_remove(variable.name);
    }
    match earlier {
        None => _ = command.args(["--port", "0"]),
        Some(earlier) => replace(&mut command, earlier),
    }
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    Ok(child)
}

/// Makes `command` start a server like `earlier`: its address, its token, its models, its threads, its limit.
fn replace(command: &mut Command, earlier: &LockInfo) {
    command
        .args(arguments(earlier))
        // The environment is for this user alone; arguments are for everybody to read.
        .env(env::TINKER_API_KEY.name, &earlier.token);
}

/// What `earlier` was told, for `tinker serve`.
fn arguments(earlier: &LockInfo) -> Vec<OsString> {
    let (addr, tls) = match &earlier.outside {
        Some(outside) => (outside.addr, outside.tls.as_ref()),
        None => (SocketAddr::new(earlier.host, earlier.port), None),
    };
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |flag: &str, value: OsString| arguments.extend([flag.into(), value]);
    add("--port", addr.port().to_string().into());
    add("--host", addr.ip().to_string().into());
    if let Some(files) = tls {
        add("--tls-cert", files.cert.clone().into());
        add("--tls-key", files.key.clone().into());
    }
    add("--threads", earlier.threads.to_string().into());
    if let Some(limit) = earlier.max_disk_bytes {
        add("--max-disk", limit.to_string().into());
    }
    if let Some(weights) = &earlier.weights {
        add("--weights", weights.into());
    }
    if let Some(device) = &earlier.device {
        add("--device", device.into());
    }
    add("--precision", earlier.precision.clone().into());
    if let Some(bytes) = earlier.training_memory {
        add("--training-memory", bytes.to_string().into());
    }
    for model in &earlier.models {
        add("--model", model.clone().into());
    }
    for (name, dir) in &earlier.named_models {
        let mut model = OsString::from(format!("{name}="));
        model.push(dir);
        add("--model", model);
    }
    arguments
}

/// Refuses to put a server of this machine alone in the place of one that others use: it would hold
/// the data directory, and theirs could not come back.
fn refuse_to_replace(earlier: Option<&LockInfo>) -> Result<()> {
    let Some((earlier, outside)) = earlier.and_then(|e| Some((e, e.outside.as_ref()?))) else {
        return Ok(());
    };
    let what = format!(
        "the server of this data directory has ended; it was open to other machines at {} and is not started again by itself",
        outside.addr
    );
    let words = arguments(earlier);
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    Err(Failure::new(FailureKind::Conflict, what).hint(format!(
        "start it again with `tinker serve {}`, or one for this machine alone with `tinker serve`",
        words.join(" ")
    )))
}

/// A word for a shell.
fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let is_plain = |c: char| c.is_alphanumeric() || "-_./:,".contains(c);
    if word.chars().all(is_plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
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

/// What a server is for those whose key it does not know.
pub(crate) fn another_key(server: &LockInfo) -> Failure {
    let what = format!(
        "the embedded server is another one now, at {} and with another key",
        server.base_url()
    );
    Failure::new(FailureKind::General, what)
}

fn not_answering(home: &Path) -> Failure {
    let what = format!(
        "the embedded server did not answer within {} seconds",
        START_TIMEOUT.as_secs()
    );
    with_log(Failure::new(FailureKind::Capacity, what), home)
}

pub(crate) fn with_log(failure: Failure, home: &Path) -> Failure {
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
pub(crate) fn answers(server: &LockInfo) -> bool {
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

#[cfg(test)]
mod tests {
    use tinker_server::{Outside, TlsFiles};

    use super::*;

    fn earlier() -> LockInfo {
        LockInfo {
            pid: 1,
            host: IpAddr::from([127, 0, 0, 1]),
            port: 4321,
            token: "tml-x".into(),
            version: "0".into(),
            started: "now".into(),
            models: vec!["/models/a".into()],
            named_models: [("b/c".to_owned(), "/models/b".into())].into(),
            training_memory: Some(1 << 30),
            weights: Some("nf4".into()),
            device: Some("cpu".into()),
            precision: "bf16".into(),
            threads: 3,
            max_disk_bytes: Some(5 << 30),
            outside: None,
        }
    }

    #[test]
    fn a_server_that_other_machines_use_is_not_replaced_and_its_command_is_said() {
        let home = tempfile::tempdir().unwrap();
        let files = TlsFiles {
            cert: "/etc/a b.pem".into(),
            key: "/etc/key.pem".into(),
        };
        let outside = Outside {
            addr: SocketAddr::from(([0, 0, 0, 0], 443)),
            tls: Some(files),
        };
        let of_others = LockInfo {
            outside: Some(outside),
            ..earlier()
        };
        let dir = tinker_server::create_server_dir(home.path()).unwrap();
        let sign = serde_json::to_vec(&of_others).unwrap();
        std::fs::write(dir.join("server.json"), sign).unwrap();

        for known in [None, Some(&of_others)] {
            let failure = start(home.path(), known).unwrap_err();

            let text = format!("{failure:?}");
            assert!(
                text.contains("open to other machines at 0.0.0.0:443"),
                "{text}"
            );
            let command = "tinker serve --port 443 --host 0.0.0.0 --tls-cert '/etc/a b.pem' --tls-key /etc/key.pem --threads 3";
            assert!(text.contains(command), "{text}");
            assert!(!text.contains("tml-x"), "{text}");
        }
    }

    #[test]
    fn a_server_that_is_started_again_is_told_what_the_earlier_one_was() {
        let mut command = Command::new("tinker");

        replace(&mut command, &earlier());

        let arguments: Vec<&str> = command.get_args().filter_map(|a| a.to_str()).collect();
        for wanted in [
            ["--port", "4321"],
            ["--threads", "3"],
            ["--max-disk", "5368709120"],
            ["--training-memory", "1073741824"],
            ["--weights", "nf4"],
            ["--device", "cpu"],
            ["--precision", "bf16"],
            ["--model", "/models/a"],
            ["--model", "b/c=/models/b"],
        ] {
            assert!(
                arguments.windows(2).any(|pair| pair == wanted),
                "{wanted:?}"
            );
        }
        assert!(!arguments.contains(&"tml-x"));
    }
}
