//! The thread that writes a ledger: everything that waits is written and synced together.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use tokio::sync::{mpsc, oneshot};

use super::error::LedgerError;
use super::file::LedgerFile;
use super::record::{Chain, Record};

/// Records that wait to be written; more of them hold their senders up.
const QUEUE_LEN: usize = 1024;
/// Records that are written and synced together.
const MAX_GROUP: usize = 256;

type Reply = oneshot::Sender<Result<(), Trouble>>;

/// Why nothing is written any more; a line may be torn, so there is no way on in this process.
#[derive(Debug, Clone)]
struct Trouble(io::ErrorKind, String);

struct Job {
    record: Record,
    /// Told when the record is on the disk.
    synced: Option<Reply>,
}

/// Hands records to the thread. The thread ends, and releases the ledger, with the last of these.
#[derive(Debug)]
pub(super) struct Writer {
    jobs: mpsc::Sender<Job>,
    path: PathBuf,
}

impl Writer {
    /// Starts the thread.
    pub(super) fn start(ledger: LedgerFile) -> Result<Self, LedgerError> {
        let (jobs, queue) = mpsc::channel(QUEUE_LEN);
        let path = ledger.path.clone();
        std::thread::Builder::new()
            .name("tinker-ledger".into())
            .spawn(move || write(ledger, queue))
            .map_err(LedgerError::io("start a thread for", &path))?;
        Ok(Self { jobs, path })
    }

    /// Writes a record and waits until it is on the disk.
    pub(super) async fn sync(&self, record: Record) -> Result<(), LedgerError> {
        let (sender, synced) = oneshot::channel();
        let synced_job = Job {
            record,
            synced: Some(sender),
        };
        let trouble = match self.jobs.send(synced_job).await {
            Ok(()) => match synced.await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(trouble)) => trouble,
                Err(_) => ended(),
            },
            Err(_) => ended(),
        };
        let error = io::Error::new(trouble.0, trouble.1);
        Err(LedgerError::io("write", &self.path)(error))
    }

    /// Writes a record soon. If it is lost, a restarted program asks the server again.
    pub(super) async fn note(&self, record: Record) {
        let job = Job {
            record,
            synced: None,
        };
        // A writer that has failed says so to the next record that must be on the disk.
        self.jobs.send(job).await.ok();
    }
}

fn ended() -> Trouble {
    Trouble(io::ErrorKind::BrokenPipe, "its writer has ended".into())
}

fn write(ledger: LedgerFile, mut queue: mpsc::Receiver<Job>) {
    let LedgerFile {
        file,
        chain,
        lock,
        path,
        n_bytes,
    } = ledger;
    let mut tail = Tail::new(file, chain, n_bytes);
    let mut trouble: Option<Trouble> = None;
    while let Some(first) = queue.blocking_recv() {
        let more = std::iter::from_fn(|| queue.try_recv().ok());
        let group: Vec<Job> = std::iter::once(first).chain(more).take(MAX_GROUP).collect();
        if trouble.is_none() {
            let is_waited_for = group.iter().any(|job| job.synced.is_some());
            let records = group.iter().map(|job| &job.record);
            if let Err(error) = tail.append(records, is_waited_for) {
                tracing::error!(path = %path.display(), %error, "the ledger cannot be written");
                trouble = Some(Trouble(error.kind(), error.to_string()));
            }
        }
        let replies = group.into_iter().filter_map(|job| job.synced);
        for reply in replies {
            // Who asked may have left.
            reply.send(trouble.clone().map_or(Ok(()), Err)).ok();
        }
    }
    // Not before the last record is written.
    drop(lock);
}

/// Where lines are put.
trait Disk {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Returns when all that was written is there to stay.
    fn sync(&mut self) -> io::Result<()>;
}

impl Disk for File {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::Write::write_all(self, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// The end of a ledger.
struct Tail<D> {
    disk: D,
    chain: Chain,
    /// Size of the file.
    n_bytes: u64,
    /// Bytes that were synced and not said to be.
    n_synced: Option<u64>,
}

impl<D: Disk> Tail<D> {
    const fn new(disk: D, chain: Chain, n_bytes: u64) -> Self {
        Self {
            disk,
            chain,
            n_bytes,
            n_synced: None,
        }
    }

    /// Appends records, after word of the last sync, and syncs if somebody waits for it.
    fn append<'r>(
        &mut self,
        records: impl Iterator<Item = &'r Record>,
        is_waited_for: bool,
    ) -> io::Result<()> {
        let mut lines = Vec::new();
        if let Some(n_bytes) = self.n_synced.take() {
            self.chain.write(&Record::Synced { n_bytes }, &mut lines)?;
        }
        for record in records {
            self.chain.write(record, &mut lines)?;
        }
        self.disk.write_all(&lines)?;
        self.n_bytes += lines.len() as u64;
        if is_waited_for {
            self.disk.sync()?;
            self.n_synced = Some(self.n_bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
