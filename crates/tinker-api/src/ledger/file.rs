//! The file of a ledger: taken by one process, read from the start, mended if its last line is torn.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::LedgerError;
use super::record::{CHECK_LEN, Chain, FORMAT, Record};

/// How often the lock is tried, and how long is waited between: the process before may be about to
/// end.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(25);

/// Where in the file the JSON of a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    offset: u64,
    len: u64,
}

/// A ledger that this process holds, at its end.
#[derive(Debug)]
pub(super) struct LedgerFile {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) chain: Chain,
    /// Held until dropped; the operating system gives it back when the process dies.
    pub(super) lock: File,
}

impl LedgerFile {
    /// Opens or creates the ledger at `path` and tells `found` of every record in it.
    pub(super) fn open(
        path: &Path,
        mut found: impl FnMut(Record, Place) -> Result<(), String>,
    ) -> Result<Self, LedgerError> {
        let lock = take_lock(path)?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .map_err(LedgerError::io("open", path))?;
        let mut chain = Chain::start();
        let end = read(path, &file, &mut chain, &mut found)?;
        let mut ledger = Self {
            path: path.to_owned(),
            file,
            chain,
            lock,
        };
        ledger.cut_to(end)?;
        if end == 0 {
            ledger.begin()?;
        }
        Ok(ledger)
    }

    /// Removes what follows the last whole line, and goes to the end.
    fn cut_to(&mut self, end: u64) -> Result<(), LedgerError> {
        let io = || LedgerError::io("mend", &self.path);
        let n_bytes = self.file.metadata().map_err(io())?.len();
        if n_bytes > end {
            let n_torn = n_bytes - end;
            let path = self.path.display();
            tracing::warn!(%path, n_torn, "the ledger's last line is torn and was removed");
            self.file.set_len(end).map_err(io())?;
            self.file.sync_all().map_err(io())?;
        }
        self.file.seek(SeekFrom::Start(end)).map_err(io())?;
        Ok(())
    }

    /// Writes the first line, durably with the file's entry in its directory.
    fn begin(&mut self) -> Result<(), LedgerError> {
        let io = || LedgerError::io("begin", &self.path);
        let mut line = Vec::new();
        self.chain
            .write(&Record::Ledger { format: FORMAT }, &mut line)
            .map_err(|error| io()(error.into()))?;
        self.file.write_all(&line).map_err(io())?;
        self.file.sync_all().map_err(io())?;
        // Not every system can open a directory; where it cannot, the file alone must do.
        if cfg!(unix) {
            File::open(directory(&self.path))
                .and_then(|directory| directory.sync_all())
                .map_err(io())?;
        }
        Ok(())
    }
}

/// Reads the record at a place.
pub(super) fn read_at(path: &Path, place: Place) -> Result<Record, LedgerError> {
    let io = || LedgerError::io("read", path);
    let mut file = File::open(path).map_err(io())?;
    file.seek(SeekFrom::Start(place.offset)).map_err(io())?;
    let mut json = Vec::new();
    file.take(place.len).read_to_end(&mut json).map_err(io())?;
    serde_json::from_slice(&json).map_err(|error| io()(error.into()))
}

/// Reads all lines; where the last whole one ends.
fn read(
    path: &Path,
    file: &File,
    chain: &mut Chain,
    found: &mut impl FnMut(Record, Place) -> Result<(), String>,
) -> Result<u64, LedgerError> {
    let n_bytes = file
        .metadata()
        .map_err(LedgerError::io("read", path))?
        .len();
    let mut reader = BufReader::new(file);
    let (mut end, mut number) = (0_u64, 0_u64);
    let mut line = Vec::new();
    loop {
        line.clear();
        let n_read = reader
            .read_until(b'\n', &mut line)
            .map_err(LedgerError::io("read", path))? as u64;
        let is_whole = line.pop_if(|last| *last == b'\n').is_some();
        // Somebody else's file is not mended.
        if !is_whole && (end > 0 || first_line().starts_with(&line)) {
            return Ok(end);
        }
        number += 1;
        let damaged = |reason: String| LedgerError::Damaged {
            path: path.to_owned(),
            line: number,
            reason,
        };
        match chain.read(&line) {
            Ok(record) => {
                check_format(path, number, &record)?;
                let place = Place {
                    offset: end + CHECK_LEN as u64 + 1,
                    len: line.len() as u64 - CHECK_LEN as u64 - 1,
                };
                found(record, place).map_err(damaged)?;
            }
            // The end of a line may be on the disk before its beginning.
            Err(super::record::Fault::Check) if end + n_read == n_bytes && number > 1 => {
                return Ok(end);
            }
            Err(fault) => return Err(damaged(fault.to_string())),
        }
        end += n_read;
    }
}

fn first_line() -> Vec<u8> {
    let mut line = Vec::new();
    // A number always serialises.
    Chain::start()
        .write(&Record::Ledger { format: FORMAT }, &mut line)
        .ok();
    line
}

fn check_format(path: &Path, number: u64, record: &Record) -> Result<(), LedgerError> {
    match record {
        Record::Ledger { format } if *format > FORMAT => Err(LedgerError::Newer {
            path: path.to_owned(),
            found: *format,
            known: FORMAT,
        }),
        Record::Ledger { .. } if number == 1 => Ok(()),
        _ if number == 1 => Err(LedgerError::Damaged {
            path: path.to_owned(),
            line: 1,
            reason: "a ledger begins otherwise".to_owned(),
        }),
        _ => Ok(()),
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}

fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

/// Takes the lock beside the ledger and writes the process id into it, for the message of others.
fn take_lock(path: &Path) -> Result<File, LedgerError> {
    let io = || LedgerError::io("lock", path);
    let lock_path = lock_path(path);
    let mut lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock_path)
        .map_err(io())?;
    match try_lock(&lock) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let pid = std::fs::read_to_string(&lock_path).unwrap_or_default();
            return Err(LedgerError::InUse {
                path: path.to_owned(),
                pid: pid.trim().parse().ok(),
            });
        }
        Err(TryLockError::Error(source)) => return Err(io()(source)),
    }
    lock.set_len(0).map_err(io())?;
    writeln!(lock, "{}", std::process::id()).map_err(io())?;
    Ok(lock)
}

fn try_lock(file: &File) -> Result<(), TryLockError> {
    for _ in 1..TRIES {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::park_timeout(PAUSE),
            done => return done,
        }
    }
    file.try_lock()
}
