//! Unpacks an archive that nobody vouches for.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Write as _};
use std::path::Path;
use std::rc::Rc;

use flate2::read::MultiGzDecoder;
use tar::{Archive, Entry, EntryType};

use super::manifest::file_error;
use super::names::spelled;
use super::options::DownloadLimits;
use super::taken::Taken;
use crate::error::{Error, ErrorKind, Result};

/// Most bytes between the contents of two entries: headers, long names and padding. Bounds what
/// the headers of one entry can take in memory.
const MAX_HEADER_BYTES: u64 = 1 << 20;

/// What was unpacked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Paths of the files below the folder, with slashes, in the order of the archive.
    pub files: Vec<String>,
    /// Their size.
    pub n_bytes: u64,
}

/// Unpacks a tar archive, plain, gzip or zstd by its first bytes, into an empty folder. Blocks.
///
/// Only files and folders are made, with default permissions; owners and times are ignored. The
/// folder must be one that nobody else writes to.
///
/// # Errors
/// Of kind `Untrusted` if an entry is a link, a device or anything else, is called what leads out
/// of the folder, like another entry (case does not count) or [`MANIFEST`](super::MANIFEST), if a
/// limit is exceeded, or if the archive is cut off or corrupt; of kind `Unsupported` if it is of
/// another kind. The folder then holds what came before.
pub fn unpack(archive: &Path, folder: &Path, limits: &DownloadLimits) -> Result<Unpacked> {
    let fault = |error| file_error("read", archive, error);
    let mut start = Vec::new();
    let mut file = File::open(archive).map_err(fault)?;
    Read::by_ref(&mut file)
        .take(4)
        .read_to_end(&mut start)
        .map_err(fault)?;
    let file = BufReader::new(File::open(archive).map_err(fault)?);
    let reader: Box<dyn Read> = match start.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::new(file).map_err(fault)?),
        [b'P', b'K', 3, 4] => {
            let text = "the archive is a zip file; tar archives can be unpacked";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        _ => Box::new(file),
    };
    let mut unpacking = Unpacking {
        folder,
        limits,
        allowance: Rc::new(Cell::new(0)),
        n_entries: 0,
        taken: Taken::new("the archive holds"),
        unpacked: Unpacked::default(),
    };
    unpacking.all(reader)?;
    Ok(unpacking.unpacked)
}

/// A reader that fails once its allowance is used up.
struct Metered<R> {
    reader: R,
    allowance: Rc<Cell<u64>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let allowed = usize::try_from(self.allowance.get()).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(allowed);
        if wanted == 0 && !buffer.is_empty() {
            return Err(std::io::Error::other("its headers are too large"));
        }
        let buffer = buffer.get_mut(..wanted).unwrap_or_default();
        let n_bytes = self.reader.read(buffer)?;
        self.allowance.set(self.allowance.get() - n_bytes as u64);
        Ok(n_bytes)
    }
}

struct Unpacking<'a> {
    folder: &'a Path,
    limits: &'a DownloadLimits,
    allowance: Rc<Cell<u64>>,
    n_entries: u64,
    taken: Taken,
    unpacked: Unpacked,
}

impl Unpacking<'_> {
    fn all(&mut self, reader: impl Read) -> Result<()> {
        let mut archive = Archive::new(Metered {
            reader,
            allowance: Rc::clone(&self.allowance),
        });
        self.allowance.set(MAX_HEADER_BYTES);
        for entry in archive.entries().map_err(corrupt)? {
            self.entry(&mut entry.map_err(corrupt)?)?;
            self.allowance.set(MAX_HEADER_BYTES);
        }
        // The sum of a compressed stream stands at its end, after the padding.
        let mut rest = archive.into_inner();
        std::io::copy(&mut rest, &mut std::io::sink()).map_err(corrupt)?;
        Ok(())
    }

    fn entry(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<()> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            // Comments of the packing program.
            return std::io::copy(entry, &mut std::io::sink())
                .map(drop)
                .map_err(corrupt);
        }
        self.n_entries += 1;
        if self.n_entries > self.limits.max_entries {
            let text = format!("holds more than {} entries", self.limits.max_entries);
            return Err(refuse(&text));
        }
        let name = entry.path_bytes().into_owned();
        let name = String::from_utf8(name).map_err(|error| {
            let shown = error.into_bytes().escape_ascii().to_string();
            refuse(&format!("holds a name that is not UTF-8: {shown}"))
        })?;
        match kind {
            // Packing "." makes an entry of the folder itself.
            EntryType::Directory if matches!(name.as_str(), "." | "./") => Ok(()),
            EntryType::Directory => {
                let path = self.folder.join(self.taken.folder(&name)?);
                std::fs::create_dir_all(&path).map_err(|e| file_error("make", &path, e))
            }
            EntryType::Regular if name.ends_with('/') => Err(refuse(&format!(
                "holds the file {name:?}, named like a folder"
            ))),
            EntryType::Regular => {
                let path = self.taken.file(&name)?;
                self.file(entry, &path)
            }
            other => Err(refuse(&format!(
                "holds {name:?}, which is {}",
                describe(other)
            ))),
        }
    }

    fn file(&mut self, entry: &mut Entry<'_, impl Read>, name: &Path) -> Result<()> {
        let size = entry.size();
        let shown = spelled(name);
        if size > self.limits.max_file_bytes {
            let most = self.limits.max_file_bytes;
            return Err(refuse(&format!(
                "holds {shown} with {size} bytes, more than {most}"
            )));
        }
        let total = self.unpacked.n_bytes.saturating_add(size);
        if total > self.limits.max_total_bytes {
            let most = self.limits.max_total_bytes;
            return Err(refuse(&format!("holds more than {most} bytes")));
        }
        let path = self.folder.join(name);
        let mut file = create(&path)?;
        self.allowance.set(size.saturating_add(MAX_HEADER_BYTES));
        let copied = copy(entry, &mut file, &path)?;
        if copied != size {
            return Err(refuse(&format!("breaks off within {shown}")));
        }
        file.sync_all().map_err(|e| file_error("write", &path, e))?;
        self.unpacked.n_bytes = total;
        self.unpacked.files.push(shown);
        Ok(())
    }
}

fn create(path: &Path) -> Result<File> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| file_error("make", folder, e))?;
    }
    // Never follows or replaces anything.
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    file.map_err(|error| file_error("make", path, error))
}

/// Copies and tells the two ends' errors apart.
fn copy(from: &mut impl Read, to: &mut File, path: &Path) -> Result<u64> {
    let mut buffer = vec![0; 128 << 10];
    let mut n_copied = 0;
    loop {
        let n_bytes = from.read(&mut buffer).map_err(corrupt)?;
        let Some(bytes) = buffer.get(..n_bytes).filter(|bytes| !bytes.is_empty()) else {
            return Ok(n_copied);
        };
        to.write_all(bytes)
            .map_err(|error| file_error("write", path, error))?;
        n_copied += n_bytes as u64;
    }
}

fn describe(kind: EntryType) -> &'static str {
    match kind {
        EntryType::Symlink | EntryType::Link => "a link",
        EntryType::Block | EntryType::Char | EntryType::Fifo => "a device",
        _ => "neither a file nor a folder",
    }
}

fn refuse(what: &str) -> Error {
    Error::new(ErrorKind::Untrusted, format!("the archive {what}"))
}

fn corrupt(error: std::io::Error) -> Error {
    refuse(&format!("cannot be read: {error}")).with_source(error)
}

#[cfg(test)]
mod tests;
