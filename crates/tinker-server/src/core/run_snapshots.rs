//! The snapshots of a training run on the disk.

use std::path::{Path, PathBuf};

use crate::bundle;
use crate::disk::Disk;
use crate::error::{Error, Result};

/// What is to be had of a run's snapshots.
pub(crate) struct NewestSnapshot {
    /// The newest one that can be read.
    pub(crate) found: Option<(bundle::Manifest, tinker_engine::AdapterState)>,
    /// A passing fault that kept a newer one from being read.
    pub(crate) passed_over: Option<Error>,
}

/// The operations that a run has snapshots of, oldest first.
///
/// # Errors
/// If the directory cannot be read.
pub(crate) fn snapshots(dir: &Path) -> Result<Vec<u64>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read", dir, error)),
    };
    let mut found: Vec<u64> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// The directory of a snapshot.
pub(crate) fn snapshot_dir(snapshots: &Path, seq: u64) -> PathBuf {
    snapshots.join(format!("{seq:010}"))
}

/// The newest snapshot of a run that can be read.
///
/// # Errors
/// If the directory cannot be read, or a newer program wrote into it.
pub(crate) fn newest_snapshot(disk: &dyn Disk, dir: &Path) -> Result<NewestSnapshot> {
    let mut passed_over = None;
    for seq in snapshots(dir)?.into_iter().rev() {
        match bundle::read(disk, &snapshot_dir(dir, seq), true) {
            Ok(found) => {
                return Ok(NewestSnapshot {
                    found: Some(found),
                    passed_over,
                });
            }
            Err(error @ Error::Newer { .. }) => return Err(error),
            Err(error) => {
                tracing::error!(
                    error = error.with_causes(),
                    "skipping an unreadable snapshot"
                );
                if error.is_passing() {
                    passed_over.get_or_insert(error);
                }
            }
        }
    }
    Ok(NewestSnapshot {
        found: None,
        passed_over,
    })
}
