//! Runs that go on after a server lost what they had on it, or went back to an older state.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tinker_api::{
    AdamParams, Error, LedgerError, LoraConfig, LossFn, Recovery, RecoveryEvent, RecoveryPolicy,
    Result, SaveOptions, ServiceClient, Start, TinkerPath, TrainingClient,
};
use tinker_contract::chaos::program;
use tinker_contract::suite::batch;
use tinker_contract::target::{ServerProcess, checkpoint_tensors, tiny_model};

const N_STEPS: u32 = 6;
/// A run takes seconds; one that takes this long waits for something that never comes.
const PATIENCE: Duration = Duration::from_secs(120);

async fn within_patience<T>(run: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, run)
        .await
        .expect("the run hangs")
}

/// A server in a data directory, to be killed and started again.
struct Server {
    home: PathBuf,
    model: PathBuf,
    process: ServerProcess,
}

impl Server {
    fn start(home: &Path) -> Self {
        let model = tiny_model(&home.join("model"));
        let process = ServerProcess::start(&program(), home, &model, 0, 1);
        Self {
            home: home.to_owned(),
            model,
            process,
        }
    }

    /// Kills it, does something to its files and starts it again.
    fn restart_after(&mut self, change: impl FnOnce(&Path)) {
        let port = self.process.port();
        self.process.kill();
        change(&self.home.join("server"));
        self.process = ServerProcess::start(&program(), &self.home, &self.model, port, 1);
    }

    fn service(&self, ledger: &Path) -> ServiceClient {
        program::service(&self.process.base_url, &self.process.api_key, ledger)
    }

    fn tensors(&self, path: &TinkerPath) -> Vec<(String, Vec<u8>)> {
        checkpoint_tensors(&self.home, path)
    }
}

fn program() -> PathBuf {
    env!("CARGO_BIN_EXE_contract-server").into()
}

async fn begin(service: ServiceClient, model: PathBuf) -> Result<TrainingClient> {
    let lora = LoraConfig {
        rank: 4,
        seed: Some(7),
        ..LoraConfig::default()
    };
    service
        .create_lora_training_client(model.display().to_string(), lora)
        .await
}

async fn step(trainer: &TrainingClient, i: u32) -> Result<()> {
    let pass = trainer.forward_backward(batch(i), LossFn::CrossEntropy);
    let adam = AdamParams {
        learning_rate: 2e-3,
        ..AdamParams::default()
    };
    let step = trainer.optim_step(adam);
    pass.await?;
    step.await.map(drop)
}

async fn save(trainer: &TrainingClient, name: &str) -> Result<TinkerPath> {
    trainer.save_state(name, SaveOptions::default()).await
}

/// Saves after step 2 what a restart goes on from.
async fn train(start: Start) -> Result<TinkerPath> {
    let first = if start.checkpoint.is_some() { 3 } else { 0 };
    for i in first..N_STEPS {
        step(&start.trainer, i).await?;
        if i == 2 {
            save(&start.trainer, "after-2").await?;
        }
    }
    save(&start.trainer, "final").await
}

/// The files of a server as they were.
type Backup = BTreeMap<PathBuf, Vec<u8>>;

fn put_back(server: &Path, backup: &Backup) {
    fs::remove_dir_all(server).unwrap();
    for (path, bytes) in backup {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn files_below(dir: &Path) -> Backup {
    let mut files = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                let bytes = fs::read(&path).unwrap();
                files.insert(path, bytes);
            }
        }
    }
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_whose_server_was_put_back_goes_on_from_its_checkpoint_with_the_same_bytes() {
    let (quiet, noisy) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let server = Server::start(quiet.path());
    let service = server.service(&quiet.path().join("ledger"));
    let trainer = begin(service.clone(), server.model.clone());
    let trainer = within_patience(trainer).await.unwrap();
    let start = Start {
        service,
        trainer,
        checkpoint: None,
    };
    let path = within_patience(train(start)).await.unwrap();
    let undisturbed = server.tensors(&path);
    let ledger = noisy.path().join("ledger");
    let mut server = Server::start(noisy.path());
    let backup = within_patience(killed_after_a_backup(&mut server, &ledger)).await;
    server.restart_after(|dir| put_back(dir, &backup));

    let mut finished = Vec::new();
    for _ in 0..2 {
        let (path, restarts) = recovered(&server, &ledger).await;
        assert_eq!(restarts, ["after-2"]);
        assert!(server.tensors(&path) == undisturbed, "other bytes");
        finished.push(path);
    }

    // The second one found everything in the ledger.
    assert_eq!(finished[0], finished[1]);
}

/// A program that saves, trains on, and dies; the server's files as they were after the save.
async fn killed_after_a_backup(server: &mut Server, ledger: &Path) -> Backup {
    let service = server.service(ledger);
    let trainer = begin(service.clone(), server.model.clone()).await.unwrap();
    for i in 0..3 {
        step(&trainer, i).await.unwrap();
    }
    save(&trainer, "after-2").await.unwrap();
    let mut backup = Backup::new();
    server.restart_after(|dir| backup = files_below(dir));
    for i in 3..5 {
        step(&trainer, i).await.unwrap();
    }
    backup
}

/// The program again, with recovery: its last checkpoint, and those that it went on from.
async fn recovered(server: &Server, ledger: &Path) -> (TinkerPath, Vec<String>) {
    let restarts = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&restarts);
    let recovery = Recovery::new(server.service(ledger), RecoveryPolicy::default());
    let recovery = recovery.observer(move |event| {
        if let RecoveryEvent::Restarted { checkpoint, .. } = event {
            let name = checkpoint.checkpoint.name().to_owned();
            told.lock().unwrap().push(name);
        }
    });
    let model = server.model.clone();
    let run = recovery.run(|service| begin(service, model), train);
    let path = within_patience(run).await.unwrap();
    let restarts = restarts.lock().unwrap().clone();
    (path, restarts)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_put_back_to_an_older_state_is_not_waited_for() {
    let home = TempDir::new().unwrap();
    let ledger = home.path().join("ledger");
    let mut server = Server::start(home.path());
    let backup = within_patience(killed_after_a_backup(&mut server, &ledger)).await;
    server.restart_after(|dir| put_back(dir, &backup));

    let again = begin(server.service(&ledger), server.model.clone());
    let error = within_patience(again).await.unwrap_err();

    let Error::Ledger(LedgerError::ServerDiffers { detail, .. }) = &error else {
        panic!("{error}");
    };
    assert!(detail.contains("OptimStep (seq_id"), "{detail}");
}
