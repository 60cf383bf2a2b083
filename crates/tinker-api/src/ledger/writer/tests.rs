//! What a ledger is after a power cut: anything may be lost of what was not synced, in any order.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use tinker_types::{RequestId, TrainingRunId};

use super::super::file::LedgerFile;
use super::super::record::{Digest, FORMAT};
use super::*;

/// What a disk keeps or loses at once.
const SECTOR: usize = 32;

/// A disk whose power is cut: it remembers what had been written and how much of it was synced.
#[derive(Clone, Default)]
struct PowerCut(Arc<Mutex<(Vec<u8>, usize)>>);

impl Disk for PowerCut {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().0.extend_from_slice(bytes);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.1 = disk.0.len();
        Ok(())
    }
}

impl PowerCut {
    /// What is found when the power is back: a file of any size, and of what was not synced only
    /// those sectors that were on the disk.
    fn image(&self, n_bytes: usize, is_kept: impl Fn(usize) -> bool) -> Vec<u8> {
        let (written, n_synced) = self.0.lock().unwrap().clone();
        let mut image = written[..n_bytes.clamp(n_synced, written.len())].to_vec();
        for (i, byte) in image.iter_mut().enumerate().skip(n_synced) {
            if !is_kept(i / SECTOR) {
                *byte = 0;
            }
        }
        image
    }

    fn n_synced(&self) -> usize {
        self.0.lock().unwrap().1
    }
}

/// An operation that is noted, accepted and answered; only the first must be on the disk.
fn operation(seq_id: u64) -> [(Record, bool); 3] {
    let run: TrainingRunId = "S1:train:0".parse().unwrap();
    let request_id: RequestId = format!("r{seq_id}").parse().unwrap();
    let sending = Record::Sending {
        run: run.clone(),
        seq_id,
        operation: "OptimStep".into(),
        digest: Digest::of(&seq_id.to_le_bytes()),
    };
    let accepted = Record::Accepted {
        run: run.clone(),
        seq_id,
        request_id,
    };
    let done = Record::Done {
        run,
        seq_id,
        result: None,
    };
    [(sending, true), (accepted, false), (done, false)]
}

/// A ledger of some operations, and its records. The notes of the last ones are not synced.
fn written(n_operations: u64) -> (PowerCut, Vec<Record>) {
    let disk = PowerCut::default();
    let mut tail = Tail::new(disk.clone(), Chain::start(), 0);
    let start = Record::Ledger { format: FORMAT };
    tail.append([&start].into_iter(), true).unwrap();
    let mut records = vec![start];
    // Two operations are under way at a time, so that answers mix with what is sent.
    for seq_id in (1..=n_operations).step_by(2) {
        let (first, second) = (operation(seq_id), operation(seq_id + 1));
        for (record, is_waited_for) in first.iter().zip(&second).flat_map(|(a, b)| [a, b]) {
            tail.append([record].into_iter(), *is_waited_for).unwrap();
            records.push(record.clone());
        }
    }
    (disk, records)
}

/// The records of a file, but for those about itself.
fn read(image: &[u8]) -> Result<Vec<Record>, LedgerError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger");
    std::fs::write(&path, image).unwrap();
    let mut records = Vec::new();
    LedgerFile::open(&path, |record, _| {
        if !matches!(record, Record::Synced { .. }) {
            records.push(record);
        }
        Ok(())
    })?;
    // What was mended stays mended.
    let mended = std::fs::read(&path).unwrap();
    LedgerFile::open(&path, |_, _| Ok(()))?;
    assert_eq!(std::fs::read(&path).unwrap(), mended);
    Ok(records)
}

/// Records of the file up to what was synced.
fn n_synced_records(disk: &PowerCut) -> usize {
    let all = disk.image(usize::MAX, |_| true);
    read(&all[..disk.n_synced()]).unwrap().len()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_power_cut_loses_nothing_that_was_synced(
        n_operations in 2_u64..8,
        n_lost in 0_usize..600,
        kept in prop::collection::vec(any::<bool>(), 64),
    ) {
        let (disk, records) = written(n_operations);
        let n_bytes = disk.image(usize::MAX, |_| true).len();
        let image = disk.image(
            n_bytes.saturating_sub(n_lost),
            |sector| kept[sector % kept.len()],
        );

        let found = read(&image).unwrap();

        prop_assert!(found.len() >= n_synced_records(&disk));
        prop_assert_eq!(&found[..], &records[..found.len()]);
    }
}

#[test]
fn a_hole_before_whole_lines_ends_the_ledger() {
    let (disk, records) = written(4);
    let first_unsynced = disk.n_synced() / SECTOR + 1;

    let image = disk.image(usize::MAX, |sector| sector != first_unsynced);
    let found = read(&image).unwrap();

    let n_synced = n_synced_records(&disk);
    assert!(
        (n_synced..n_synced + 4).contains(&found.len()),
        "{} of {}",
        found.len(),
        records.len()
    );
    assert_eq!(found, records[..found.len()]);
}

#[test]
fn a_hole_in_what_was_synced_is_damage() {
    let (disk, _) = written(6);
    let image = disk.image(usize::MAX, |_| true);
    // Before the last word of a sync, which speaks of all that is before it.
    let text = String::from_utf8(image.clone()).unwrap();
    let n_vouched_for = text.rfind("\"synced\"").unwrap();
    let n_vouched_for = text[..n_vouched_for].rfind('\n').unwrap();
    for start in (0..=n_vouched_for - SECTOR).step_by(SECTOR) {
        let mut damaged = image.clone();
        damaged[start..start + SECTOR].fill(0);

        let error = read(&damaged).unwrap_err();

        assert!(matches!(error, LedgerError::Damaged { .. }), "{error}");
    }
}

#[test]
fn a_ledger_of_another_format_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger");
    for format in [FORMAT - 1, FORMAT + 1] {
        let mut line = Vec::new();
        let record = Record::Ledger { format };
        Chain::start().write(&record, &mut line).unwrap();
        std::fs::write(&path, &line).unwrap();

        let error = LedgerFile::open(&path, |_, _| Ok(())).unwrap_err();

        let said = format!("has format {format} and this version reads {FORMAT}");
        assert!(error.to_string().ends_with(&said), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), line);
    }
}
