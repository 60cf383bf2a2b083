//! A file of an upload while it arrives: it goes to the disk piece by piece, beside its name, and gets that once it
//! is whole.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::core::Core;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::imports::Claim;

/// Pieces are written when they are this long together.
pub(crate) const PIECE: usize = 1 << 20;

/// What has arrived so far. Dropped before it is whole, it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Receiving {
    core: Arc<Core>,
    path: PathBuf,
    /// Where it is until it is whole.
    temp: PathBuf,
    file: File,
    n_bytes: u64,
    is_whole: bool,
    /// Given back last: whoever has it next writes to the same place.
    _claim: Claim,
}

impl Receiving {
    /// Begins a file of this path.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn begin(core: Arc<Core>, path: PathBuf, claim: Claim) -> Result<Self> {
        let mut temp = path.as_os_str().to_owned();
        temp.push(".tmp");
        let temp = PathBuf::from(temp);
        let fault = |source| Error::io("write", &path, source);
        core.disk.write_new(&temp, &[]).map_err(fault)?;
        let file = OpenOptions::new().append(true).open(&temp).map_err(fault)?;
        Ok(Self {
            core,
            path,
            temp,
            file,
            n_bytes: 0,
            is_whole: false,
            _claim: claim,
        })
    }

    /// Bytes that have arrived.
    pub(crate) const fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Adds a piece.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn add(&mut self, piece: &[u8]) -> Result<()> {
        self.n_bytes += piece.len() as u64;
        let added = self.core.disk.append(&mut self.file, &self.temp, piece);
        added.map_err(|source| Error::io("write", &self.path, source))
    }

    /// Gives it its name.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn finish(mut self) -> Result<()> {
        let disk = self.core.disk.as_ref();
        let kept = keep(disk, &self.file, &self.temp, &self.path);
        self.is_whole = kept.is_ok();
        kept.map_err(|source| Error::io("write", &self.path, source))
    }
}

fn keep(disk: &dyn Disk, file: &File, temp: &Path, path: &Path) -> std::io::Result<()> {
    disk.sync(file, temp)?;
    disk.rename(temp, path)
}

impl Drop for Receiving {
    fn drop(&mut self) {
        if self.is_whole {
            return;
        }
        if let Err(error) = fs::remove_file(&self.temp) {
            tracing::warn!(%error, path = %self.temp.display(), "cannot remove what arrived of a file");
        }
        self.core.quota.note_removal();
    }
}
