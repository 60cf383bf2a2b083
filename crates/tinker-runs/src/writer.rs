//! Writing a run folder: one process at a time, held by a lock file.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::checkpoints::CheckpointRow;
use crate::durable::replace_file;
use crate::error::{Error, Result};
use crate::folder::{CHECKPOINTS, CONFIG, METRICS, RunFolder, UNFINISHED};
use crate::jsonl::{Durability, LineWriter};
use crate::metrics::MetricsRow;

const LOCK: &str = ".lock";
/// How often the lock is tried, and how long is waited between.
const N_LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The only writer of a run folder; dropping it releases the folder.
#[derive(Debug)]
pub struct RunWriter {
    folder: RunFolder,
    metrics: LineWriter,
    checkpoints: LineWriter,
    /// Held, never read: the operating system releases it however the process ends.
    _lock: File,
}

impl RunWriter {
    /// Makes the folder `path`, with its parents, for a new run.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] if it holds a run, [`Error::Locked`] if another process writes it.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        std::fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        let lock = take_lock(&path)?;
        let folder = RunFolder::unchecked(path);
        if folder.holds_run() {
            return Err(Error::AlreadyExists {
                path: folder.path().to_owned(),
            });
        }
        Self::open(folder, lock)
    }

    /// Opens the run in `path` to go on with it, removing lines that a crash tore.
    ///
    /// # Errors
    /// [`Error::NotARun`] if there is none, [`Error::Locked`] if another process writes it.
    pub fn resume(path: impl Into<PathBuf>) -> Result<Self> {
        let folder = RunFolder::open(path)?;
        let lock = take_lock(folder.path())?;
        Self::open(folder, lock)
    }

    fn open(folder: RunFolder, lock: File) -> Result<Self> {
        let metrics = LineWriter::open(folder.path().join(METRICS), Durability::Process)?;
        let checkpoints = LineWriter::open(folder.path().join(CHECKPOINTS), Durability::PowerCut)?;
        Ok(Self {
            folder,
            metrics,
            checkpoints,
            _lock: lock,
        })
    }

    /// The folder, to read from.
    pub fn folder(&self) -> &RunFolder {
        &self.folder
    }

    /// Replaces `config.json`, durably and at once.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_config(&self, config: &impl Serialize) -> Result<()> {
        self.replace(CONFIG, config)
    }

    /// Replaces what a later writer goes on with if this one does not come to an end, durably and
    /// at once.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_unfinished(&self, state: &impl Serialize) -> Result<()> {
        self.replace(UNFINISHED, state)
    }

    /// Notes that a later writer has nothing to go on with: the run has ended, or its checkpoints
    /// must do.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove_unfinished(&self) -> Result<()> {
        remove(&self.folder.path().join(UNFINISHED))
    }

    /// Removes the step ledger, so that another one can be begun in its place.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove_ledger(&self) -> Result<()> {
        remove(&self.folder.ledger_path())
    }

    fn replace(&self, name: &str, value: &impl Serialize) -> Result<()> {
        let path = self.folder.path().join(name);
        let mut bytes = serde_json::to_vec_pretty(value).map_err(|source| Error::Encode {
            path: path.clone(),
            source,
        })?;
        bytes.push(b'\n');
        replace_file(&path, &bytes)
    }

    /// Removes `config.json`: the folder holds no run any more and may be used for another.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove_config(&self) -> Result<()> {
        let path = self.folder.path().join(CONFIG);
        std::fs::remove_file(&path).map_err(Error::io("remove", &path))
    }

    /// Appends a metrics row. It survives the process, not a power cut.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn append_metrics(&mut self, row: &MetricsRow) -> Result<()> {
        self.metrics.append(row)
    }

    /// Appends a checkpoint row and waits until it is on disk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn append_checkpoint(&mut self, row: &CheckpointRow) -> Result<()> {
        self.checkpoints.append(row)
    }

    /// Drops the metrics of `step` and later, which a resumed run measures again.
    ///
    /// Returns how many steps were dropped.
    ///
    /// # Errors
    /// The file cannot be read or replaced.
    pub fn drop_metrics_from(&mut self, step: u64) -> Result<usize> {
        let path = self.folder.path().join(METRICS);
        let (kept, dropped): (Vec<_>, Vec<_>) = self
            .folder
            .read_metrics()?
            .into_iter()
            .partition(|row| row.step() < step);
        if dropped.is_empty() {
            return Ok(0);
        }
        let mut bytes = Vec::new();
        for row in &kept {
            serde_json::to_writer(&mut bytes, row).map_err(|source| Error::Encode {
                path: path.clone(),
                source,
            })?;
            bytes.push(b'\n');
        }
        replace_file(&path, &bytes)?;
        // The open file is the one that was replaced.
        self.metrics = LineWriter::open(path, Durability::Process)?;
        Ok(dropped.len())
    }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Whether some process writes the folder `path` now.
pub(crate) fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path.join(LOCK)) else {
        return false;
    };
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// Tries a few times: whoever asks whether the folder is written holds the lock for an instant.
fn try_lock(file: &File) -> std::result::Result<(), TryLockError> {
    for _ in 1..N_LOCK_TRIES {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::park_timeout(LOCK_PAUSE),
            other => return other,
        }
    }
    file.try_lock()
}

fn take_lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(Error::io("open", &path))?;
    match try_lock(&file) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let holder = match file.read_to_string(&mut pid) {
                Ok(n) if n > 0 => format!("process {}", pid.trim()),
                _ => "another process".to_owned(),
            };
            return Err(Error::Locked {
                path: dir.to_owned(),
                holder,
            });
        }
        Err(TryLockError::Error(source)) => return Err(Error::io("lock", &path)(source)),
    }
    // The process id is for the message alone; the lock itself is the operating system's.
    let written = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| write!(file, "{}", std::process::id()));
    written.map_err(Error::io("write", &path))?;
    Ok(file)
}
