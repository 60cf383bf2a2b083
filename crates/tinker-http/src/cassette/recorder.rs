//! Writing a cassette while a client works. A recording never disturbs the client: what cannot be
//! written is reported by [`Recorder::finish`] and in the log, not to the calls.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::body::Body;
use super::redact::Secrets;
use super::tape::{Exchange, FORMAT, Head, Outcome};
use crate::auth::ApiKey;
use crate::call::{Answer, Call};
use crate::client::Client;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::machine::Failure;
use crate::send::NoAnswer;

/// KiB of bodies that wait for the disk before calls wait too.
const MAX_WAITING_KIB: u32 = 64 << 10;

/// Request headers that are kept. Everything else may be a secret.
const KEPT_HEADERS: [&str; 4] = [
    "x-idempotency-key",
    "x-tinker-request-type",
    "x-tinker-request-iteration",
    "x-tinker-sampling-backpressure",
];

/// Writes all that clients say to their servers to a file. Cheap to clone; several clients may
/// share one.
///
/// Bodies are cleaned and written by a thread of its own. Dropping the last clone waits until all
/// is on disk.
#[derive(Debug, Clone)]
pub struct Recorder(Arc<Inner>);

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecorderStats {
    /// Exchanges.
    pub n_exchanges: u64,
    /// Bytes of the file.
    pub n_bytes: u64,
}

#[derive(Debug)]
struct Inner {
    clock: Clock,
    next_number: AtomicU64,
    budget: Arc<Semaphore>,
    /// Those that the writing thread has been told of.
    secrets: Mutex<Secrets>,
    orders: Option<mpsc::Sender<Order>>,
    writer: Option<JoinHandle<()>>,
}

/// What the writing thread is told.
enum Order {
    Learn(String),
    Write(Box<Exchange>, Option<OwnedSemaphorePermit>),
    Report(oneshot::Sender<Result<RecorderStats>>),
}

impl Recorder {
    /// Starts a recording in a new file that only its owner can read.
    ///
    /// # Errors
    /// If the file exists or cannot be made.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let fault = |error: std::io::Error| {
            let text = format!("cassette {} cannot be made", path.display());
            Error::new(ErrorKind::File, text).with_source(error)
        };
        let file = create_private(path).map_err(fault)?;
        let mut writer = Writer::start(path, file).map_err(fault)?;
        let (orders, receiver) = mpsc::channel();
        let writer = std::thread::Builder::new()
            .name("cassette".to_owned())
            .spawn(move || writer.run(&receiver))
            .map_err(fault)?;
        Ok(Self(Arc::new(Inner {
            clock: Clock::start(),
            next_number: AtomicU64::new(0),
            budget: Arc::new(Semaphore::new(MAX_WAITING_KIB as usize)),
            secrets: Mutex::default(),
            orders: Some(orders),
            writer: Some(writer),
        })))
    }

    /// Waits until all that has been said is on disk.
    ///
    /// # Errors
    /// If something could not be written; the file ends before it.
    pub async fn finish(&self) -> Result<RecorderStats> {
        let (sender, receiver) = oneshot::channel();
        self.0.order(Order::Report(sender));
        receiver
            .await
            .map_err(|_| Error::new(ErrorKind::File, "the recording has stopped"))?
    }

    /// Notes that a call is about to be sent with `credential`.
    pub(crate) fn begin(
        &self,
        client: &Client,
        call: &Call,
        credential: &str,
        retry_count: u32,
    ) -> Take {
        self.learn(client, call, credential);
        let exchange = Exchange {
            number: self.0.next_number.fetch_add(1, Ordering::Relaxed),
            at_ms: millis(self.0.clock.now()),
            took_ms: 0,
            retry_count,
            method: call.method.to_string(),
            path: path_below(client, &call.url),
            headers: kept_headers(call),
            body: call.body.as_ref().map(|body| Body {
                content_type: body.content_type.to_owned(),
                bytes: plain(body.zstd, &body.bytes),
            }),
            outcome: Outcome::Abandoned,
        };
        Take {
            recorder: self.clone(),
            exchange: Some(Box::new(exchange)),
        }
    }

    /// Notes that a document elsewhere, at a signed address, is about to be read.
    pub(crate) fn begin_elsewhere(&self, place: &url::Url) -> Take {
        let exchange = Exchange {
            number: self.0.next_number.fetch_add(1, Ordering::Relaxed),
            at_ms: millis(self.0.clock.now()),
            took_ms: 0,
            retry_count: 0,
            method: "GET".to_owned(),
            path: place.to_string(),
            headers: BTreeMap::new(),
            body: None,
            outcome: Outcome::Abandoned,
        };
        Take {
            recorder: self.clone(),
            exchange: Some(Box::new(exchange)),
        }
    }

    fn learn(&self, client: &Client, call: &Call, credential: &str) {
        let gateway = client.inner().headers.values();
        let private = call
            .headers
            .iter()
            .filter(|(name, _)| name.ends_with("-token"));
        let key = client.inner().credentials.key().map(ApiKey::expose);
        let seen = [credential]
            .into_iter()
            .chain(key)
            .chain(gateway.filter_map(|value| value.to_str().ok()))
            .chain(private.map(|(_, value)| value.as_str()));
        let mut secrets = self
            .0
            .secrets
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for secret in seen {
            if secrets.learn(secret) {
                self.0.order(Order::Learn(secret.to_owned()));
            }
        }
    }
}

impl Inner {
    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // The thread ends only after the last sender.
            let _ = orders.send(order);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Some(writer) = self.writer.take() {
            // A panic of the thread has been printed by then.
            let _ = writer.join();
        }
    }
}

/// A request under way; without an [`end`](Self::end) it counts as abandoned.
#[derive(Debug)]
pub(crate) struct Take {
    recorder: Recorder,
    exchange: Option<Box<Exchange>>,
}

impl Take {
    /// Notes what came of it. Waits only while the disk is far behind.
    pub(crate) async fn end(mut self, result: &Result<Answer, NoAnswer>) {
        let outcome = match result {
            Ok(answer) => answered(answer),
            // It was never sent.
            Err(none) if none.failure == Failure::Local => {
                self.exchange = None;
                return;
            }
            Err(none) => Outcome::Failure {
                reason: none.error.to_string(),
            },
        };
        let Some(mut exchange) = self.exchange.take() else {
            return;
        };
        let inner = &self.recorder.0;
        exchange.outcome = outcome;
        exchange.took_ms = millis(inner.clock.now()).saturating_sub(exchange.at_ms);
        let kib = u32::try_from(size_of(&exchange) >> 10).unwrap_or(u32::MAX);
        let wanted = kib.clamp(1, MAX_WAITING_KIB);
        let permit = Arc::clone(&inner.budget).acquire_many_owned(wanted).await;
        inner.order(Order::Write(exchange, permit.ok()));
    }
}

impl Drop for Take {
    fn drop(&mut self) {
        if let Some(mut exchange) = self.exchange.take() {
            let inner = &self.recorder.0;
            exchange.took_ms = millis(inner.clock.now()).saturating_sub(exchange.at_ms);
            inner.order(Order::Write(exchange, None));
        }
    }
}

fn size_of(exchange: &Exchange) -> usize {
    let sent = exchange.body.as_ref().map_or(0, |body| body.bytes.len());
    match &exchange.outcome {
        Outcome::Answer { body, .. } => sent + body.bytes.len(),
        Outcome::Failure { .. } | Outcome::Abandoned => sent,
    }
}

fn answered(answer: &Answer) -> Outcome {
    let mut headers = BTreeMap::new();
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            headers.insert(name.to_owned(), value);
        }
    };
    let wait = answer.retry_after.map(|time| millis(time).to_string());
    add("retry-after-ms", wait);
    add("x-should-retry", answer.should_retry.map(|b| b.to_string()));
    add("x-request-id", answer.request_id.clone());
    let refused = answer.token_refused;
    let refusal = refused.then(|| r#"Bearer error="invalid_token""#.to_owned());
    add("www-authenticate", refusal);
    let location = answer.location.as_ref();
    add("location", location.map(url::Url::to_string));
    Outcome::Answer {
        status: answer.status,
        headers,
        body: Body {
            content_type: answer.content_type.clone(),
            bytes: answer.body.clone(),
        },
    }
}

fn kept_headers(call: &Call) -> BTreeMap<String, String> {
    let kept = call.headers.iter();
    kept.filter(|(name, _)| KEPT_HEADERS.contains(name))
        .map(|(name, value)| ((*name).to_owned(), value.clone()))
        .collect()
}

/// Path and query below the server's address, which is not recorded.
fn path_below(client: &Client, url: &url::Url) -> String {
    let base = client.base_url().to_string();
    let full = url.as_str();
    match full.strip_prefix(&base) {
        Some(path) => path.to_owned(),
        None => url.path().to_owned(),
    }
}

/// A body before compression; as it is if that cannot be undone.
pub(super) fn plain(is_zstd: bool, bytes: &Bytes) -> Bytes {
    let decoded = is_zstd.then(|| zstd::decode_all(bytes.as_ref()));
    match decoded {
        Some(Ok(decoded)) => decoded.into(),
        Some(Err(_)) | None => bytes.clone(),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn create_private(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// The thread's side.
struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    secrets: Secrets,
    stats: RecorderStats,
    failure: Option<String>,
}

impl Writer {
    fn start(path: &Path, file: File) -> std::io::Result<Self> {
        let started = Clock::wall().duration_since(SystemTime::UNIX_EPOCH);
        let head = Head {
            tinker_cassette: FORMAT,
            client: concat!("tinker-rust/", env!("CARGO_PKG_VERSION")).to_owned(),
            started_unix_s: started.unwrap_or_default().as_secs(),
        };
        let mut writer = Self {
            path: path.to_owned(),
            file: BufWriter::new(file),
            secrets: Secrets::default(),
            stats: RecorderStats::default(),
            failure: None,
        };
        writer.line(&head)?;
        writer.file.flush()?;
        Ok(writer)
    }

    fn run(&mut self, orders: &mpsc::Receiver<Order>) {
        while let Ok(order) = orders.recv() {
            self.obey(order);
            // What is waiting goes out together; a killed process loses only that.
            while let Ok(order) = orders.try_recv() {
                self.obey(order);
            }
            let flushed = self.file.flush();
            self.note(flushed);
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Learn(secret) => {
                self.secrets.learn(&secret);
            }
            Order::Write(exchange, permit) => {
                if self.failure.is_none() {
                    let written = self.write(*exchange);
                    self.note(written);
                }
                drop(permit);
            }
            Order::Report(sender) => {
                let flushed = self.file.flush();
                self.note(flushed);
                // Who asked may have gone.
                let _ = sender.send(self.report());
            }
        }
    }

    fn write(&mut self, exchange: Exchange) -> std::io::Result<()> {
        let clean = self.clean(exchange);
        self.line(&clean)?;
        self.stats.n_exchanges += 1;
        Ok(())
    }

    /// Takes the secrets out, the answer first: it may name the ones that others hold.
    fn clean(&mut self, mut exchange: Exchange) -> Exchange {
        let secrets = &mut self.secrets;
        exchange.outcome = match exchange.outcome {
            Outcome::Answer {
                status,
                headers,
                body,
            } => Outcome::Answer {
                status,
                headers: clean_headers(secrets, headers),
                body: secrets.body(body),
            },
            Outcome::Failure { reason } => Outcome::Failure {
                reason: secrets.text(&reason),
            },
            Outcome::Abandoned => Outcome::Abandoned,
        };
        exchange.body = exchange.body.map(|body| secrets.body(body));
        exchange.headers = clean_headers(secrets, exchange.headers);
        exchange.path = match exchange.path.starts_with('/') {
            true => secrets.known_or(exchange.path),
            // A signed address.
            false => secrets.text(&exchange.path),
        };
        exchange
    }

    fn line(&mut self, value: &impl serde::Serialize) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(value).map_err(std::io::Error::other)?;
        line.push(b'\n');
        self.file.write_all(&line)?;
        self.stats.n_bytes += line.len() as u64;
        Ok(())
    }

    fn note(&mut self, result: std::io::Result<()>) {
        if let (Err(error), None) = (result, &self.failure) {
            let path = self.path.display();
            tracing::error!(%error, "recording to {path} has stopped");
            self.failure = Some(error.to_string());
        }
    }

    fn report(&self) -> Result<RecorderStats> {
        match &self.failure {
            None => Ok(self.stats),
            Some(why) => Err(Error::new(
                ErrorKind::File,
                format!(
                    "cassette {} ends after {} exchanges: {why}",
                    self.path.display(),
                    self.stats.n_exchanges
                ),
            )),
        }
    }
}

fn clean_headers(secrets: &Secrets, headers: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let clean = |(name, value): (String, String)| (name, secrets.text(&value));
    headers.into_iter().map(clean).collect()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_reported_once_and_ends_the_recording() {
        let file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut writer = Writer {
            path: "tape".into(),
            file: BufWriter::with_capacity(0, file),
            secrets: Secrets::default(),
            stats: RecorderStats::default(),
            failure: None,
        };
        let exchange = Exchange {
            number: 0,
            at_ms: 0,
            took_ms: 0,
            retry_count: 0,
            method: "GET".into(),
            path: "/".into(),
            headers: BTreeMap::new(),
            body: None,
            outcome: Outcome::Abandoned,
        };

        writer.obey(Order::Write(Box::new(exchange.clone()), None));
        writer.obey(Order::Write(Box::new(exchange), None));

        let error = writer.report().unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::File);
        assert!(
            error
                .message()
                .starts_with("cassette tape ends after 0 exchanges: "),
            "{error}"
        );
    }
}
