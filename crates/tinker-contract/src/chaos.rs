//! A run under every fault at once, beside the same run left alone.
//!
//! [`program`] is what runs, as a process that can be killed; [`weather`] draws the faults between
//! it and the server; this file kills and restarts both and looks at what came of it.

pub mod program;
pub mod weather;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::faults::FaultServer;
use crate::target::{ServerProcess, checkpoint_tensors, tiny_model};
use program::Report;
use weather::{Draws, Wire};

/// The server is killed and restarted every so many steps.
const SERVER_EVERY: u32 = 50;
/// The client is killed with signal 9 and restarted every so many steps.
const CLIENT_EVERY: u32 = 70;
/// A run takes seconds; one that takes this long waits for something that never comes.
const PATIENCE: Duration = Duration::from_secs(300);

/// The programs that are killed: copies, so that no build replaces them during a long run.
#[derive(Debug, Clone)]
pub struct Programs {
    server: PathBuf,
    client: PathBuf,
    _dir: Arc<TempDir>,
}

impl Programs {
    /// Copies `contract-server` and `chaos-client`.
    ///
    /// # Panics
    /// If they cannot be copied.
    #[must_use]
    pub fn copy(server: &Path, client: &Path) -> Self {
        let dir = TempDir::new().expect("a temporary directory");
        let copy = |program: &Path| {
            let copy = dir.path().join(program.file_name().expect("a program"));
            std::fs::copy(program, &copy).expect("a copy of a program");
            copy
        };
        Self {
            server: copy(server),
            client: copy(client),
            _dir: Arc::new(dir),
        }
    }
}

/// What a run leaves.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// SHA-256 of every tensor file of the final checkpoints, in hexadecimal, by name.
    pub files: Vec<(String, String)>,
    /// What the program saw.
    pub report: Report,
}

/// A run, and what happened to it.
#[derive(Debug)]
pub struct Outcome {
    /// What it leaves.
    pub trace: Trace,
    /// What was seen between client and server.
    pub wire: Wire,
    /// How often the server was killed.
    pub n_server_kills: u32,
    /// How often the client was killed.
    pub n_client_kills: u32,
    /// How long it took.
    pub time: Duration,
}

/// Runs `n_steps` without any fault.
///
/// # Panics
/// If the run fails.
pub async fn undisturbed(programs: &Programs, n_steps: u32) -> Outcome {
    run(programs, n_steps, None).await
}

/// Runs `n_steps` with the faults and kills that follow from `seed`.
///
/// # Panics
/// If the run fails.
pub async fn disturbed(programs: &Programs, n_steps: u32, seed: u64) -> Outcome {
    run(programs, n_steps, Some(seed)).await
}

async fn run(programs: &Programs, n_steps: u32, seed: Option<u64>) -> Outcome {
    let begun = Instant::now();
    let mut run = Run::start(programs, n_steps, seed).await;
    let report = tokio::time::timeout(PATIENCE, run.run_to_the_end())
        .await
        .unwrap_or_else(|_| panic!("seed {seed:?}: the run hangs"));
    let files = report
        .checkpoints
        .iter()
        .flat_map(|path| checkpoint_tensors(run.home.path(), &path.parse().expect("a path")))
        .map(|(name, bytes)| (name, hex(&Sha256::digest(bytes))))
        .collect();
    let wire = run.wire.lock().unwrap_or_else(PoisonError::into_inner);
    Outcome {
        trace: Trace { files, report },
        wire: wire.clone(),
        n_server_kills: run.n_server_kills,
        n_client_kills: run.n_client_kills,
        time: begun.elapsed(),
    }
}

/// A run under way.
struct Run<'a> {
    programs: &'a Programs,
    n_steps: u32,
    home: TempDir,
    model: PathBuf,
    server: ServerProcess,
    proxy: FaultServer,
    wire: Arc<Mutex<Wire>>,
    /// When things are killed; nothing is if absent.
    draws: Option<Draws>,
    n_server_kills: u32,
    n_client_kills: u32,
}

impl<'a> Run<'a> {
    async fn start(programs: &'a Programs, n_steps: u32, seed: Option<u64>) -> Self {
        let home = TempDir::new().expect("a temporary directory");
        let model = tiny_model(&home.path().join("model"));
        let server = ServerProcess::start(&programs.server, home.path(), &model, 0, 1);
        let proxy = FaultServer::before(&server.base_url).await;
        let wire = weather::over(&proxy, seed);
        Self {
            programs,
            n_steps,
            home,
            model,
            server,
            proxy,
            wire,
            draws: seed.map(Draws::new),
            n_server_kills: 0,
            n_client_kills: 0,
        }
    }

    /// Starts the client again and again until it comes to its end.
    async fn run_to_the_end(&mut self) -> Report {
        loop {
            let (mut client, mut lines) = self.start_client();
            while let Some(line) = lines.next_line().await.expect("lines of text") {
                if let Some(report) = line.strip_prefix("done ") {
                    client.wait().await.expect("its end");
                    return serde_json::from_str(report).expect("a report");
                }
                let step = line
                    .strip_prefix("step ")
                    .and_then(|step| step.parse().ok());
                self.disturb(step.expect("a step"), &mut client).await;
            }
            let status = client.wait().await.expect("its end");
            // A death of its own is told on standard error, which is passed through.
            assert_eq!(status.code(), None, "the client gave up");
        }
    }

    fn start_client(&self) -> (Child, Lines<BufReader<ChildStdout>>) {
        let mut client = Command::new(&self.programs.client)
            .args([&self.proxy.base_url(), &self.server.api_key])
            .args([&self.model, &self.home.path().join("ledger.jsonl")])
            .arg(self.n_steps.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("a client");
        let stdout = client.stdout.take().expect("a pipe");
        (client, BufReader::new(stdout).lines())
    }

    /// Kills what is due once `n_done` steps are done.
    async fn disturb(&mut self, n_done: u32, client: &mut Child) {
        let Some(draws) = &mut self.draws else { return };
        // Anywhere within a few operations.
        let delay = Duration::from_micros(draws.below(10_000));
        if n_done >= (self.n_server_kills + 1) * SERVER_EVERY {
            tokio::time::sleep(delay).await;
            self.n_server_kills += 1;
            self.restart_server();
        } else if n_done >= (self.n_client_kills + 1) * CLIENT_EVERY {
            tokio::time::sleep(delay).await;
            self.n_client_kills += 1;
            client.kill().await.expect("a client that runs");
        }
    }

    fn restart_server(&mut self) {
        let port = self.server.port();
        self.server.kill();
        let start = || {
            ServerProcess::start(
                &self.programs.server,
                self.home.path(),
                &self.model,
                port,
                // Their number must not matter.
                2,
            )
        };
        self.server = tokio::task::block_in_place(start);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What of a disturbed run is not as it must be, for people; nothing if all is well.
#[must_use]
pub fn faults_of(disturbed: &Outcome, undisturbed: &Outcome) -> Vec<String> {
    let mut faults = Vec::new();
    let mut check = |is_well: bool, text: String| {
        if !is_well {
            faults.push(text);
        }
    };
    let (got, expected) = (&disturbed.trace, &undisturbed.trace);
    check(
        got.files == expected.files,
        format!("files {:?}, not {:?}", got.files, expected.files),
    );
    check(
        got.report.losses == expected.report.losses,
        "other losses".to_owned(),
    );
    check(
        got.report.samples == expected.report.samples,
        "other samples".to_owned(),
    );
    let wire = &disturbed.wire;
    check(
        wire.changed.is_empty(),
        format!("numbers sent with other bytes: {:?}", wire.changed),
    );
    let numbers = |wire: &Wire| -> BTreeMap<String, BTreeSet<u64>> { wire.numbers.clone() };
    check(
        numbers(wire) == numbers(&undisturbed.wire),
        "other numbers than undisturbed".to_owned(),
    );
    let lost: Vec<_> = wire
        .acknowledged_samples
        .difference(&wire.delivered_results)
        .collect();
    check(
        lost.is_empty(),
        format!("acknowledged samples lost: {lost:?}"),
    );
    faults
}
