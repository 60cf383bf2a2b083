//! Brings files from signed addresses to a folder: parts, repetitions, new addresses.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::BytesMut;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::{Response, Url};
use tokio::sync::Semaphore;

use super::event::DownloadEvent;
use super::journal::{Identity, Journal};
use super::manifest::{ManifestEntry, check_sum, file_error, sha256_of};
use super::names::spelled;
use super::options::DownloadOptions;
use super::source::{SignedFiles, Source};
use super::storage::{Sent, Trouble, address, get, lost};
use super::taken::Taken;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::machine::{Decision, Failure, RetryState, classify};

/// Bytes that are written at once.
const WRITE_BYTES: usize = 1 << 20;
/// New addresses that may be refused one after the other.
const MAX_REFUSALS: u32 = 3;
/// How often a file may turn out to be another one while it is fetched.
const MAX_CHANGES: u32 = 3;

/// What a whole download shares.
pub(super) struct Transfer {
    pub(super) client: reqwest::Client,
    pub(super) options: DownloadOptions,
    pub(super) observer: Arc<dyn Fn(&DownloadEvent) + Send + Sync>,
    pub(super) may_be_plain: bool,
    pub(super) clock: Clock,
    source: Source,
    signed: tokio::sync::Mutex<Signed>,
    connections: Semaphore,
    progress: Mutex<Progress>,
}

struct Signed {
    files: SignedFiles,
    generation: u32,
}

#[derive(Default)]
struct Progress {
    done_bytes: u64,
    known_bytes: u64,
}

/// A file on its way.
struct Job<'a> {
    name: &'a str,
    path: PathBuf,
    journal_path: PathBuf,
}

/// Whether a file is still the one that was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Complete,
    Changed,
}

impl Transfer {
    pub(super) async fn start(
        client: reqwest::Client,
        source: Source,
        options: DownloadOptions,
        observer: Arc<dyn Fn(&DownloadEvent) + Send + Sync>,
        may_be_plain: bool,
    ) -> Result<Self> {
        let files = source.sign().await?;
        let n_files = files.files.len();
        if n_files as u64 > options.limits.max_entries {
            return Err(Error::new(
                ErrorKind::Untrusted,
                format!(
                    "{n_files} files are offered, more than {}",
                    options.limits.max_entries
                ),
            ));
        }
        observer(&DownloadEvent::Started { n_files });
        Ok(Self {
            client,
            connections: Semaphore::new(options.n_connections.max(1)),
            options,
            observer,
            may_be_plain,
            clock: Clock::start(),
            source,
            signed: tokio::sync::Mutex::new(Signed {
                files,
                generation: 0,
            }),
            progress: Mutex::default(),
        })
    }

    /// The names that are offered, in their order.
    pub(super) async fn names(&self) -> Vec<String> {
        let signed = self.signed.lock().await;
        signed.files.files.keys().cloned().collect()
    }

    /// Fetches files into `folder`, with journals in `journals`; their sums by name. Nothing is
    /// asked for unless each has a place of its own.
    pub(super) async fn run(
        &self,
        names: &[String],
        folder: &Path,
        journals: &Path,
    ) -> Result<Vec<ManifestEntry>> {
        let mut taken = Taken::new("the server offers");
        let places = names.iter().map(|name| Ok((name, taken.file(name)?)));
        let places = places.collect::<Result<Vec<_>>>()?;
        let n_at_once = self.options.n_connections.max(1);
        let fetched = stream::iter(&places)
            .map(|(name, relative)| self.file(name, relative, folder, journals))
            .buffer_unordered(n_at_once);
        let mut entries: Vec<ManifestEntry> = fetched.try_collect().await?;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    async fn file(
        &self,
        name: &str,
        relative: &Path,
        folder: &Path,
        journals: &Path,
    ) -> Result<ManifestEntry> {
        let job = Job {
            name,
            path: folder.join(relative),
            journal_path: journals.join(relative),
        };
        for path in [&job.path, &job.journal_path] {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(|e| file_error("make", parent, e))?;
            }
        }
        let mut n_changes = 0;
        while self.once(&job).await? == End::Changed {
            n_changes += 1;
            if n_changes > MAX_CHANGES {
                let text = format!("{name} changes while it is fetched");
                return Err(Error::new(ErrorKind::Conflict, text));
            }
            self.forget(&job)?;
        }
        let sha256 = self.check(&job).await?;
        Ok(ManifestEntry {
            name: spelled(relative),
            sha256,
        })
    }

    /// Fetches what is missing of a file.
    async fn once(&self, job: &Job<'_>) -> Result<End> {
        let journal = Journal::open(&job.journal_path)?.filter(|_| job.path.is_file());
        if let Some(journal) = journal {
            self.know(job, Some(journal.identity.size_bytes), journal.done_bytes())?;
            return self.rest(job, journal, None).await;
        }
        let first = 0..self.options.part_bytes.max(1);
        match self.ask(job, &first).await? {
            Sent::Part(identity, response) => {
                self.know(job, Some(identity.size_bytes), 0)?;
                reserve(&job.path, identity.size_bytes)?;
                let journal = Journal::create(&job.journal_path, identity, first.end)?;
                self.rest(job, journal, Some(response)).await
            }
            Sent::Whole(size, response) => {
                self.know(job, size, 0)?;
                self.whole(job, size, response).await
            }
            Sent::Empty => {
                self.know(job, Some(0), 0)?;
                reserve(&job.path, 0)?;
                self.note_whole(job, 0)?;
                Ok(End::Complete)
            }
        }
    }

    /// Fetches the missing parts of a file; `first` is the answer to the first one, if it is there.
    async fn rest(&self, job: &Job<'_>, journal: Journal, first: Option<Response>) -> Result<End> {
        let (parts, identity) = (journal.parts, journal.identity.clone());
        let mut first = first;
        let missing = journal.missing().into_iter();
        let missing: Vec<_> = missing.map(|part| (part, first.take())).collect();
        let journal = Mutex::new(journal);
        let mut fetched = stream::iter(missing)
            .map(|(part, response)| {
                let (journal, identity) = (&journal, &identity);
                async move {
                    let range = parts.range(part);
                    let end = self.part(job, identity, range, response).await?;
                    if end == End::Complete {
                        let mut journal = journal.lock().unwrap_or_else(PoisonError::into_inner);
                        journal.note(part, &job.journal_path)?;
                    }
                    Ok::<_, Error>(end)
                }
            })
            .buffer_unordered(self.options.n_connections.max(1));
        while let Some(end) = fetched.try_next().await? {
            if end == End::Changed {
                return Ok(End::Changed);
            }
        }
        Ok(End::Complete)
    }

    /// Fetches a part, as often as it takes.
    async fn part(
        &self,
        job: &Job<'_>,
        identity: &Identity,
        range: Range<u64>,
        mut response: Option<Response>,
    ) -> Result<End> {
        let mut file = open(&job.path)?;
        let mut at = range.start;
        let mut effort = Effort::new(self);
        while at < range.end {
            let _place = self.connections.acquire().await;
            let answer = match response.take() {
                Some(response) => response,
                None => match self.ask_once(job, &(at..range.end), &mut effort).await? {
                    None => continue,
                    Some(Sent::Part(found, response)) if found == *identity => response,
                    Some(_) => return Ok(End::Changed),
                },
            };
            let before = at;
            let outcome = self
                .body(job, answer, &mut file, &mut at, Some(range.end))
                .await;
            if at > before {
                effort = Effort::new(self);
            }
            if let Err(trouble) = outcome {
                effort.recover(self, job, trouble).await?;
            }
        }
        sync(file, &job.path).await?;
        Ok(End::Complete)
    }

    /// Fetches a file from a storage that knows no ranges: what breaks off begins anew.
    async fn whole(&self, job: &Job<'_>, size: Option<u64>, response: Response) -> Result<End> {
        let mut response = Some(response);
        let mut effort = Effort::new(self);
        loop {
            let answer = match response.take() {
                Some(response) => response,
                None => match self
                    .ask_once(job, &(0..self.options.part_bytes.max(1)), &mut effort)
                    .await?
                {
                    None => continue,
                    Some(Sent::Whole(found, response)) if found == size => response,
                    Some(_) => return Ok(End::Changed),
                },
            };
            reserve(&job.path, 0)?;
            let mut file = open(&job.path)?;
            let mut at = 0;
            match self.body(job, answer, &mut file, &mut at, size).await {
                Ok(()) => {
                    sync(file, &job.path).await?;
                    self.note_whole(job, at)?;
                    return Ok(End::Complete);
                }
                Err(trouble) => {
                    self.undo(at);
                    effort.recover(self, job, trouble).await?;
                }
            }
        }
    }

    /// Writes a body from `at` on; `at` says how far it came.
    async fn body(
        &self,
        job: &Job<'_>,
        mut response: Response,
        file: &mut File,
        at: &mut u64,
        end: Option<u64>,
    ) -> Result<(), Trouble> {
        let most = end.unwrap_or(self.options.limits.max_file_bytes);
        let mut buffer = BytesMut::new();
        loop {
            let chunk = response.chunk().await;
            let is_last = !matches!(chunk, Ok(Some(_)));
            if let Ok(Some(bytes)) = &chunk {
                buffer.extend_from_slice(bytes);
            }
            if at.saturating_add(buffer.len() as u64) > most {
                let text = format!("the storage sent more of {} than was asked for", job.name);
                return Err(Trouble::Final(Error::new(ErrorKind::Untrusted, text)));
            }
            if buffer.len() >= WRITE_BYTES || (is_last && !buffer.is_empty()) {
                let n_bytes = buffer.len() as u64;
                let written = write(file, *at, buffer.split(), &job.path).await;
                written.map_err(Trouble::Final)?;
                *at += n_bytes;
                self.advance(n_bytes);
            }
            match chunk {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => return Err(lost(error)),
            }
        }
        match end {
            Some(end) if *at < end => Err(Trouble::Failed {
                failure: Failure::Interrupted,
                retry_after: None,
                error: Error::new(
                    ErrorKind::Connect,
                    "the storage sent less than was asked for",
                ),
            }),
            _ => Ok(()),
        }
    }

    /// Asks until there is an answer.
    async fn ask(&self, job: &Job<'_>, range: &Range<u64>) -> Result<Sent> {
        let mut effort = Effort::new(self);
        loop {
            let _place = self.connections.acquire().await;
            if let Some(sent) = self.ask_once(job, range, &mut effort).await? {
                return Ok(sent);
            }
        }
    }

    /// Asks once; nothing if it is worth asking again, after the wait that this includes.
    async fn ask_once(
        &self,
        job: &Job<'_>,
        range: &Range<u64>,
        effort: &mut Effort,
    ) -> Result<Option<Sent>> {
        let (url, generation) = self.url(job.name).await?;
        effort.generation = generation;
        match get(&self.client, url, range).await {
            Ok(sent) => Ok(Some(sent)),
            Err(trouble) => {
                effort.recover(self, job, trouble).await?;
                Ok(None)
            }
        }
    }

    /// The address of a file, signed anew if it is about to expire.
    async fn url(&self, name: &str) -> Result<(Url, u32)> {
        let mut signed = self.signed.lock().await;
        let now = Clock::wall();
        let is_due = |files: &SignedFiles| now + self.options.sign_margin >= files.expires_at;
        if is_due(&signed.files) {
            match self.sign(&mut signed, false).await {
                Ok(()) => {}
                // They still work for a moment, and may be signed by then.
                Err(error) if now < signed.files.expires_at => {
                    tracing::warn!(%error, "addresses were not signed anew");
                }
                Err(error) => return Err(error),
            }
        }
        let file = signed.files.files.get(name).ok_or_else(|| {
            let text = format!("the server no longer offers {name}");
            Error::new(ErrorKind::Decode, text)
        })?;
        let url = address(name, &file.url, self.may_be_plain)?;
        Ok((url, signed.generation))
    }

    async fn sign(&self, signed: &mut Signed, was_refused: bool) -> Result<()> {
        signed.files = self.source.sign().await?;
        signed.generation += 1;
        self.tell(&DownloadEvent::Signed { was_refused });
        Ok(())
    }

    /// Takes new addresses unless somebody has since `generation`.
    async fn sign_after(&self, generation: u32) -> Result<()> {
        let mut signed = self.signed.lock().await;
        if signed.generation != generation {
            return Ok(());
        }
        self.sign(&mut signed, true).await
    }

    /// Takes the sum of a complete file and compares it with the one that is known.
    async fn check(&self, job: &Job<'_>) -> Result<String> {
        let path = job.path.clone();
        let summed = tokio::task::spawn_blocking(move || sha256_of(&path)).await;
        let sha256 = summed.map_err(|e| file_error("read", &job.path, e.into()))??;
        let expected = {
            let signed = self.signed.lock().await;
            let file = signed.files.files.get(job.name);
            file.and_then(|file| file.sha256.clone())
        };
        if let Some(expected) = expected
            && let Err(error) = check_sum(job.name, &expected, &sha256)
        {
            // The next attempt must not go on with it.
            self.forget(job)?;
            return Err(error);
        }
        let size_bytes = std::fs::metadata(&job.path).map_or(0, |data| data.len());
        self.tell(&DownloadEvent::FileDone {
            name: job.name.to_owned(),
            size_bytes,
            sha256: sha256.clone(),
        });
        Ok(sha256)
    }

    /// Notes the size of a file, and refuses what is too large.
    fn know(&self, job: &Job<'_>, size_bytes: Option<u64>, resumed_bytes: u64) -> Result<()> {
        let limits = &self.options.limits;
        let known = {
            let mut progress = self.progress();
            progress.known_bytes = progress.known_bytes.saturating_add(size_bytes.unwrap_or(0));
            progress.done_bytes += resumed_bytes;
            progress.known_bytes
        };
        let size = size_bytes.unwrap_or(0);
        if size > limits.max_file_bytes || known > limits.max_total_bytes {
            let text = format!(
                "{} of {size} bytes is too large: at most {} a file and {} in all are accepted",
                job.name, limits.max_file_bytes, limits.max_total_bytes
            );
            return Err(Error::new(ErrorKind::Untrusted, text));
        }
        self.tell(&DownloadEvent::FileStarted {
            name: job.name.to_owned(),
            size_bytes,
            resumed_bytes,
        });
        Ok(())
    }

    /// Notes a file that came as one part.
    fn note_whole(&self, job: &Job<'_>, size_bytes: u64) -> Result<()> {
        let identity = Identity {
            size_bytes,
            validator: None,
        };
        let mut journal = Journal::create(&job.journal_path, identity, size_bytes.max(1))?;
        match size_bytes {
            0 => Ok(()),
            _ => journal.note(0, &job.journal_path),
        }
    }

    /// Drops what is there of a file.
    fn forget(&self, job: &Job<'_>) -> Result<()> {
        if let Some(journal) = Journal::open(&job.journal_path)? {
            let mut progress = self.progress();
            let (size, done) = (journal.identity.size_bytes, journal.done_bytes());
            progress.known_bytes = progress.known_bytes.saturating_sub(size);
            progress.done_bytes = progress.done_bytes.saturating_sub(done);
        }
        // The file too: a write that is still under way must not reach the new one.
        for path in [&job.journal_path, &job.path] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(file_error("remove", path, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn advance(&self, n_bytes: u64) {
        let event = {
            let mut progress = self.progress();
            progress.done_bytes += n_bytes;
            DownloadEvent::Progress {
                done_bytes: progress.done_bytes,
                known_bytes: progress.known_bytes,
            }
        };
        self.tell(&event);
    }

    fn undo(&self, n_bytes: u64) {
        let mut progress = self.progress();
        progress.done_bytes = progress.done_bytes.saturating_sub(n_bytes);
    }

    fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell(&self, event: &DownloadEvent) {
        (self.observer)(event);
    }
}

/// The attempts since something last came.
struct Effort {
    state: RetryState,
    n_refusals: u32,
    generation: u32,
}

impl Effort {
    fn new(transfer: &Transfer) -> Self {
        Self {
            state: RetryState::new(transfer.options.retry.clone()),
            n_refusals: 0,
            generation: 0,
        }
    }

    /// Waits, or takes new addresses, or gives up.
    async fn recover(
        &mut self,
        transfer: &Transfer,
        job: &Job<'_>,
        trouble: Trouble,
    ) -> Result<()> {
        let named = |error: Error| error.with_call("GET", job.name);
        match trouble {
            Trouble::Final(error) => Err(error),
            Trouble::Refused(error) => {
                self.n_refusals += 1;
                if self.n_refusals > MAX_REFUSALS {
                    return Err(named(error));
                }
                transfer.sign_after(self.generation).await
            }
            Trouble::Failed {
                failure,
                retry_after,
                error,
            } => {
                let (now, class) = (transfer.clock.now(), classify(failure, None));
                let decision = self
                    .state
                    .on_failure(now, class, retry_after, Clock::draw());
                let Decision::RetryAfter(wait) = decision else {
                    return Err(named(error));
                };
                transfer.tell(&DownloadEvent::Retrying {
                    name: job.name.to_owned(),
                    reason: error.to_string(),
                    wait,
                });
                transfer.clock.sleep(wait).await;
                Ok(())
            }
        }
    }
}

/// Makes a file of this size, or makes an old one so.
fn reserve(path: &Path, size_bytes: u64) -> Result<()> {
    let file = File::create(path).map_err(|error| file_error("make", path, error))?;
    let sized = file.set_len(size_bytes);
    sized.map_err(|error| file_error("make room for", path, error))
}

fn open(path: &Path) -> Result<File> {
    let file = OpenOptions::new().write(true).open(path);
    file.map_err(|error| file_error("write", path, error))
}

/// Writes on a thread that may wait for the disk.
async fn write(file: &File, at: u64, bytes: BytesMut, path: &Path) -> Result<()> {
    let fault = |error| file_error("write", path, error);
    let mut file = file.try_clone().map_err(fault)?;
    let written = tokio::task::spawn_blocking(move || {
        file.seek(SeekFrom::Start(at))?;
        file.write_all(&bytes)
    });
    written.await.map_err(|e| fault(e.into()))?.map_err(fault)
}

async fn sync(file: File, path: &Path) -> Result<()> {
    let fault = |error| file_error("write", path, error);
    let synced = tokio::task::spawn_blocking(move || file.sync_data());
    synced.await.map_err(|e| fault(e.into()))?.map_err(fault)
}
