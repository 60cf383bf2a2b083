//! Loops of the Python cookbook 0.6, unmodified, against our server: they get its address and key, a
//! model directory under a name that they know, and data sets in directories named like those of the hub.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tinker_runs::{MetricsRow, RunFolder};
use tinker_server::{ServeOptions, Server};
use tokio::process::Command;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A name that the cookbook knows, of a model with the chat format of ours.
const MODEL: &str = "Qwen/Qwen3-4B-Instruct-2507";
/// Names a Python that has the cookbook; set by `cargo xtask cookbook`.
const PYTHON: &str = "TINKER_COOKBOOK_PYTHON";
/// A loop takes up to three minutes on two busy cores; one that takes this long hangs.
const PATIENCE: Duration = Duration::from_secs(600);

/// A server with the small model, and a directory to run recipes in.
struct Cookbook {
    python: PathBuf,
    dir: TempDir,
    base_url: String,
    api_key: String,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<tinker_server::Result<()>>,
}

impl Cookbook {
    /// `None`, said on standard output, where no Python has the cookbook.
    async fn open() -> Option<Self> {
        let python = python()?;
        let dir = TempDir::new().unwrap();
        let model = dir.path().join(MODEL);
        copy_dir(&repository().join("models/nano"), &model);
        write_data(dir.path());
        let options = ServeOptions {
            named_models: [(MODEL.to_owned(), model)].into(),
            threads: 1,
            ..ServeOptions::new(dir.path().join("home"))
        };
        let server = Server::bind(options).await.unwrap();
        let (base_url, api_key) = (server.base_url(), server.token().expose().to_owned());
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(server.run(async move {
            // A dropped sender stops the server too.
            let _ = stopped.await;
        }));
        Some(Self {
            python,
            dir,
            base_url,
            api_key,
            stop: Some(stop),
            running,
        })
    }

    /// Runs a recipe with `key=value` arguments; whether it succeeded, and what it printed.
    async fn run(&self, recipe: &str, run: &str, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new(&self.python);
        command
            .args(["-m", &format!("tinker_cookbook.recipes.{recipe}")])
            .arg(format!("model_name={MODEL}"))
            .arg(format!("log_path={}", self.folder(run).display()))
            .args(arguments)
            // Data sets and tokenizers are found by their relative paths.
            .current_dir(self.dir.path())
            .env("TINKER_BASE_URL", &self.base_url)
            .env("TINKER_API_KEY", &self.api_key)
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_DATASETS_OFFLINE", "1")
            .env("HF_HOME", self.dir.path().join("hf"))
            .env("HOME", self.dir.path())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = tokio::time::timeout(PATIENCE, command.output());
        let output = output.await.expect("a loop that ends").unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        (output.status.success(), text)
    }

    /// Runs a recipe that has to succeed; its metrics.
    async fn train(&self, recipe: &str, run: &str, arguments: &[&str]) -> Vec<MetricsRow> {
        let (succeeded, text) = self.run(recipe, run, arguments).await;
        assert!(succeeded, "{recipe}: {text}");
        self.metrics(run)
    }

    fn folder(&self, run: &str) -> PathBuf {
        self.dir.path().join("runs").join(run)
    }

    fn metrics(&self, run: &str) -> Vec<MetricsRow> {
        let folder = RunFolder::open(self.folder(run)).unwrap();
        folder.read_metrics().unwrap()
    }

    async fn close(mut self) {
        drop(self.stop.take());
        self.running.await.unwrap().unwrap();
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the runner tells tests about Python this way"
)]
fn python() -> Option<PathBuf> {
    let python = std::env::var_os(PYTHON).filter(|path| !path.is_empty());
    if python.is_none() {
        println!("skipped: {PYTHON} names no Python with the cookbook; run `cargo xtask cookbook`");
    }
    python.map(PathBuf::from)
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// Data sets where `datasets.load_dataset` looks before it asks the hub: directories of their names.
fn write_data(dir: &Path) {
    let pirate = std::fs::read_to_string(repository().join("examples/data/pirate.jsonl")).unwrap();
    let chats: Vec<Value> = pirate
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let pairs: Vec<Value> = chats.iter().map(preference).collect();
    for (name, rows) in [
        ("HuggingFaceH4/no_robots", &chats),
        ("allenai/tulu-3-sft-mixture", &chats),
        ("Anthropic/hh-rlhf", &pairs),
    ] {
        // Recipes drop batches that are not full, and the largest has 128 rows.
        write_rows(&dir.join(name).join("train.jsonl"), &rows[..256]);
        write_rows(
            &dir.join(name).join("test.jsonl"),
            &rows[rows.len() - 128..],
        );
    }
    write_rows(&dir.join("pirate.jsonl"), &chats);
}

/// A chat of two messages as a preference for its answer over another one.
fn preference(chat: &Value) -> Value {
    let said = |i: usize| chat["messages"][i]["content"].as_str().unwrap();
    let with = |answer: &str| format!("\n\nHuman: {}\n\nAssistant: {answer}", said(0));
    json!({"chosen": with(said(1)), "rejected": with("I do not know. Ask somebody else.")})
}

fn write_rows(path: &Path, rows: &[Value]) {
    let mut text = String::new();
    for row in rows {
        writeln!(text, "{row}").unwrap();
    }
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// The values of a metric, in the order of the steps that have it.
fn series(rows: &[MetricsRow], name: &str) -> Vec<f64> {
    rows.iter().filter_map(|row| row.get(name)).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn supervised_training_learns() {
    let Some(cookbook) = Cookbook::open().await else {
        return;
    };

    let flags = [
        "learning_rate=4e-3",
        "num_epochs=4",
        "lora_rank=16",
        "eval_every=3",
    ];
    let rows = cookbook.train("sl_basic", "basic", &flags).await;

    let losses = series(&rows, "train_mean_nll");
    assert_eq!(losses.len(), 8, "two batches of 128 rows, four times");
    assert!(losses[7] < 0.5 * losses[0], "{losses:?}");
    let held_out = series(&rows, "test/nll");
    assert!(held_out.is_sorted_by(|a, b| a > b), "{held_out:?}");
    assert!(held_out.len() > 1, "{held_out:?}");
    cookbook.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn supervised_training_goes_on_from_a_checkpoint() {
    let Some(cookbook) = Cookbook::open().await else {
        return;
    };
    let flags = [
        "dataset=pirate.jsonl",
        "learning_rate=4e-3",
        "batch_size=32",
        "max_length=512",
        "lora_rank=16",
        "save_every=3",
        "eval_every=0",
        "behavior_if_log_dir_exists=resume",
    ];
    let first = cookbook.train("chat_sl.train", "chat", &flags).await;
    let checkpoints = cookbook.folder("chat").join("checkpoints.jsonl");
    let rows = std::fs::read_to_string(&checkpoints).unwrap();
    let (kept, lost): (Vec<&str>, Vec<&str>) = rows
        .lines()
        .partition(|row| row.contains("\"000003\"") || row.contains("\"000006\""));
    assert_eq!((kept.len(), lost.len()), (2, 2), "{rows}");
    // As a crash after the sixth batch would leave it.
    std::fs::write(&checkpoints, kept.join("\n") + "\n").unwrap();

    let again = cookbook.train("chat_sl.train", "chat", &flags).await;

    let first = series(&first, "train_mean_nll");
    assert_eq!(first.len(), 11);
    // The cookbook counts the steps of a resumed run from its checkpoint on, and some of them twice.
    let resumed = again.last().unwrap().get("train_mean_nll").unwrap();
    assert!(resumed < first[5], "{resumed} after {first:?}");
    let folder = RunFolder::open(cookbook.folder("chat")).unwrap();
    let newest = folder.read_checkpoints().unwrap().pop().unwrap();
    assert_eq!(newest.name, "final");
    assert!(newest.sampler_path.is_some() && newest.state_path.is_some());
    cookbook.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reinforcement_learning_raises_the_reward() {
    let Some(cookbook) = Cookbook::open().await else {
        return;
    };
    let flags = [
        "env=arithmetic",
        "loss_fn=importance_sampling",
        "group_size=8",
        "groups_per_batch=32",
        "learning_rate=3e-3",
        "lora_rank=16",
        "max_tokens=8",
        "eval_every=0",
        "save_every=8",
        "max_steps=32",
    ];

    let rows = cookbook.train("math_rl.train", "sums", &flags).await;

    let rewards = series(&rows, "env/all/reward/total");
    assert_eq!(rewards.len(), 32);
    let (before, after) = (mean(&rewards[..8]), mean(&rewards[24..]));
    assert!(after > before, "{before} to {after}: {rewards:?}");
    // What was sampled is what is trained on: the same weights give the same log-probabilities.
    let kl = series(&rows, "optim/kl_sample_train_v2");
    assert!(kl.iter().all(|kl| kl.abs() < 1e-6), "{kl:?}");
    cookbook.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reinforcement_learning_takes_several_turns_and_late_samples() {
    let Some(cookbook) = Cookbook::open().await else {
        return;
    };
    let guessing = [
        "renderer_name=qwen3_instruct",
        "batch_size=2",
        "group_size=4",
        "max_tokens=12",
        "eval_every=0",
        "max_steps=1",
    ];
    let late = [
        "env=arithmetic",
        "loss_fn=ppo",
        "max_steps_off_policy=2",
        "group_size=4",
        "groups_per_batch=8",
        "learning_rate=5e-4",
        "lora_rank=16",
        "max_tokens=8",
        "eval_every=0",
        "max_steps=4",
    ];

    let guessed = cookbook
        .train("multiplayer_rl.guess_number.train", "guess", &guessing)
        .await;
    let trained = cookbook.train("math_rl.train", "late", &late).await;

    assert!(series(&guessed, "env/all/turns_per_episode")[0] > 1.0);
    assert_eq!(series(&trained, "env/all/reward/total").len(), 4);
    cookbook.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loss_that_the_server_lacks_ends_a_loop_by_name() {
    let Some(cookbook) = Cookbook::open().await else {
        return;
    };
    let flags = [
        "env=arithmetic",
        "group_size=4",
        "groups_per_batch=4",
        "max_steps=1",
    ];

    let (succeeded, text) = cookbook.run("math_rl.train", "stable", &flags).await;

    assert!(!succeeded);
    assert!(
        text.contains("record_stability_info is not supported by this server"),
        "{text}"
    );
    cookbook.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preferences_are_learned() {
    let Some(cookbook) = Cookbook::open().await else {
        return;
    };
    let flags = [
        "dataset=hhh",
        "batch_size=32",
        "max_length=512",
        "learning_rate=5e-4",
        "max_steps=5",
    ];

    let rows = cookbook.train("preference.dpo.train", "dpo", &flags).await;

    let losses = series(&rows, "dpo_loss");
    // Policy and reference agree at first, and ln 2 is the loss of those that do.
    assert!(
        (losses[0] - std::f64::consts::LN_2).abs() < 1e-4,
        "{losses:?}"
    );
    assert!(losses.is_sorted_by(|a, b| a > b), "{losses:?}");
    assert!(*series(&rows, "accuracy").last().unwrap() > 0.9);
    cookbook.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_student_comes_closer_to_its_teacher() {
    let Some(cookbook) = Cookbook::open().await else {
        return;
    };
    let flags = [
        "learning_rate=4e-3",
        "num_epochs=2",
        "lora_rank=16",
        "eval_every=0",
    ];
    cookbook.train("sl_basic", "teacher", &flags).await;
    let teacher = RunFolder::open(cookbook.folder("teacher")).unwrap();
    let teacher = teacher.read_checkpoints().unwrap().pop().unwrap();
    let checkpoint = format!("teacher_checkpoint={}", teacher.sampler_path.unwrap());
    let model = format!("teacher_model={MODEL}");
    let flags = [
        "dataset=tulu3",
        "group_size=4",
        "groups_per_batch=16",
        "lora_rank=16",
        "learning_rate=4e-3",
        "max_tokens=16",
        "eval_every=0",
        "max_steps=16",
    ];
    let flags = [flags.as_slice(), &[&model, &checkpoint]].concat();

    let rows = cookbook
        .train("distillation.on_policy_distillation", "student", &flags)
        .await;

    let distance = series(&rows, "teacher_kl");
    assert_eq!(distance.len(), 16);
    let (before, after) = (mean(&distance[..4]), mean(&distance[12..]));
    assert!(after < 0.6 * before, "{distance:?}");
    cookbook.close().await;
}
