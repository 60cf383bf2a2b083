//! The SHA-256 sums of a folder's files, in the form that `sha256sum --check` reads.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::names::safe_path;
use crate::error::{Error, ErrorKind, Result};

/// Name of the manifest in a downloaded folder.
pub const MANIFEST: &str = "SHA256SUMS";

/// What a folder holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// In the order of their names.
    pub files: Vec<ManifestEntry>,
}

/// A file of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestEntry {
    /// Its path below the folder, with slashes.
    pub name: String,
    /// Its SHA-256 sum, in hexadecimal.
    pub sha256: String,
}

impl Manifest {
    /// Reads the manifest of a folder.
    ///
    /// # Errors
    /// If there is none or it is not one.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let text = std::fs::read_to_string(&path).map_err(|e| file_error("read", &path, e))?;
        let entries = text.lines().map(|line| {
            let (sum, name) = line.split_once("  ")?;
            let is_sum = sum.len() == 64 && sum.bytes().all(|b| b.is_ascii_hexdigit());
            let entry = ManifestEntry {
                name: name.to_owned(),
                sha256: sum.to_ascii_lowercase(),
            };
            (is_sum && safe_path(name).is_ok()).then_some(entry)
        });
        let files = entries.collect::<Option<Vec<_>>>().ok_or_else(|| {
            let text = format!("{} is not a list of SHA-256 sums", path.display());
            Error::new(ErrorKind::InvalidRequest, text)
        })?;
        Ok(Self { files })
    }

    /// Compares a folder's files with the sums. Reads all of them.
    ///
    /// # Errors
    /// If a file cannot be read, or is not as it was; the error names the first one.
    pub fn verify(&self, folder: &Path) -> Result<()> {
        for entry in &self.files {
            let found = sha256_of(&folder.join(safe_path(&entry.name)?))?;
            check_sum(&entry.name, &entry.sha256, &found)?;
        }
        Ok(())
    }

    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(MANIFEST);
        let lines = self.files.iter();
        let lines: String = lines
            .map(|e| format!("{}  {}\n", e.sha256, e.name))
            .collect();
        std::fs::write(&path, lines).map_err(|e| file_error("write", &path, e))?;
        let file = File::open(&path).map_err(|e| file_error("read", &path, e))?;
        file.sync_all().map_err(|e| file_error("write", &path, e))
    }
}

pub(super) fn check_sum(name: &str, expected: &str, found: &str) -> Result<()> {
    if expected.eq_ignore_ascii_case(found) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Untrusted,
        format!("{name} has SHA-256 {found}; it should be {expected}"),
    ))
}

/// The SHA-256 sum of a file, in hexadecimal. Blocks.
pub(super) fn sha256_of(path: &Path) -> Result<String> {
    let fault = |error| file_error("read", path, error);
    let mut file = File::open(path).map_err(fault)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n_bytes = file.read(&mut buffer).map_err(fault)?;
        let Some(bytes) = buffer.get(..n_bytes).filter(|bytes| !bytes.is_empty()) else {
            break;
        };
        hasher.update(bytes);
    }
    Ok(hex(&hasher.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn file_error(verb: &str, path: &Path, error: std::io::Error) -> Error {
    let text = format!("cannot {verb} {}: {error}", path.display());
    Error::new(ErrorKind::File, text).with_source(error)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn a_folder_is_as_its_manifest_says_until_a_file_changes() {
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("a b.bin"), "abc").unwrap();
        let sum = sha256_of(&dir.path().join("a b.bin")).unwrap();
        // FIPS 180-4, the example of "abc".
        assert_eq!(
            sum,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let manifest = Manifest {
            files: vec![ManifestEntry {
                name: "a b.bin".into(),
                sha256: sum,
            }],
        };
        manifest.write(dir.path()).unwrap();

        let read = Manifest::read(dir.path()).unwrap();
        assert_eq!(read, manifest);
        read.verify(dir.path()).unwrap();

        std::fs::write(dir.path().join("a b.bin"), "abd").unwrap();
        let error = read.verify(dir.path()).unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Untrusted);
        assert!(
            error.message().starts_with("a b.bin has SHA-256"),
            "{error}"
        );
    }

    #[test]
    fn what_is_not_a_manifest_is_refused() {
        let dir = TempDir::new().unwrap();
        let sum = "0".repeat(64);
        for text in [
            "abc  a".to_owned(),
            format!("{sum} a"),
            format!("{sum}  ../a"),
        ] {
            std::fs::write(dir.path().join(MANIFEST), &text).unwrap();
            assert!(Manifest::read(dir.path()).is_err(), "{text}");
        }
    }
}
