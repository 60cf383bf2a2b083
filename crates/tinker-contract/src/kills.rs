//! A server that is killed with signal 9 again and again under the load of several runs.
//!
//! `load` is what the clients do, `record` what the server promised them, `files` what is on
//! its disk; this file kills, restarts and compares with the same load on a server left alone.

mod files;
mod load;
mod record;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::chaos::weather::Draws;
use crate::faults::FaultServer;
use crate::target::{ServerProcess, checkpoint_tensors, service, tiny_model};
use load::{Leaves, N_AHEAD};
use record::Record;

/// Runs that train at once, each with a session of its own.
const N_RUNS: u32 = 3;
/// A load takes seconds; one that takes this long waits for something that never comes.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a load leaves.
#[derive(Debug, PartialEq)]
struct Trace {
    leaves: Vec<Leaves>,
    /// Run, checkpoint and file, with the SHA-256 of the file.
    files: Vec<(String, String)>,
}

/// A load, and what happened to its server.
#[derive(Debug)]
pub struct Outcome {
    trace: Trace,
    /// What is wrong whatever the trace is compared with, for people.
    faults: Vec<String>,
    /// How often the server was killed while it served.
    pub n_kills: u32,
    /// How often it was killed while it started.
    pub n_kills_in_startup: u32,
    /// Operations that were acknowledged.
    pub n_acknowledged: usize,
    /// Files of weights that are compared.
    pub n_files: usize,
    /// The longest that the server took to listen after a kill.
    pub slowest_start: Duration,
    /// How long the load took.
    pub time: Duration,
}

/// Loads the server at `program` with runs of `n_steps` and leaves it alone.
///
/// # Panics
/// If an operation fails.
pub async fn undisturbed(program: &Path, n_steps: u32) -> Outcome {
    Load::start(program, n_steps).await.finish(None).await
}

/// Loads the server at `program` with runs of `n_steps` and kills it at most `n_kills` times, at
/// moments that follow from `seed`.
///
/// # Panics
/// If an operation fails, or the server does not come up again.
pub async fn disturbed(program: &Path, n_steps: u32, seed: u64, n_kills: u32) -> Outcome {
    let load = Load::start(program, n_steps).await;
    load.finish(Some((Draws::new(seed), n_kills))).await
}

/// What of a disturbed load is not as it must be, for people; nothing if all is well.
#[must_use]
pub fn faults_of(disturbed: &Outcome, undisturbed: &Outcome) -> Vec<String> {
    let mut faults = [disturbed.faults.clone(), undisturbed.faults.clone()].concat();
    let (got, expected) = (&disturbed.trace, &undisturbed.trace);
    if got.files != expected.files {
        let other = got
            .files
            .iter()
            .filter(|file| !expected.files.contains(file));
        faults.push(format!("other files: {:?}", other.collect::<Vec<_>>()));
    }
    for (number, (got, expected)) in got.leaves.iter().zip(&expected.leaves).enumerate() {
        if got.losses != expected.losses {
            faults.push(format!("other losses of run {number}"));
        }
        if got.samples != expected.samples {
            faults.push(format!("other samples of run {number}"));
        }
    }
    faults
}

/// A load under way.
struct Load<'a> {
    program: &'a Path,
    home: TempDir,
    model: PathBuf,
    server: ServerProcess,
    /// Ends when dropped.
    _proxy: FaultServer,
    record: Arc<Mutex<Record>>,
    runs: Vec<JoinHandle<Leaves>>,
    /// Steps that each run has done.
    n_done: Vec<Arc<AtomicU32>>,
    faults: Vec<String>,
    n_kills: u32,
    n_kills_in_startup: u32,
    slowest_start: Duration,
}

impl<'a> Load<'a> {
    async fn start(program: &'a Path, n_steps: u32) -> Self {
        let home = TempDir::new().expect("a temporary directory");
        let model = tiny_model(&home.path().join("model"));
        let server = ServerProcess::start(program, home.path(), &model, 0, 1);
        let proxy = FaultServer::before(&server.base_url).await;
        let record = record::keep(&proxy);
        let n_done: Vec<Arc<AtomicU32>> = (0..N_RUNS).map(|_| Arc::default()).collect();
        let runs = (0..).zip(&n_done).map(|(number, n_done)| {
            let service = service(&proxy.base_url(), &server.api_key);
            let base_model = model.display().to_string();
            let run = load::run(service, base_model, number, n_steps, Arc::clone(n_done));
            tokio::spawn(run)
        });
        Self {
            runs: runs.collect(),
            program,
            home,
            model,
            server,
            _proxy: proxy,
            record,
            n_done,
            faults: Vec::new(),
            n_kills: 0,
            n_kills_in_startup: 0,
            slowest_start: Duration::ZERO,
        }
    }

    async fn finish(mut self, kills: Option<(Draws, u32)>) -> Outcome {
        let begun = Instant::now();
        if let Some((draws, n_kills)) = kills {
            self.kill_to_the_end(draws, n_kills).await;
        }
        let mut leaves = Vec::new();
        for run in std::mem::take(&mut self.runs) {
            let run = tokio::time::timeout(PATIENCE, run).await;
            leaves.push(run.expect("the load hangs").expect("a run to its end"));
        }
        self.note_broken_promises().await;
        self.faults.extend(files::broken_weights(self.home.path()));
        let files = self.files(&leaves);
        Outcome {
            n_files: files.len(),
            trace: Trace { leaves, files },
            n_kills: self.n_kills,
            n_kills_in_startup: self.n_kills_in_startup,
            n_acknowledged: record::lock(&self.record).acknowledged.len(),
            slowest_start: self.slowest_start,
            time: begun.elapsed(),
            faults: self.faults,
        }
    }

    /// Kills the server until it was killed often enough, or the runs are over.
    async fn kill_to_the_end(&mut self, mut draws: Draws, n_kills: u32) {
        while self.n_kills + self.n_kills_in_startup < n_kills {
            self.reach(self.goals(1 + draws.below(5) as u32)).await;
            if self.runs.iter().any(JoinHandle::is_finished) {
                return;
            }
            // Anywhere within a few operations.
            tokio::time::sleep(Duration::from_micros(draws.below(20_000))).await;
            self.kill();
            if draws.below(4) == 0 && self.n_kills + self.n_kills_in_startup < n_kills {
                let after = Duration::from_micros(draws.below(40_000));
                self.kill_in_startup(after).await;
            }
            self.restart();
        }
    }

    /// Waits until every run has done so many steps, or one is over.
    async fn reach(&self, goals: Vec<u32>) {
        let is_there = || {
            let mut runs = self.n_done.iter().zip(&goals);
            runs.all(|(n_done, goal)| n_done.load(Ordering::SeqCst) >= *goal)
        };
        let begun = Instant::now();
        while !is_there() && !self.runs.iter().any(JoinHandle::is_finished) {
            assert!(begun.elapsed() < PATIENCE, "the load hangs");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Steps that each run is to have done before the next kill. An operation that was running at
    /// several kills in a row would be given up: all that were running at the last one are over when
    /// every run is so much farther than what it has submitted ahead.
    fn goals(&self, n_more: u32) -> Vec<u32> {
        let done = self.n_done.iter().map(|n| n.load(Ordering::SeqCst));
        done.map(|n| n + N_AHEAD as u32 + n_more).collect()
    }

    fn kill(&mut self) {
        self.server.kill();
        self.n_kills += 1;
        self.note_broken_files();
    }

    async fn kill_in_startup(&mut self, after: Duration) {
        ServerProcess::start_and_kill(self.program, self.home.path(), &self.model, after).await;
        self.n_kills_in_startup += 1;
        self.note_broken_files();
    }

    fn restart(&mut self) {
        let begun = Instant::now();
        let port = self.server.port();
        // Another number of threads than before: it must not matter.
        let start = || ServerProcess::start(self.program, self.home.path(), &self.model, port, 2);
        self.server = tokio::task::block_in_place(start);
        self.slowest_start = self.slowest_start.max(begun.elapsed());
    }

    fn note_broken_files(&mut self) {
        let kill = self.n_kills + self.n_kills_in_startup;
        let broken = files::broken_weights(self.home.path());
        let told = broken
            .into_iter()
            .map(|text| format!("after kill {kill}: {text}"));
        self.faults.extend(told);
    }

    /// The record of an answer is made just after its last byte, which the client may have acted on.
    async fn note_broken_promises(&mut self) {
        let begun = Instant::now();
        let mut owed = record::lock(&self.record).owed();
        while !owed.is_empty() && begun.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(5)).await;
            owed = record::lock(&self.record).owed();
        }
        if !owed.is_empty() {
            self.faults
                .push(format!("acknowledged and never answered: {owed:?}"));
        }
        let refused = &record::lock(&self.record).refused;
        if !refused.is_empty() {
            self.faults.push(format!("results refused: {refused:?}"));
        }
    }

    /// The files of everything that the runs saved, by run and checkpoint.
    fn files(&self, leaves: &[Leaves]) -> Vec<(String, String)> {
        let saved = (0_u32..)
            .zip(leaves)
            .flat_map(|(number, leaves)| leaves.checkpoints.iter().map(move |path| (number, path)));
        let mut files = Vec::new();
        for (number, path) in saved {
            for (name, bytes) in checkpoint_tensors(self.home.path(), path) {
                let name = format!("run {number}, {}, {name}", path.checkpoint.name());
                files.push((name, files::sha256(&bytes)));
            }
        }
        files
    }
}
