//! An append-only log in numbered segment files, each record framed by its length and checksum.
//!
//! A record is `[length: u32][BLAKE3 of the payload: 32 bytes][payload]`, little-endian; the payload
//! is `[header length: u32][header: JSON][body]`. Writing to the operating system is enough against a
//! killed process; [`Syncer`] makes groups of records durable against a power cut a moment later.
//!
//! A killed process leaves at most a torn last record. A power cut may lose anything written since the
//! last sync, in any order: there may be zeros in the middle and whole records after them. So every
//! header says how much of its segment was on the disk before it was written. A record that is not
//! whole ends the log and what follows it is removed, unless a later one says that it was on the disk:
//! then the file is damaged, and the log is not opened, lest the later ones be lost without a word.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::disk::{Disk, create_dir, sync_dir};
use crate::error::{Error, Result};

const FRAME_HEAD: usize = 4 + blake3::OUT_LEN;
/// No record is larger than a request body or a result can be.
const MAX_PAYLOAD: usize = 1 << 30;
/// Largest body of a record, which leaves room for any header.
pub(crate) const MAX_BODY: usize = MAX_PAYLOAD - (64 << 10);

/// Where a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Location {
    /// Number of the segment file.
    pub(crate) segment: u64,
    offset: u64,
}

#[cfg(test)]
impl Location {
    pub(crate) const fn new(segment: u64, offset: u64) -> Self {
        Self { segment, offset }
    }
}

/// A record as it is read back.
#[derive(Debug)]
pub(crate) struct Record<H> {
    pub(crate) header: H,
    pub(crate) location: Location,
}

/// A header as it is written.
#[derive(Serialize)]
struct Stamped<'a, H> {
    /// Bytes of the segment that were on the disk before.
    #[serde(skip_serializing_if = "is_zero")]
    synced: u64,
    #[serde(flatten)]
    header: &'a H,
}

/// What [`Stamped`] adds to a header; absent in logs of earlier versions.
#[derive(Deserialize)]
struct Stamp {
    #[serde(default)]
    synced: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the shape that serde asks for"
)]
const fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// A log open for appending.
#[derive(Debug)]
pub(crate) struct SegmentLog {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    syncer: Syncer,
    segment: u64,
    tail: Arc<Tail>,
    len: u64,
    broken: bool,
}

/// The segment that is written to.
#[derive(Debug)]
struct Tail {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: File,
    /// Bytes that are on the disk for sure.
    synced: AtomicU64,
}

impl Tail {
    fn open(disk: &Arc<dyn Disk>, path: PathBuf, synced: u64) -> Result<Self> {
        Ok(Self {
            disk: Arc::clone(disk),
            file: open_append(&path)?,
            path,
            synced: AtomicU64::new(synced),
        })
    }

    /// Makes the first `len` bytes durable, which were written.
    fn sync_to(&self, len: u64) -> Result<()> {
        let synced = self.disk.sync(&self.file, &self.path);
        synced.map_err(|e| Error::io("write", &self.path, e))?;
        self.synced.fetch_max(len, Ordering::Relaxed);
        Ok(())
    }
}

impl SegmentLog {
    /// Opens or creates the log of a directory and hands each record to `visit` in order.
    ///
    /// A torn record is cut off with what follows it, unless it was on the disk.
    ///
    /// # Errors
    /// If the directory cannot be read or written; [`Error::Corrupt`] if a record that was on the disk
    /// is damaged, with its place. Nothing is changed then.
    pub(crate) fn open<H: DeserializeOwned>(
        disk: Arc<dyn Disk>,
        syncer: Syncer,
        dir: &Path,
        mut visit: impl FnMut(Record<H>) -> Result<()>,
    ) -> Result<Self> {
        create_dir(disk.as_ref(), dir)?;
        let segments = segments(dir)?;
        let (mut len, mut synced) = (0, 0);
        for (i, &segment) in segments.iter().enumerate() {
            let path = segment_path(dir, segment);
            (len, synced) = read_segment(disk.as_ref(), &path, segment, &mut visit)?;
            let actual = fs::metadata(&path)
                .map_err(|e| Error::io("read", &path, e))?
                .len();
            if len == actual {
                continue;
            }
            // A segment is begun when all before it is on the disk.
            if !are_empty(dir, segments.iter().skip(i + 1))? {
                return Err(damaged(path, len, "later segments follow it"));
            }
            if let Some(witness) = says_synced_beyond(disk.as_ref(), &path, len)? {
                let says = format!("the one at byte {witness} says that it was on the disk");
                return Err(damaged(path, len, &says));
            }
            tracing::warn!(
                path = %path.display(),
                at = len,
                n_bytes = actual - len,
                "cutting off the end of a log, which never was on the disk whole"
            );
            truncate(&path, len)?;
        }
        let segment = segments.last().copied().unwrap_or(1);
        let tail = Tail::open(&disk, segment_path(dir, segment), synced)?;
        sync_dir(dir).map_err(|e| Error::io("write", dir, e))?;
        Ok(Self {
            dir: dir.to_owned(),
            disk,
            syncer,
            segment,
            tail: Arc::new(tail),
            len,
            broken: false,
        })
    }

    /// Appends a record. When this returns, the operating system has it.
    ///
    /// # Errors
    /// If the disk refuses; the log is as it was.
    pub(crate) fn append<H: Serialize>(&mut self, header: &H, body: &[u8]) -> Result<Location> {
        self.mend()?;
        let synced = self.tail.synced.load(Ordering::Relaxed);
        let frame = frame(&Stamped { synced, header }, body)?;
        let path = &self.tail.path;
        // The handle is shared with the syncer, and appending needs one of its own.
        let handle = self.tail.file.try_clone();
        let mut handle = handle.map_err(|e| Error::io("write", path, e))?;
        if let Err(source) = self.disk.append(&mut handle, path, &frame) {
            self.broken = self.disk.truncate(&handle, self.len).is_err();
            return Err(Error::io("write", path, source));
        }
        let location = Location {
            segment: self.segment,
            offset: self.len,
        };
        self.len += frame.len() as u64;
        self.syncer.request(&self.tail, self.len);
        Ok(location)
    }

    /// Starts a new segment and returns its number.
    ///
    /// # Errors
    /// If the file cannot be made; the log goes on in the old segment.
    pub(crate) fn rotate(&mut self) -> Result<u64> {
        self.mend()?;
        if self.len == 0 {
            return Ok(self.segment);
        }
        self.sync()?;
        let path = segment_path(&self.dir, self.segment + 1);
        let tail = Tail::open(&self.disk, path, 0)?;
        sync_dir(&self.dir).map_err(|e| Error::io("write", &self.dir, e))?;
        self.segment += 1;
        self.tail = Arc::new(tail);
        self.len = 0;
        Ok(self.segment)
    }

    /// Cuts off what an earlier write left half done. Nothing may follow it: at the next start it
    /// ends the log.
    fn mend(&mut self) -> Result<()> {
        if self.broken {
            let cut = self.disk.truncate(&self.tail.file, self.len);
            cut.map_err(|e| Error::io("write", &self.tail.path, e))?;
            self.broken = false;
        }
        Ok(())
    }

    /// Removes all segments before `segment`.
    ///
    /// # Errors
    /// If a file cannot be removed.
    pub(crate) fn remove_before(&mut self, segment: u64) -> Result<()> {
        for old in segments(&self.dir)? {
            if old < segment.min(self.segment) {
                let path = segment_path(&self.dir, old);
                fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
            }
        }
        Ok(())
    }

    /// Number of the segment that is written to.
    pub(crate) const fn segment(&self) -> u64 {
        self.segment
    }

    /// Bytes in the segment that is written to.
    pub(crate) const fn segment_bytes(&self) -> u64 {
        self.len
    }

    /// Reads a record's body back.
    ///
    /// # Errors
    /// If it is gone or damaged.
    pub(crate) fn read_body(&self, location: Location) -> Result<Vec<u8>> {
        let path = segment_path(&self.dir, location.segment);
        let fault = |e| Error::io("read", &path, e);
        let mut file = self.disk.open(&path).map_err(fault)?;
        file.seek(SeekFrom::Start(location.offset)).map_err(fault)?;
        let payload = read_frame(&mut file).map_err(fault)?;
        payload
            .and_then(|payload| split(payload).map(|(_header, body)| body))
            .ok_or_else(|| Error::Corrupt {
                message: format!("the record at byte {} fails its checksum", location.offset),
                path: path.clone(),
            })
    }

    /// Makes all records durable now.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn sync(&self) -> Result<()> {
        self.tail.sync_to(self.len)
    }
}

fn segment_path(dir: &Path, segment: u64) -> PathBuf {
    dir.join(format!("{segment:08}.seg"))
}

/// The segment numbers of a directory, ascending.
fn segments(dir: &Path) -> Result<Vec<u64>> {
    let fault = |e| Error::io("read", dir, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(fault)? {
        let name = entry.map_err(fault)?.file_name();
        let number = name.to_str().and_then(|n| n.strip_suffix(".seg"));
        found.extend(number.and_then(|n| n.parse::<u64>().ok()));
    }
    found.sort_unstable();
    Ok(found)
}

/// Whether segments hold nothing: a start of a new one that failed leaves such, and the log goes on
/// before them.
fn are_empty<'a>(dir: &Path, mut segments: impl Iterator<Item = &'a u64>) -> Result<bool> {
    segments.try_fold(true, |all, segment| {
        let path = segment_path(dir, *segment);
        let metadata = fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?;
        Ok(all && metadata.len() == 0)
    })
}

fn open_append(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path).map_err(|e| Error::io("write", path, e))
}

/// Damage that no crash explains. Who opens the log knows what to do about it.
fn damaged(path: PathBuf, offset: u64, why: &str) -> Error {
    Error::Corrupt {
        message: format!("the record at byte {offset} fails its checksum, and {why}"),
        path,
    }
}

/// Where the first whole record is that says that the byte at `offset` was on the disk before it, if
/// there is one.
fn says_synced_beyond(disk: &dyn Disk, path: &Path, offset: u64) -> Result<Option<u64>> {
    let fault = |e| Error::io("read", path, e);
    let mut file = disk.open(path).map_err(fault)?;
    file.seek(SeekFrom::Start(offset)).map_err(fault)?;
    let mut rest = Vec::new();
    file.read_to_end(&mut rest).map_err(fault)?;
    let mut at = 1;
    while let Some(bytes) = rest.get(at..).filter(|bytes| !bytes.is_empty()) {
        let Some((n_bytes, stamp)) = whole_record(bytes) else {
            at += 1;
            continue;
        };
        if stamp.synced > offset {
            return Ok(Some(offset + at as u64));
        }
        // What is within its body is somebody's data.
        at += n_bytes;
    }
    Ok(None)
}

/// Size and stamp of the whole record that bytes begin with.
fn whole_record(bytes: &[u8]) -> Option<(usize, Stamp)> {
    let (head, rest) = bytes.split_at_checked(FRAME_HEAD)?;
    let payload = rest.get(..read_u32(head)?)?;
    let header = payload.get(4..read_u32(payload)?.checked_add(4)?)?;
    // Cheap, and enough at nearly every place where there is none.
    let stamp = serde_json::from_slice(header).ok()?;
    let is_whole = blake3::hash(payload).as_bytes()[..] == head[4..];
    is_whole.then_some((FRAME_HEAD + payload.len(), stamp))
}

fn read_u32(bytes: &[u8]) -> Option<usize> {
    let first: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
    Some(u32::from_le_bytes(first) as usize)
}

fn truncate(path: &Path, len: u64) -> Result<()> {
    let fault = |e| Error::io("write", path, e);
    let file = OpenOptions::new().write(true).open(path).map_err(fault)?;
    file.set_len(len).map_err(fault)?;
    file.sync_data().map_err(fault)
}

/// Reads records until the end or the first broken one; returns the length of what was good, and how
/// much of it is known to be on the disk.
fn read_segment<H: DeserializeOwned>(
    disk: &dyn Disk,
    path: &Path,
    segment: u64,
    visit: &mut impl FnMut(Record<H>) -> Result<()>,
) -> Result<(u64, u64)> {
    let file = disk.open(path).map_err(|e| Error::io("read", path, e))?;
    let mut reader = std::io::BufReader::with_capacity(1 << 20, file);
    let (mut offset, mut synced) = (0, 0);
    while let Some(payload) = read_frame(&mut reader).map_err(|e| Error::io("read", path, e))? {
        let n_bytes = (FRAME_HEAD + payload.len()) as u64;
        let parsed = split(payload).and_then(|(header, _body)| {
            let stamp: Stamp = serde_json::from_slice(&header).ok()?;
            Some((stamp, serde_json::from_slice(&header).ok()?))
        });
        let Some((stamp, header)) = parsed else {
            return Err(Error::Newer {
                path: path.to_owned(),
                message: format!(
                    "the record at byte {offset} was written by another version: use a newer tinker"
                ),
            });
        };
        let location = Location { segment, offset };
        visit(Record { header, location })?;
        offset += n_bytes;
        synced = stamp.synced.max(synced);
    }
    Ok((offset, synced))
}

/// The next payload, or `None` at the end and at a torn or damaged record.
fn read_frame(reader: &mut impl Read) -> std::io::Result<Option<Vec<u8>>> {
    let mut head = [0; FRAME_HEAD];
    if !read_full(reader, &mut head)? {
        return Ok(None);
    }
    let (len, checksum) = head.split_at(4);
    let len = u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize;
    if len > MAX_PAYLOAD {
        return Ok(None);
    }
    // Grown while reading, so that a damaged length cannot ask for memory that is not there.
    let mut payload = Vec::new();
    let n_read = reader.take(len as u64).read_to_end(&mut payload)?;
    let whole = n_read == len && blake3::hash(&payload).as_bytes()[..] == *checksum;
    Ok(whole.then_some(payload))
}

/// Fills `buffer`; false if the input ends before.
fn read_full(reader: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<bool> {
    match reader.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Splits a payload into header and body.
fn split(mut payload: Vec<u8>) -> Option<(Vec<u8>, Vec<u8>)> {
    let head: [u8; 4] = payload.get(..4)?.try_into().ok()?;
    let n_header = u32::from_le_bytes(head) as usize;
    let end = n_header
        .checked_add(4)
        .filter(|&end| end <= payload.len())?;
    let body = payload.split_off(end);
    Some((payload.split_off(4), body))
}

fn frame<H: Serialize>(header: &H, body: &[u8]) -> Result<Vec<u8>> {
    let header = serde_json::to_vec(header).map_err(|e| Error::Invalid(e.to_string()))?;
    let n_payload = 4 + header.len() + body.len();
    let len = u32::try_from(n_payload)
        .ok()
        .filter(|_| n_payload <= MAX_PAYLOAD)
        .ok_or_else(|| Error::Invalid(format!("a record of {n_payload} bytes is too large")))?;
    let mut frame = Vec::with_capacity(FRAME_HEAD + n_payload);
    frame.extend_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(&[0; blake3::OUT_LEN]);
    frame.extend_from_slice(&(header.len() as u32).to_le_bytes());
    frame.extend_from_slice(&header);
    frame.extend_from_slice(body);
    let checksum = blake3::hash(&frame[FRAME_HEAD..]);
    frame[4..FRAME_HEAD].copy_from_slice(checksum.as_bytes());
    Ok(frame)
}

/// Segments that were written to, by path, each with its length then.
type Dirty = HashMap<PathBuf, (Arc<Tail>, u64)>;

/// Syncs logs on a thread of its own; requests that arrive during a sync share the next one.
#[derive(Debug, Clone)]
pub(crate) struct Syncer {
    dirty: Arc<Mutex<Dirty>>,
    wake: Sender<()>,
}

impl Syncer {
    /// Starts the thread; it ends with the last clone.
    pub(crate) fn start() -> Self {
        let dirty: Arc<Mutex<Dirty>> = Arc::default();
        let (wake, woken) = mpsc::channel();
        let shared = Arc::clone(&dirty);
        let run = move || {
            while woken.recv().is_ok() {
                let group =
                    std::mem::take(&mut *shared.lock().unwrap_or_else(PoisonError::into_inner));
                for (tail, len) in group.into_values() {
                    if let Err(error) = tail.sync_to(len) {
                        tracing::error!(error = error.with_causes(), "cannot sync the log");
                    }
                }
            }
        };
        if let Err(error) = std::thread::Builder::new()
            .name("log-sync".into())
            .spawn(run)
        {
            tracing::error!(%error, "no thread to sync logs: a power cut may lose more than a group");
        }
        Self { dirty, wake }
    }

    fn request(&self, tail: &Arc<Tail>, len: u64) {
        let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = (Arc::clone(tail), len);
        if dirty.insert(tail.path.clone(), entry).is_none() {
            // Without its thread the syncer has said so already.
            let _ = self.wake.send(());
        }
    }
}

#[cfg(test)]
mod tests;
