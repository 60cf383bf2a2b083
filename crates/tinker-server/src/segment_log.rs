//! An append-only log in numbered segment files, each record framed by its length and checksum.
//!
//! A record is `[length: u32][BLAKE3 of the payload: 32 bytes][payload]`, little-endian; the payload
//! is `[header length: u32][header: JSON][body]`. A record that was cut short by a crash ends the
//! log; everything before it is kept. One that others follow is damage, not a crash: the log is not
//! opened, lest they be lost without a word. Writing to the operating system is enough against a killed
//! process; [`Syncer`] makes groups of records durable against a power cut a moment later.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};

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

/// A log open for appending.
#[derive(Debug)]
pub(crate) struct SegmentLog {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    syncer: Syncer,
    segment: u64,
    file: Arc<File>,
    len: u64,
    broken: bool,
}

impl SegmentLog {
    /// Opens or creates the log of a directory and hands each record to `visit` in order.
    ///
    /// A torn record at the end is cut off.
    ///
    /// # Errors
    /// If the directory cannot be read or written; [`Error::Corrupt`] if a record before the end is
    /// damaged, with the place of the next whole one. Nothing is changed then.
    pub(crate) fn open<H: DeserializeOwned>(
        disk: Arc<dyn Disk>,
        syncer: Syncer,
        dir: &Path,
        mut visit: impl FnMut(Record<H>) -> Result<()>,
    ) -> Result<Self> {
        create_dir(disk.as_ref(), dir)?;
        let segments = segments(dir)?;
        let mut len = 0;
        for (i, &segment) in segments.iter().enumerate() {
            let path = segment_path(dir, segment);
            len = read_segment(disk.as_ref(), &path, segment, &mut visit)?;
            let actual = fs::metadata(&path)
                .map_err(|e| Error::io("read", &path, e))?
                .len();
            if len == actual {
                continue;
            }
            if !are_empty(dir, segments.iter().skip(i + 1))? {
                return Err(damaged(path, len, "later segments follow it"));
            }
            if let Some(next) = next_whole_record(disk.as_ref(), &path, len)? {
                return Err(damaged(
                    path,
                    len,
                    &format!("whole records follow it from byte {next} on"),
                ));
            }
            tracing::warn!(path = %path.display(), at = len, "cutting off a torn record");
            truncate(&path, len)?;
        }
        let segment = segments.last().copied().unwrap_or(1);
        let file = Arc::new(open_append(&segment_path(dir, segment))?);
        sync_dir(dir).map_err(|e| Error::io("write", dir, e))?;
        Ok(Self {
            dir: dir.to_owned(),
            disk,
            syncer,
            segment,
            file,
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
        let path = segment_path(&self.dir, self.segment);
        let frame = frame(header, body)?;
        // The handle is shared with the syncer, and appending needs one of its own.
        let mut handle = self
            .file
            .try_clone()
            .map_err(|e| Error::io("write", &path, e))?;
        if let Err(source) = self.disk.append(&mut handle, &path, &frame) {
            self.broken = self.disk.truncate(&handle, self.len).is_err();
            return Err(Error::io("write", &path, source));
        }
        let location = Location {
            segment: self.segment,
            offset: self.len,
        };
        self.len += frame.len() as u64;
        self.syncer.request(path, &self.file);
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
        let file = open_append(&path)?;
        sync_dir(&self.dir).map_err(|e| Error::io("write", &self.dir, e))?;
        self.segment += 1;
        self.file = Arc::new(file);
        self.len = 0;
        Ok(self.segment)
    }

    /// Cuts off what an earlier write left half done. Nothing may follow it: at the next start it
    /// ends the log.
    fn mend(&mut self) -> Result<()> {
        if self.broken {
            let cut = self.disk.truncate(&self.file, self.len);
            cut.map_err(|e| Error::io("write", &segment_path(&self.dir, self.segment), e))?;
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
        self.file
            .sync_data()
            .map_err(|e| Error::io("write", &segment_path(&self.dir, self.segment), e))
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

/// Damage that no crash explains, with what to do about it.
fn damaged(path: PathBuf, offset: u64, what_follows: &str) -> Error {
    Error::Corrupt {
        message: format!(
            "the record at byte {offset} fails its checksum and {what_follows}; put the file back from a backup, or cut it to {offset} bytes to give up everything from there on"
        ),
        path,
    }
}

/// Where the first whole record after byte `offset` begins, if there is one: a write that a crash cut
/// short has none after it.
fn next_whole_record(disk: &dyn Disk, path: &Path, offset: u64) -> Result<Option<u64>> {
    let fault = |e| Error::io("read", path, e);
    let mut file = disk.open(path).map_err(fault)?;
    file.seek(SeekFrom::Start(offset)).map_err(fault)?;
    let mut rest = Vec::new();
    file.read_to_end(&mut rest).map_err(fault)?;
    let mut starts = (1..rest.len()).filter(|&at| whole_payload(&rest[at..]).is_some());
    Ok(starts.next().map(|at| offset + at as u64))
}

/// The payload of the whole record that bytes begin with.
fn whole_payload(bytes: &[u8]) -> Option<&[u8]> {
    let (head, rest) = bytes.split_at_checked(FRAME_HEAD)?;
    let payload = rest.get(..read_u32(head)?)?;
    let header = payload.get(4..read_u32(payload)?.checked_add(4)?)?;
    // Cheap, and enough at nearly every place where there is none.
    serde_json::from_slice::<IgnoredAny>(header).ok()?;
    (blake3::hash(payload).as_bytes()[..] == head[4..]).then_some(payload)
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

/// Reads records until the end or the first broken one; returns the length of what was good.
fn read_segment<H: DeserializeOwned>(
    disk: &dyn Disk,
    path: &Path,
    segment: u64,
    visit: &mut impl FnMut(Record<H>) -> Result<()>,
) -> Result<u64> {
    let file = disk.open(path).map_err(|e| Error::io("read", path, e))?;
    let mut reader = std::io::BufReader::with_capacity(1 << 20, file);
    let mut offset = 0;
    while let Some(payload) = read_frame(&mut reader).map_err(|e| Error::io("read", path, e))? {
        let n_bytes = (FRAME_HEAD + payload.len()) as u64;
        let parsed =
            split(payload).and_then(|(header, _body)| serde_json::from_slice(&header).ok());
        let Some(header) = parsed else {
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
    }
    Ok(offset)
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

/// Syncs logs on a thread of its own; requests that arrive during a sync share the next one.
#[derive(Debug, Clone)]
pub(crate) struct Syncer {
    dirty: Arc<Mutex<HashMap<PathBuf, Arc<File>>>>,
    wake: Sender<()>,
}

impl Syncer {
    /// Starts the thread; it ends with the last clone.
    pub(crate) fn start() -> Self {
        let dirty: Arc<Mutex<HashMap<PathBuf, Arc<File>>>> = Arc::default();
        let (wake, woken) = mpsc::channel();
        let shared = Arc::clone(&dirty);
        let run = move || {
            while woken.recv().is_ok() {
                let group =
                    std::mem::take(&mut *shared.lock().unwrap_or_else(PoisonError::into_inner));
                for (path, file) in group {
                    if let Err(error) = file.sync_data() {
                        tracing::error!(path = %path.display(), %error, "cannot sync the log");
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

    fn request(&self, path: PathBuf, file: &Arc<File>) {
        let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        if dirty.insert(path, Arc::clone(file)).is_none() {
            // Without its thread the syncer has said so already.
            let _ = self.wake.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::OsDisk;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn open(dir: &Path) -> (SegmentLog, Vec<(u64, Vec<u8>)>) {
        let mut found = Vec::new();
        let visit = |record: Record<u64>| {
            found.push((record.header, record.location));
            Ok(())
        };
        let log = SegmentLog::open(Arc::new(OsDisk), Syncer::start(), dir, visit).unwrap();
        let read = |(header, at)| (header, log.read_body(at).unwrap());
        let seen = found.into_iter().map(read).collect();
        (log, seen)
    }

    #[test]
    fn records_come_back_in_order_over_segments() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path());
        log.append(&1_u64, b"one").unwrap();
        log.rotate().unwrap();
        let at = log.append(&2_u64, b"two").unwrap();
        drop(log);

        let (log, seen) = open(dir.path());

        assert_eq!(seen, [(1, b"one".to_vec()), (2, b"two".to_vec())]);
        assert_eq!(log.read_body(at).unwrap(), b"two");
    }

    #[test]
    fn removed_segments_are_gone_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path());
        let old = log.append(&1_u64, b"one").unwrap();
        let cut = log.rotate().unwrap();
        log.append(&2_u64, b"two").unwrap();

        log.remove_before(cut).unwrap();

        assert!(log.read_body(old).is_err());
        drop(log);
        assert_eq!(open(dir.path()).1, [(2, b"two".to_vec())]);
    }

    #[test]
    fn damage_before_the_last_segment_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path());
        log.append(&1_u64, &[7; 100]).unwrap();
        log.rotate().unwrap();
        log.append(&2_u64, b"two").unwrap();
        drop(log);
        let path = segment_path(dir.path(), 1);
        let mut bytes = fs::read(&path).unwrap();
        bytes[80] ^= 1;
        fs::write(&path, bytes).unwrap();

        let result = SegmentLog::open(
            Arc::new(OsDisk),
            Syncer::start(),
            dir.path(),
            |_: Record<u64>| Ok(()),
        );

        let error = result.unwrap_err().to_string();
        assert!(error.contains("fails its checksum"), "{error}");
    }

    /// Opens a log of three records whose bytes `change` was let at; what is wrong, and its bytes.
    fn refusal(change: impl FnOnce(&mut Vec<u8>, usize)) -> (String, bool) {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path());
        log.append(&1_u64, b"one").unwrap();
        let second = log.segment_bytes();
        log.append(&2_u64, &[7; 100]).unwrap();
        log.append(&3_u64, b"three").unwrap();
        drop(log);
        let path = segment_path(dir.path(), 1);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes, second as usize);
        fs::write(&path, &bytes).unwrap();

        let result = SegmentLog::open(
            Arc::new(OsDisk),
            Syncer::start(),
            dir.path(),
            |_: Record<u64>| Ok(()),
        );

        let unchanged = fs::read(&path).unwrap() == bytes;
        (
            result.map_or_else(|e| e.to_string(), |_| String::new()),
            unchanged,
        )
    }

    #[test]
    fn damage_before_a_whole_record_is_an_error_and_loses_nothing() {
        let n_first = FRAME_HEAD + 5 + 3;
        let next = n_first + FRAME_HEAD + 5 + 100;
        let expected = format!(
            "the record at byte {n_first} fails its checksum and whole records follow it from byte {next} on"
        );

        let in_body = refusal(|bytes, at| bytes[at + 80] ^= 1);
        assert!(in_body.0.contains(&expected), "{}", in_body.0);
        let length = refusal(|bytes, at| bytes[at + 2] = 0x10);
        assert!(length.0.contains(&expected), "{}", length.0);
        let zeros = refusal(|bytes, at| bytes[at..at + 120].fill(0));
        assert!(zeros.0.contains(&expected), "{}", zeros.0);
        assert!(in_body.0.contains("00000001.seg"), "{}", in_body.0);
        assert!(in_body.0.contains("from a backup"), "{}", in_body.0);
        assert!(in_body.1 && length.1 && zeros.1, "the file was changed");
    }

    #[test]
    fn a_damaged_last_record_is_cut_off_like_a_torn_one() {
        let (refusal, unchanged) = refusal(|bytes, _| {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        });

        assert_eq!(refusal, "");
        assert!(!unchanged, "it is still there");
    }

    #[test]
    fn a_torn_record_before_an_empty_segment_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path());
        log.append(&1_u64, b"one").unwrap();
        log.append(&2_u64, b"two").unwrap();
        let torn = log.segment_bytes() - 1;
        drop(log);
        truncate(&segment_path(dir.path(), 1), torn).unwrap();
        fs::write(segment_path(dir.path(), 2), b"").unwrap();

        let (mut log, seen) = open(dir.path());

        assert_eq!(seen, [(1, b"one".to_vec())]);
        log.append(&3_u64, b"three").unwrap();
        drop(log);
        let numbers: Vec<u64> = open(dir.path()).1.into_iter().map(|(h, _)| h).collect();
        assert_eq!(numbers, [1, 3]);
    }

    /// A disk that leaves records half written and cannot cut them off while its switch is on.
    #[derive(Debug, Default)]
    struct StuckDisk(AtomicBool);

    impl Disk for StuckDisk {
        fn create_dir_all(&self, path: &Path) -> std::io::Result<()> {
            OsDisk.create_dir_all(path)
        }
        fn write_new(&self, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
            OsDisk.write_new(path, bytes)
        }
        fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
            if self.0.load(Ordering::SeqCst) {
                OsDisk.append(file, path, &bytes[..bytes.len() / 2])?;
                return Err(std::io::Error::from_raw_os_error(5));
            }
            OsDisk.append(file, path, bytes)
        }
        fn truncate(&self, file: &File, len: u64) -> std::io::Result<()> {
            if self.0.load(Ordering::SeqCst) {
                return Err(std::io::Error::from_raw_os_error(5));
            }
            OsDisk.truncate(file, len)
        }
        fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
            OsDisk.rename(from, to)
        }
    }

    #[test]
    fn a_record_that_could_not_be_cut_off_is_once_the_disk_is_well() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(StuckDisk::default());
        let opened = SegmentLog::open(
            disk.clone(),
            Syncer::start(),
            dir.path(),
            |_: Record<u64>| Ok(()),
        );
        let mut log = opened.unwrap();
        log.append(&1_u64, b"one").unwrap();
        disk.0.store(true, Ordering::SeqCst);
        assert!(log.append(&2_u64, b"two").is_err());
        assert!(log.append(&2_u64, b"two").is_err());
        assert!(log.rotate().is_err(), "nothing may follow half a record");

        disk.0.store(false, Ordering::SeqCst);
        log.append(&3_u64, b"three").unwrap();
        log.rotate().unwrap();
        log.append(&4_u64, b"four").unwrap();

        drop(log);
        let numbers: Vec<u64> = open(dir.path()).1.into_iter().map(|(h, _)| h).collect();
        assert_eq!(numbers, [1, 3, 4]);
    }

    /// A disk that takes a few more bytes and is full then.
    #[derive(Debug)]
    struct FullDisk;

    impl Disk for FullDisk {
        fn create_dir_all(&self, path: &Path) -> std::io::Result<()> {
            OsDisk.create_dir_all(path)
        }
        fn write_new(&self, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
            OsDisk.write_new(path, bytes)
        }
        fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
            if bytes.len() < 100 {
                return OsDisk.append(file, path, bytes);
            }
            OsDisk.append(file, path, &bytes[..50])?;
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn truncate(&self, file: &File, len: u64) -> std::io::Result<()> {
            OsDisk.truncate(file, len)
        }
        fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
            OsDisk.rename(from, to)
        }
    }

    #[test]
    fn a_full_disk_leaves_the_log_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let opened = SegmentLog::open(
            Arc::new(FullDisk),
            Syncer::start(),
            dir.path(),
            |_: Record<u64>| Ok(()),
        );
        let mut log = opened.unwrap();
        log.append(&1_u64, b"small").unwrap();

        let error = log.append(&2_u64, &[0; 200]).unwrap_err();
        log.append(&3_u64, b"small").unwrap();

        assert!(error.to_string().contains("disk is full"), "{error}");
        drop(log);
        let seen: Vec<u64> = open(dir.path()).1.into_iter().map(|(h, _)| h).collect();
        assert_eq!(seen, [1, 3]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_log_cut_anywhere_keeps_every_whole_record(
            sizes in proptest::collection::vec(0_usize..300, 1..8),
            cut in 0.0_f64..1.0,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (mut log, _) = open(dir.path());
            let mut ends = Vec::new();
            for (i, &n) in sizes.iter().enumerate() {
                log.append(&(i as u64), &vec![i as u8; n]).unwrap();
                ends.push(log.segment_bytes());
            }
            let at = (log.segment_bytes() as f64 * cut) as u64;
            drop(log);
            truncate(&segment_path(dir.path(), 1), at).unwrap();

            let (mut log, seen) = open(dir.path());

            prop_assert_eq!(seen.len(), ends.iter().filter(|&&end| end <= at).count());
            log.append(&99_u64, b"after").unwrap();
            drop(log);
            let seen = open(dir.path()).1;
            prop_assert_eq!(seen.last().unwrap(), &(99, b"after".to_vec()));
        }
    }
}
