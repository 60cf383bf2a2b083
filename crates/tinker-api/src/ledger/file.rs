//! The file of a ledger: taken by one process, read from the start, mended where a crash tore it.
//!
//! A process that is killed leaves at most a torn last line. A power cut may lose anything that was
//! written since the last sync, in any order: bytes in the middle of it may be zero, with whole
//! lines after them. So a ledger says from time to time how much of it is on the disk
//! ([`Record::Synced`]). A line that is not whole ends the ledger, and what follows it is removed,
//! unless the ledger says further down that this line was on the disk: then the file is damaged.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::LedgerError;
use super::record::{CHECK_LEN, Chain, FORMAT, Fault, Record, synced_by};

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
    /// Size of the file.
    pub(super) n_bytes: u64,
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
            n_bytes: end,
            lock,
        };
        ledger.cut_to(end)?;
        if end == 0 {
            ledger.begin()?;
        }
        Ok(ledger)
    }

    /// Removes what follows the last line that counts, and goes to the end.
    fn cut_to(&mut self, end: u64) -> Result<(), LedgerError> {
        let io = || LedgerError::io("mend", &self.path);
        let n_bytes = self.file.metadata().map_err(io())?.len();
        if n_bytes > end {
            let n_torn = n_bytes - end;
            let path = self.path.display();
            tracing::warn!(%path, n_torn, "the end of the ledger is torn and was removed");
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
        self.n_bytes = line.len() as u64;
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

/// Reads all lines up to the first that is not whole; where the last of them ends.
fn read(
    path: &Path,
    file: &File,
    chain: &mut Chain,
    found: &mut impl FnMut(Record, Place) -> Result<(), String>,
) -> Result<u64, LedgerError> {
    let mut lines = Lines {
        path,
        reader: BufReader::new(file),
        line: Vec::new(),
    };
    let (mut end, mut number) = (0_u64, 0_u64);
    while let Some(line) = lines.next()? {
        // Somebody else's file is not mended.
        if !line.is_whole && (end > 0 || first_line().starts_with(line.bytes)) {
            return Ok(end);
        }
        number += 1;
        let damaged = |reason: String| LedgerError::Damaged {
            path: path.to_owned(),
            line: number,
            reason,
        };
        let n_read = line.n_read();
        match chain.read(line.bytes) {
            Ok(record) => {
                check_format(path, number, &record)?;
                let place = Place {
                    offset: end + CHECK_LEN as u64 + 1,
                    len: line.bytes.len() as u64 - CHECK_LEN as u64 - 1,
                };
                found(record, place).map_err(damaged)?;
            }
            Err(fault @ Fault::Check) => {
                if number == 1 || lines.say_synced_beyond(end)? {
                    return Err(damaged(fault.to_string()));
                }
                return Ok(end);
            }
            Err(fault @ Fault::Meaning(_)) => return Err(damaged(fault.to_string())),
        }
        end += n_read;
    }
    Ok(end)
}

/// The lines of a ledger from where its reader is.
struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<&'a File>,
    line: Vec<u8>,
}

/// A line without its end.
struct Line<'a> {
    bytes: &'a [u8],
    is_whole: bool,
}

impl Line<'_> {
    const fn n_read(&self) -> u64 {
        self.bytes.len() as u64 + self.is_whole as u64
    }
}

impl Lines<'_> {
    fn next(&mut self) -> Result<Option<Line<'_>>, LedgerError> {
        self.line.clear();
        let n_read = self
            .reader
            .read_until(b'\n', &mut self.line)
            .map_err(LedgerError::io("read", self.path))?;
        let is_whole = self.line.pop_if(|last| *last == b'\n').is_some();
        Ok((n_read > 0).then_some(Line {
            bytes: &self.line,
            is_whole,
        }))
    }

    /// Whether one of the remaining lines says that the byte at `offset` was on the disk.
    fn say_synced_beyond(&mut self, offset: u64) -> Result<bool, LedgerError> {
        while let Some(line) = self.next()? {
            if synced_by(line.bytes).is_some_and(|n_bytes| n_bytes > offset) {
                return Ok(true);
            }
        }
        Ok(false)
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
        Record::Ledger { format } if *format != FORMAT => Err(LedgerError::OtherFormat {
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
