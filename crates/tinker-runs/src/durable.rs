//! Writes that survive a crash: whole files by temporary file and rename, lines by append and sync.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};

/// Replaces `path` by `bytes`: a reader, or a crash, sees the old content or the new, never a mix.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(Error::io("write in", dir))?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    file.as_file().sync_all().map_err(Error::io("sync", path))?;
    file.persist(path)
        .map_err(|error| Error::io("replace", path)(error.error))?;
    sync_dir(dir)
}

/// Opens `path` for appending, creating it durably.
pub(crate) fn open_append(path: &Path) -> Result<File> {
    let is_new = !path.exists();
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(Error::io("open", path))?;
    if is_new {
        sync_dir(path.parent().unwrap_or(Path::new(".")))?;
    }
    Ok(file)
}

/// Makes the entries of `dir` durable; a rename is on disk only once its directory is.
fn sync_dir(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|file| file.sync_all());
    // Not every system can open a directory; where it cannot, the rename alone must do.
    if cfg!(unix) {
        synced.map_err(Error::io("sync", dir))
    } else {
        Ok(())
    }
}
