//! What a log is after kills, power cuts, damage, and disks that refuse.

use super::*;
use crate::disk::OsDisk;
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug, Serialize, Deserialize)]
struct Number {
    n: u64,
}

const fn n(n: u64) -> Number {
    Number { n }
}

/// A syncer without a thread: what is synced does not depend on the time.
fn idle() -> Syncer {
    Syncer {
        dirty: Arc::default(),
        wake: mpsc::channel().0,
    }
}

fn open(dir: &Path) -> (SegmentLog, Vec<(u64, Vec<u8>)>) {
    let mut found = Vec::new();
    let visit = |record: Record<Number>| {
        found.push((record.header.n, record.location));
        Ok(())
    };
    let log = SegmentLog::open(Arc::new(OsDisk), idle(), dir, visit).unwrap();
    let read = |(header, at)| (header, log.read_body(at).unwrap());
    let seen = found.into_iter().map(read).collect();
    (log, seen)
}

#[test]
fn records_come_back_in_order_over_segments() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path());
    log.append(&n(1), b"one").unwrap();
    log.rotate().unwrap();
    let at = log.append(&n(2), b"two").unwrap();
    drop(log);

    let (log, seen) = open(dir.path());

    assert_eq!(seen, [(1, b"one".to_vec()), (2, b"two".to_vec())]);
    assert_eq!(log.read_body(at).unwrap(), b"two");
}

#[test]
fn removed_segments_are_gone_and_the_rest_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path());
    let old = log.append(&n(1), b"one").unwrap();
    let cut = log.rotate().unwrap();
    log.append(&n(2), b"two").unwrap();

    log.remove_before(cut).unwrap();

    assert!(log.read_body(old).is_err());
    drop(log);
    assert_eq!(open(dir.path()).1, [(2, b"two".to_vec())]);
}

#[test]
fn damage_before_the_last_segment_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path());
    log.append(&n(1), &[7; 100]).unwrap();
    log.rotate().unwrap();
    log.append(&n(2), b"two").unwrap();
    drop(log);
    let path = segment_path(dir.path(), 1);
    let mut bytes = fs::read(&path).unwrap();
    bytes[80] ^= 1;
    fs::write(&path, bytes).unwrap();

    let result = SegmentLog::open(Arc::new(OsDisk), idle(), dir.path(), |_: Record<Number>| {
        Ok(())
    });

    let error = result.unwrap_err().to_string();
    assert!(error.contains("fails its checksum"), "{error}");
}

/// A log of three records that was synced after `n_synced` of them, and whose bytes `change` was let
/// at, given where the second and the third begin. What is wrong with it, and whether it was left
/// alone.
fn refusal(n_synced: u64, change: impl FnOnce(&mut Vec<u8>, usize, usize)) -> (String, bool) {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path());
    let mut starts = Vec::new();
    for i in 1..=3 {
        starts.push(log.segment_bytes() as usize);
        log.append(&n(i), &[7; 100]).unwrap();
        if i == n_synced {
            log.sync().unwrap();
        }
    }
    drop(log);
    let path = segment_path(dir.path(), 1);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes, starts[1], starts[2]);
    fs::write(&path, &bytes).unwrap();

    let result = SegmentLog::open(Arc::new(OsDisk), idle(), dir.path(), |_: Record<Number>| {
        Ok(())
    });

    let unchanged = fs::read(&path).unwrap() == bytes;
    (
        result.map_or_else(|e| e.to_string(), |_| String::new()),
        unchanged,
    )
}

#[test]
fn damage_of_what_was_on_the_disk_is_an_error_and_loses_nothing() {
    type Change = fn(&mut Vec<u8>, usize, usize);
    let changes: [Change; 3] = [
        |bytes, second, _| bytes[second + 80] ^= 1,
        |bytes, second, _| bytes[second + 2] = 0x10,
        |bytes, second, _| bytes[second..second + 130].fill(0),
    ];
    for change in changes {
        let mut expected = String::new();
        let (text, unchanged) = refusal(2, |bytes, second, third| {
            expected = format!(
                "00000001.seg is damaged: the record at byte {second} fails its checksum, and the one at byte {third} says that it was on the disk"
            );
            change(bytes, second, third);
        });

        assert!(text.contains(&expected), "{text}");
        assert!(unchanged, "the file was changed");
    }
}

#[test]
fn every_later_record_says_what_was_on_the_disk() {
    let (text, unchanged) = refusal(1, |bytes, second, third| {
        bytes[80] ^= 1;
        bytes[second..third].fill(0);
    });

    assert!(text.contains("the record at byte 0 fails"), "{text}");
    assert!(unchanged);
}

#[test]
fn what_never_was_on_the_disk_is_cut_off_with_all_that_follows_it() {
    for n_synced in [0, 1] {
        let (text, unchanged) = refusal(n_synced, |bytes, second, third| {
            bytes[second..third].fill(0);
        });

        assert_eq!(text, "");
        assert!(!unchanged, "it is still there");
    }
}

#[test]
fn a_record_within_the_body_of_another_says_nothing() {
    let witness = frame(
        &Stamped {
            synced: u64::MAX,
            header: &n(9),
        },
        b"",
    );
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path());
    let torn = log.append(&n(1), b"one").unwrap();
    log.append(&n(2), &witness.unwrap()).unwrap();
    drop(log);
    let path = segment_path(dir.path(), torn.segment);
    let mut bytes = fs::read(&path).unwrap();
    bytes[FRAME_HEAD + 6] ^= 1;
    fs::write(&path, bytes).unwrap();

    assert_eq!(open(dir.path()).1, []);
}

#[test]
fn what_was_on_the_disk_is_known_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path());
    log.append(&n(1), b"one").unwrap();
    log.sync().unwrap();
    log.append(&n(2), b"two").unwrap();
    drop(log);
    let (mut log, _) = open(dir.path());
    let third = log.append(&n(3), b"three").unwrap();
    drop(log);
    let path = segment_path(dir.path(), 1);
    let mut bytes = fs::read(&path).unwrap();
    bytes[..third.offset as usize].fill(0);
    fs::write(&path, bytes).unwrap();

    let opened = SegmentLog::open(Arc::new(OsDisk), idle(), dir.path(), |_: Record<Number>| {
        Ok(())
    });

    let text = opened.unwrap_err().to_string();
    assert!(text.contains("says that it was on the disk"), "{text}");
}

#[test]
fn logs_of_earlier_versions_are_read_and_grow() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(segment_path(dir.path(), 1), frame(&n(1), b"one").unwrap()).unwrap();

    let (mut log, seen) = open(dir.path());
    log.append(&n(2), b"two").unwrap();
    drop(log);

    assert_eq!(seen, [(1, b"one".to_vec())]);
    let seen = open(dir.path()).1;
    assert_eq!(seen, [(1, b"one".to_vec()), (2, b"two".to_vec())]);
}

#[test]
fn a_damaged_last_record_is_cut_off_like_a_torn_one() {
    let (refusal, unchanged) = refusal(2, |bytes, _, _| {
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
    log.append(&n(1), b"one").unwrap();
    log.append(&n(2), b"two").unwrap();
    let torn = log.segment_bytes() - 1;
    drop(log);
    truncate(&segment_path(dir.path(), 1), torn).unwrap();
    fs::write(segment_path(dir.path(), 2), b"").unwrap();

    let (mut log, seen) = open(dir.path());

    assert_eq!(seen, [(1, b"one".to_vec())]);
    log.append(&n(3), b"three").unwrap();
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
    let opened = SegmentLog::open(disk.clone(), idle(), dir.path(), |_: Record<Number>| Ok(()));
    let mut log = opened.unwrap();
    log.append(&n(1), b"one").unwrap();
    disk.0.store(true, Ordering::SeqCst);
    assert!(log.append(&n(2), b"two").is_err());
    assert!(log.append(&n(2), b"two").is_err());
    assert!(log.rotate().is_err(), "nothing may follow half a record");

    disk.0.store(false, Ordering::SeqCst);
    log.append(&n(3), b"three").unwrap();
    log.rotate().unwrap();
    log.append(&n(4), b"four").unwrap();

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
        idle(),
        dir.path(),
        |_: Record<Number>| Ok(()),
    );
    let mut log = opened.unwrap();
    log.append(&n(1), b"small").unwrap();

    let error = log.append(&n(2), &[0; 200]).unwrap_err();
    log.append(&n(3), b"small").unwrap();

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
        for (i, &n_bytes) in sizes.iter().enumerate() {
            log.append(&n(i as u64), &vec![i as u8; n_bytes]).unwrap();
            ends.push(log.segment_bytes());
        }
        let at = (log.segment_bytes() as f64 * cut) as u64;
        drop(log);
        truncate(&segment_path(dir.path(), 1), at).unwrap();

        let (mut log, seen) = open(dir.path());

        prop_assert_eq!(seen.len(), ends.iter().filter(|&&end| end <= at).count());
        log.append(&n(99), b"after").unwrap();
        drop(log);
        let seen = open(dir.path()).1;
        prop_assert_eq!(seen.last().unwrap(), &(99, b"after".to_vec()));
    }
}

/// What was synced, as after a power cut: of everything else any sectors may be missing.
#[derive(Debug, Default)]
struct PowerCut(Mutex<HashMap<PathBuf, Vec<u8>>>);

const SECTOR: usize = 512;

impl Disk for PowerCut {
    fn create_dir_all(&self, path: &Path) -> std::io::Result<()> {
        OsDisk.create_dir_all(path)
    }
    fn write_new(&self, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
        OsDisk.write_new(path, bytes)
    }
    fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
        OsDisk.append(file, path, bytes)
    }
    fn sync(&self, _file: &File, path: &Path) -> std::io::Result<()> {
        self.0
            .lock()
            .unwrap()
            .insert(path.to_owned(), fs::read(path)?);
        Ok(())
    }
    fn truncate(&self, file: &File, len: u64) -> std::io::Result<()> {
        OsDisk.truncate(file, len)
    }
    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        OsDisk.rename(from, to)
    }
}

impl PowerCut {
    /// Takes from every file the sectors that were not synced and that `is_lost` says, and so much of
    /// the end that was not synced.
    fn happen(&self, dir: &Path, mut is_lost: impl FnMut() -> bool, shorter: f64) {
        for segment in segments(dir).unwrap() {
            let path = segment_path(dir, segment);
            let mut bytes = fs::read(&path).unwrap();
            let synced = self.0.lock().unwrap().remove(&path).unwrap_or_default();
            let n_lost = (bytes.len() - synced.len()) as f64 * shorter;
            bytes.truncate(bytes.len() - n_lost as usize);
            for sector in bytes.chunks_mut(SECTOR) {
                if is_lost() {
                    sector.fill(0);
                }
            }
            bytes[..synced.len()].copy_from_slice(&synced);
            fs::write(&path, bytes).unwrap();
        }
    }
}

#[derive(Debug, Clone)]
enum Act {
    Append(usize),
    Sync,
    Rotate,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        6 => (0_usize..1500).prop_map(Act::Append),
        2 => Just(Act::Sync),
        1 => Just(Act::Rotate),
    ];
    proptest::collection::vec(act, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn a_power_cut_takes_only_what_was_not_synced(
        acts in acts(),
        lost in proptest::collection::vec(proptest::bool::ANY, 1..64),
        shorter in 0.0_f64..1.0,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(PowerCut::default());
        let mut log = SegmentLog::open(disk.clone(), idle(), dir.path(), |_: Record<Number>| Ok(()))
            .unwrap();
        let (mut n_written, mut n_synced) = (0, 0);
        for act in acts {
            match act {
                Act::Append(n_bytes) => {
                    log.append(&n(n_written), &vec![7; n_bytes]).unwrap();
                    n_written += 1;
                    continue;
                }
                Act::Sync => log.sync().unwrap(),
                Act::Rotate => drop(log.rotate().unwrap()),
            }
            n_synced = n_written;
        }
        drop(log);
        let mut lost = lost.iter().cycle();
        disk.happen(dir.path(), || *lost.next().unwrap(), shorter);

        let (mut log, seen) = open(dir.path());

        let numbers: Vec<u64> = seen.iter().map(|record| record.0).collect();
        prop_assert!(numbers.len() as u64 >= n_synced, "{numbers:?} of {n_synced}");
        prop_assert_eq!(numbers, (0..seen.len() as u64).collect::<Vec<_>>());
        log.append(&n(99), b"after").unwrap();
        drop(log);
        let seen = open(dir.path()).1;
        prop_assert_eq!(seen.last().unwrap(), &(99, b"after".to_vec()));
    }
}
