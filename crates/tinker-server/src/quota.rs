//! How much of the disk the server may fill: counted as it writes, and looked up when it seems full.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::core::lock;
use crate::disk::Disk;
use crate::error::{Error, Result};

/// A disk that counts what is written to it.
#[derive(Debug)]
struct Metered {
    disk: Arc<dyn Disk>,
    n_written: Arc<AtomicU64>,
}

impl Metered {
    fn count(&self, bytes: &[u8]) {
        self.n_written
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }
}

impl Disk for Metered {
    fn open(&self, path: &Path) -> io::Result<File> {
        self.disk.open(path)
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.disk.create_dir_all(path)
    }
    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.count(bytes);
        self.disk.write_new(path, bytes)
    }
    fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.count(bytes);
        self.disk.append(file, path, bytes)
    }
    fn sync(&self, file: &File, path: &Path) -> io::Result<()> {
        self.disk.sync(file, path)
    }
    fn truncate(&self, file: &File, len: u64) -> io::Result<()> {
        self.disk.truncate(file, len)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }
}

/// The limit on what the server keeps. What is being written for a moment does not count, nor what it
/// needs to go on: results and snapshots are always written.
#[derive(Debug)]
pub(crate) struct Quota {
    /// Most bytes; `None` for as many as there are.
    limit: Option<u64>,
    root: PathBuf,
    /// What does not count.
    temp: PathBuf,
    /// At least the bytes that are there: what was counted last and all that was written since.
    at_most: Arc<AtomicU64>,
    /// Of those who are about to write, or write aside, where nobody counts.
    n_reserved: AtomicU64,
    /// How often what is there was counted.
    n_counts: AtomicU64,
    /// When what is there was counted last, and the bytes; held while it is.
    counted: Mutex<Option<(Instant, u64)>>,
    /// How long a count that refuses is good for.
    good_for: Duration,
}

/// Room that is kept for what is being written, until this is dropped: it is in its place by then, or given up.
#[derive(Debug)]
pub(crate) struct Room<'a> {
    quota: &'a Quota,
    n_bytes: u64,
    /// Counts before it.
    n_counts: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        let quota = self.quota;
        if quota.n_counts.load(Ordering::Relaxed) != self.n_counts {
            // What lay aside while it was counted is there now and was forgotten.
            quota.at_most.fetch_add(self.n_bytes, Ordering::Relaxed);
        }
        quota.n_reserved.fetch_sub(self.n_bytes, Ordering::Relaxed);
    }
}

/// Smallest limit that a server starts with: a few checkpoints of the smallest model and their logs.
const LEAST: u64 = 64 << 20;

/// Refuses a limit that nothing fits into. One below what the directory holds is taken, with a warning: deleting
/// needs a server.
///
/// # Errors
/// [`Error::Invalid`] with the limit, the least there is, and what the directory holds.
pub(crate) fn check_limit(limit: u64, root: &Path, temp: &Path) -> Result<()> {
    let used = size_of(root, temp);
    if limit < LEAST {
        return Err(Error::Invalid(format!(
            "--max-disk {limit} is below {LEAST} bytes, with which nothing can be kept; the data directory holds {used} bytes"
        )));
    }
    if limit < used {
        tracing::warn!(
            limit,
            used,
            "the data directory holds more than --max-disk: nothing is saved until checkpoints are deleted or the limit is raised"
        );
    }
    Ok(())
}

/// At the limit every request asks, and what is there may be many files. What frees much is noted.
const GOOD_FOR: Duration = Duration::from_secs(1);

impl Quota {
    /// Holds what is below `root`, but for `temp`, to `limit`; and the disk to write through.
    pub(crate) fn new(
        limit: Option<u64>,
        root: &Path,
        temp: PathBuf,
        disk: Arc<dyn Disk>,
    ) -> (Self, Arc<dyn Disk>) {
        let at_most = Arc::new(AtomicU64::new(0));
        let metered = Metered {
            disk,
            n_written: Arc::clone(&at_most),
        };
        let quota = Self {
            limit,
            root: root.to_owned(),
            temp,
            at_most,
            n_reserved: AtomicU64::new(0),
            n_counts: AtomicU64::new(0),
            counted: Mutex::default(),
            good_for: GOOD_FOR,
        };
        quota.count();
        (quota, Arc::new(metered))
    }

    /// Refuses to write `n_bytes` more if there is no room for them.
    ///
    /// # Errors
    /// [`Error::OverQuota`] with what `what` takes, the limit, what is in use and what to do.
    pub(crate) fn check(&self, n_bytes: u64, what: &str) -> Result<()> {
        let n_reserved = self.n_reserved.load(Ordering::Relaxed);
        self.check_all(n_bytes.saturating_add(n_reserved), n_bytes, what)
    }

    /// Refuses `n_more` bytes, those of others among them, of which `what` takes `n_bytes`.
    fn check_all(&self, n_more: u64, n_bytes: u64, what: &str) -> Result<()> {
        let Some(limit) = self.limit else {
            return Ok(());
        };
        let fits = |used: u64| used.saturating_add(n_more) <= limit;
        if fits(self.at_most.load(Ordering::Relaxed)) {
            return Ok(());
        }
        // Much of what was written may be gone by now.
        let (is_room, used) = self.look(fits);
        if is_room {
            return Ok(());
        }
        Err(Error::OverQuota(format!(
            "there is no room for {what} of {n_bytes} bytes: the server keeps {used} bytes and may keep {limit} (--max-disk); delete checkpoints (`tinker checkpoint delete`), or start it with a higher limit"
        )))
    }

    /// As [`Self::check`], and keeps the room until it is filled.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub(crate) fn reserve(&self, n_bytes: u64, what: &str) -> Result<Room<'_>> {
        // Taken before it is checked: of two that ask at once, one at least counts the other.
        let n_before = self.n_reserved.fetch_add(n_bytes, Ordering::Relaxed);
        let checked = self.check_all(n_before.saturating_add(n_bytes), n_bytes, what);
        if let Err(refused) = checked {
            self.n_reserved.fetch_sub(n_bytes, Ordering::Relaxed);
            return Err(refused);
        }
        Ok(self.room(n_bytes))
    }

    /// Takes room for what is written in any case.
    pub(crate) fn take(&self, n_bytes: u64) -> Room<'_> {
        self.n_reserved.fetch_add(n_bytes, Ordering::Relaxed);
        self.room(n_bytes)
    }

    /// Room that was taken.
    fn room(&self, n_bytes: u64) -> Room<'_> {
        Room {
            quota: self,
            n_bytes,
            n_counts: self.n_counts.load(Ordering::Relaxed),
        }
    }

    /// Notes that something was removed: the next look counts anew.
    pub(crate) fn note_removal(&self) {
        *lock(&self.counted) = None;
    }

    /// Whether so much fits into the limit, and the bytes that are there: counted anew unless they
    /// were a moment ago and did not leave room.
    fn look(&self, fits: impl Fn(u64) -> bool) -> (bool, u64) {
        let mut counted = lock(&self.counted);
        if let Some((at, used)) = *counted
            && at.elapsed() < self.good_for
            && !fits(used)
        {
            return (false, used);
        }
        let used = self.count();
        *counted = Some((Instant::now(), used));
        (fits(used), used)
    }

    /// Counts the bytes that are there now, where there is a limit.
    fn count(&self) -> u64 {
        if self.limit.is_none() {
            return 0;
        }
        self.n_counts.fetch_add(1, Ordering::Relaxed);
        let before = self.at_most.load(Ordering::Relaxed);
        let used = size_of(&self.root, &self.temp);
        // What is written meanwhile stays counted, whether it was found or not.
        self.at_most
            .fetch_add(used.wrapping_sub(before), Ordering::Relaxed);
        used
    }
}

/// Bytes of the files below a directory, but for those below `except`. What goes away meanwhile does
/// not count.
fn size_of(dir: &Path, except: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries
        .filter_map(io::Result::ok)
        .filter(|entry| entry.path() != except)
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => size_of(&entry.path(), except),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::disk::OsDisk;

    #[test]
    fn what_was_written_counts_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::write(root.join("before"), [0; 40]).unwrap();
        let temp = root.join("tmp");
        let (quota, disk) = Quota::new(Some(100), root, temp.clone(), Arc::new(OsDisk));
        disk.create_dir_all(&temp).unwrap();
        disk.write_new(&temp.join("aside"), &[0; 500]).unwrap();

        quota.check(60, "a save").unwrap();
        disk.write_new(&root.join("new"), &[0; 50]).unwrap();
        quota.check(10, "a save").unwrap();
        let refused = quota.check(11, "a save").unwrap_err().to_string();
        fs::remove_file(root.join("before")).unwrap();
        quota.note_removal();

        assert!(refused.contains("a save of 11 bytes"), "{refused}");
        assert!(
            refused.contains("keeps 90 bytes and may keep 100"),
            "{refused}"
        );
        quota.check(11, "a save").unwrap();
    }

    #[test]
    fn what_is_written_aside_keeps_its_room_while_others_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let (root, temp) = (dir.path(), dir.path().join("tmp"));
        let (quota, disk) = Quota::new(Some(100), root, temp.clone(), Arc::new(OsDisk));
        disk.create_dir_all(&temp).unwrap();

        let room = quota.reserve(60, "a save").unwrap();
        quota.check(41, "another").unwrap_err();
        disk.write_new(&temp.join("aside"), &[0; 60]).unwrap();
        // This one has everything counted anew, while the save lies aside.
        quota.note_removal();
        quota.check(40, "another").unwrap();
        disk.rename(&temp.join("aside"), &root.join("saved"))
            .unwrap();
        drop(room);

        assert!(
            quota.at_most.load(Ordering::Relaxed) >= 60,
            "it was forgotten"
        );
        quota.check(41, "another").unwrap_err();
        quota.check(40, "another").unwrap();
    }

    #[test]
    fn two_that_ask_at_once_do_not_get_the_same_room() {
        let dir = tempfile::tempdir().unwrap();
        let temp = dir.path().join("tmp");
        let (quota, _disk) = Quota::new(Some(100), dir.path(), temp, Arc::new(OsDisk));
        let barrier = Barrier::new(2);
        let ask = || {
            let wins = |_| {
                barrier.wait();
                let room = quota.reserve(60, "a save");
                barrier.wait();
                room.is_ok()
            };
            (0..2000).map(wins).collect::<Vec<_>>()
        };

        let (first, second) = std::thread::scope(|scope| {
            let other = scope.spawn(ask);
            (ask(), other.join().unwrap())
        });

        let n_both = first.iter().zip(&second).filter(|(a, b)| **a && **b);
        assert_eq!(n_both.count(), 0);
    }

    #[test]
    fn room_that_was_not_filled_is_free_again() {
        let dir = tempfile::tempdir().unwrap();
        let temp = dir.path().join("tmp");
        let (quota, _disk) = Quota::new(Some(100), dir.path(), temp, Arc::new(OsDisk));

        drop(quota.reserve(100, "a save").unwrap());

        quota.check(100, "a save").unwrap();
    }

    #[test]
    fn a_limit_that_nothing_fits_into_is_refused_with_what_there_is() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x"), [0; 40]).unwrap();
        let temp = dir.path().join("tmp");

        let refused = check_limit(1, dir.path(), &temp).unwrap_err().to_string();

        assert!(
            refused.starts_with("--max-disk 1 is below 67108864 bytes"),
            "{refused}"
        );
        assert!(refused.ends_with("holds 40 bytes"), "{refused}");
        check_limit(LEAST, dir.path(), &temp).unwrap();
    }

    #[test]
    fn a_refusal_is_remembered_until_something_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let (mut quota, disk) = Quota::new(Some(100), root, root.join("tmp"), Arc::new(OsDisk));
        quota.good_for = Duration::MAX;
        disk.write_new(&root.join("a"), &[0; 100]).unwrap();
        quota.note_removal();
        quota.check(1, "a save").unwrap_err();

        fs::remove_file(root.join("a")).unwrap();
        quota.check(1, "a save").unwrap_err();
        quota.note_removal();

        quota.check(100, "a save").unwrap();
        disk.write_new(&root.join("b"), &[0; 100]).unwrap();
        quota.check(1, "a save").unwrap_err();
    }

    #[test]
    fn without_a_limit_everything_fits() {
        let dir = tempfile::tempdir().unwrap();
        let temp = dir.path().join("tmp");
        let (quota, _disk) = Quota::new(None, dir.path(), temp, Arc::new(OsDisk));

        quota.check(u64::MAX, "a save").unwrap();
    }
}
