//! Servers to test against: our own with a tiny base model, or one anywhere.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tinker_api::{PollPolicy, RetryPolicy, ServiceClient, TinkerPath};
use tinker_http::machine::Backoff;
use tinker_server::{ServeOptions, Server};
use tinker_types::ClientConfig;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Variable that names a server to run the suite against.
pub const BASE_URL: &str = "TINKER_CONTRACT_BASE_URL";
/// Variable that holds its key, if it needs one.
pub const API_KEY: &str = "TINKER_CONTRACT_API_KEY";
/// Variable that names the base model to train there; the first one that it lists if absent.
pub const BASE_MODEL: &str = "TINKER_CONTRACT_BASE_MODEL";

/// Servers start and stop in less than a second; this long only where the machine is overloaded.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server: in this process with a data directory of its own, both of which end with it, or
/// anywhere.
#[derive(Debug)]
pub struct Target {
    /// Where it listens, without a trailing slash.
    pub base_url: String,
    /// The key it asks for.
    pub api_key: String,
    /// Name of the tiny base model.
    pub base_model: String,
    home: Option<TempDir>,
    stop: Option<oneshot::Sender<()>>,
    running: Option<JoinHandle<tinker_server::Result<()>>>,
}

impl Target {
    /// Starts a server on a free port.
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// Starts a server on a free port that hands other settings than the usual ones to its clients.
    pub async fn start_with(change: impl FnOnce(&mut ClientConfig)) -> Self {
        Self::start_as(|options| change(&mut options.client_config)).await
    }

    /// Starts a server on a free port with other options than the usual ones. By TLS where they name a
    /// certificate, which has to be good for `127.0.0.1`.
    pub async fn start_as(change: impl FnOnce(&mut ServeOptions)) -> Self {
        let home = TempDir::new().expect("a temporary directory");
        let model = tiny_model(&home.path().join("tiny"));
        let mut options = options(home.path(), &model);
        change(&mut options);
        let server = Server::bind(options).await.expect("a server");
        let base_url = match server.tls_addr() {
            Some(addr) => format!("https://{addr}"),
            None => server.base_url(),
        };
        let api_key = server.token().expose().to_owned();
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(server.run(async move {
            // A dropped target stops its server too.
            let _ = stopped.await;
        }));
        Self {
            base_url,
            api_key,
            base_model: model.display().to_string(),
            home: Some(home),
            stop: Some(stop),
            running: Some(running),
        }
    }

    /// The server that the environment names, if it names one.
    ///
    /// # Panics
    /// If no base model is named and the server lists none.
    pub async fn of_environment() -> Option<Self> {
        let base_url = setting(BASE_URL)?;
        let api_key = setting(API_KEY).unwrap_or_else(|| "tml-none".to_owned());
        let base_model = match setting(BASE_MODEL) {
            Some(name) => name,
            None => first_model(&base_url, &api_key).await,
        };
        Some(Self {
            base_url,
            api_key,
            base_model,
            home: None,
            stop: None,
            running: None,
        })
    }

    /// A client of it with a session of its own.
    #[must_use]
    pub fn service(&self) -> ServiceClient {
        service(&self.base_url, &self.api_key)
    }

    /// Whether it is our own, with nothing in it that a test did not make.
    #[must_use]
    pub const fn is_own(&self) -> bool {
        self.home.is_some()
    }

    /// The data directory.
    ///
    /// # Panics
    /// If the server is not our own.
    #[must_use]
    pub fn home(&self) -> &Path {
        self.home.as_ref().expect("a server of our own").path()
    }

    /// Stops the server in good order and waits for its end.
    pub async fn stop(mut self) {
        drop(self.stop.take());
        if let Some(running) = self.running.take() {
            tokio::time::timeout(PATIENCE, running)
                .await
                .expect("a server that stops")
                .expect("the server's task")
                .expect("an orderly end");
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "whoever runs the suite elsewhere says where by the environment"
)]
fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.is_empty())
}

async fn first_model(base_url: &str, api_key: &str) -> String {
    let models = service(base_url, api_key)
        .get_server_capabilities()
        .await
        .expect("a list of base models");
    let mut names = models.supported_models.into_iter();
    names
        .find_map(|model| model.model_name)
        .expect("a base model: name one")
}

/// A server in a process of its own, which can be killed and started again at the same address.
///
/// It ends with this value, and with this process however that ends: its standard input is a pipe
/// from here.
#[derive(Debug)]
pub struct ServerProcess {
    /// Where it listens, without a trailing slash.
    pub base_url: String,
    /// The key it asks for.
    pub api_key: String,
    child: Child,
}

impl ServerProcess {
    /// Starts the `contract-server` at `program` and waits until it listens; port 0 takes one that
    /// stays free while the server is away.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(program: &Path, home: &Path, model: &Path, port: u16, threads: usize) -> Self {
        let port = if port == 0 { lasting_port() } else { port };
        let mut child = spawn(program, home, model, port, threads);
        let stdout = child.stdout.take().expect("a pipe");
        // Made before anything can fail, so that the process ends in any case.
        let mut server = Self {
            base_url: String::new(),
            api_key: String::new(),
            child,
        };
        let line = first_line(stdout);
        let (base_url, api_key) = line
            .trim()
            .split_once(' ')
            .unwrap_or_else(|| panic!("the server said {line:?}"));
        server.base_url = base_url.to_owned();
        server.api_key = api_key.to_owned();
        server
    }

    /// Starts the `contract-server` at `program` and kills it with signal 9 so much later, however far
    /// it has come.
    ///
    /// # Panics
    /// If it cannot be started.
    pub async fn start_and_kill(program: &Path, home: &Path, model: &Path, after: Duration) {
        let mut child = spawn(program, home, model, 0, 1);
        tokio::time::sleep(after).await;
        child.kill().expect("a server that starts");
        child.wait().expect("its end");
    }

    /// Kills it with signal 9 and waits for its end.
    pub fn kill(&mut self) {
        self.child.kill().expect("a running server");
        self.child.wait().expect("its end");
    }

    /// The port it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        let port = self
            .base_url
            .rsplit(':')
            .next()
            .and_then(|port| port.parse().ok());
        port.expect("an address with a port")
    }
}

fn spawn(program: &Path, home: &Path, model: &Path, port: u16, threads: usize) -> Child {
    Command::new(program)
        .args([home, model])
        .args([port.to_string(), threads.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // It may have been killed already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The first line that a starting server prints.
fn first_line(stdout: ChildStdout) -> String {
    let (told, line) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        // Nobody listens any more if this took too long.
        let _ = told.send(read.map(|_| line));
    });
    let line = line.recv_timeout(PATIENCE).expect("a server that starts");
    line.expect("a line of text")
}

/// A free port that nothing else takes while its server is away: below those that systems give to
/// whoever does not name one, and given out once by each process.
fn lasting_port() -> u16 {
    const RANGE: std::ops::Range<u32> = 20_000..32_000;
    static N_GIVEN: AtomicU32 = AtomicU32::new(0);
    // Processes begin at different places.
    let first = std::process::id().wrapping_mul(97);
    let mut ports = std::iter::repeat_with(|| {
        let n = first.wrapping_add(N_GIVEN.fetch_add(1, Ordering::Relaxed));
        (RANGE.start + n % (RANGE.end - RANGE.start)) as u16
    });
    ports
        .find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        .expect("a free port")
}

/// Ends this process when the one that started it ends or lets go of our standard input.
#[expect(clippy::exit, reason = "nothing is left that waits for an orderly end")]
pub fn end_with_parent() {
    std::thread::spawn(|| {
        // Nothing is ever written to it. An error ends it too.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
}

/// The safetensors files of a checkpoint in a server's data directory, by name, in its order.
///
/// # Panics
/// If the checkpoint is not there.
#[must_use]
pub fn checkpoint_tensors(home: &Path, path: &TinkerPath) -> Vec<(String, Vec<u8>)> {
    let checkpoint = &path.checkpoint;
    let below_run = Path::new(checkpoint.kind.segment()).join(checkpoint.name());
    // The server spells run ids in its own way: the session and the number are plain.
    let mut parts = path.run.as_str().split(':');
    let session = parts.next().unwrap_or_default();
    let number = parts.next_back().unwrap_or_default();
    let is_run = |name: &str| name.starts_with(session) && name.ends_with(&format!("_{number}"));
    let runs = std::fs::read_dir(home.join("server/checkpoints")).expect("checkpoints");
    let mut dirs = runs
        .map(|run| run.expect("a run"))
        .filter(|run| is_run(&run.file_name().to_string_lossy()))
        .map(|run| run.path().join(&below_run))
        .filter(|dir| dir.is_dir());
    let dir = dirs
        .next()
        .unwrap_or_else(|| panic!("{path} is not in {}", home.display()));
    assert!(dirs.next().is_none(), "{path} is there twice");
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(dir)
        .expect("a checkpoint")
        .map(|file| file.expect("a file").path())
        .filter(|file| {
            file.extension()
                .is_some_and(|extension| extension == "safetensors")
        })
        .map(|file| {
            let name = file
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            (name, std::fs::read(&file).expect("a readable file"))
        })
        .collect();
    files.sort();
    files
}

/// A client that waits milliseconds between attempts, and a minute for a server that is gone.
#[must_use]
pub fn service(base_url: &str, api_key: &str) -> ServiceClient {
    let backoff = Backoff {
        base_delay: Duration::from_millis(5),
        max_delay: Duration::from_millis(50),
        jitter: 0.25,
    };
    let patience = Duration::from_secs(60);
    ServiceClient::builder(base_url)
        .api_key(api_key.parse().expect("a key"))
        .retry_policy(RetryPolicy {
            max_attempts: u32::MAX,
            backoff: backoff.clone(),
            total_timeout: patience,
            ..RetryPolicy::default()
        })
        .poll_policy(PollPolicy {
            backoff,
            ..PollPolicy::default()
        })
        .wait_for_server(patience)
        .build()
        .expect("valid settings")
}

/// How the tests serve a data directory: one engine thread, the tiny model on offer.
#[must_use]
pub fn options(home: &Path, model: &Path) -> ServeOptions {
    ServeOptions {
        models: vec![model.to_owned()],
        threads: 1,
        ..ServeOptions::new(home)
    }
}

/// Writes the tiny random Llama of `fixtures/numerics` with a tokenizer to `dir`; its real path.
///
/// Hidden size 64, two layers, 320 tokens: a training step takes milliseconds.
pub fn tiny_model(dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/numerics/llama");
    std::fs::create_dir_all(dir).expect("a directory");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), dir.join(name)).expect("a copy of the model");
    }
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "model_max_length": 512,
    });
    write(dir, "tokenizer.json", &tokenizer());
    write(dir, "tokenizer_config.json", &tokenizer_config);
    dir.canonicalize().expect("the directory just made")
}

const EOS: &str = "<|endoftext|>";

fn write(dir: &Path, name: &str, content: &Value) {
    std::fs::write(dir.join(name), content.to_string()).expect("a small file");
}

/// One token for every byte, after the end-of-text token at 2 where the model's config has it.
fn tokenizer() -> Value {
    let mut vocab: Map<String, Value> = (0..=255)
        .map(|byte| (byte_symbol(byte).to_string(), json!(u32::from(byte) + 3)))
        .collect();
    for (id, special) in ["<|pad|>", "<|begin|>", EOS].iter().enumerate() {
        vocab.insert((*special).to_owned(), json!(id));
    }
    let special = json!({
        "id": 2, "content": EOS, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    });
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": [],
        },
    })
}

/// The printable stand-in of a byte in byte-level vocabularies (Radford et al. 2019): itself if
/// printable in Latin-1, else the next free character from U+0100.
fn byte_symbol(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let n_before = (0..byte).filter(|&b| !printable(b)).count();
    char::from_u32(0x100 + n_before as u32).expect("a character below U+0200")
}
