//! Which parts of a file are on disk, kept beside it for the next attempt.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::manifest::file_error;
use super::parts::Parts;
use crate::error::Result;

/// What a file on the storage is, so that parts of two files are never mixed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) size_bytes: u64,
    /// Its entity tag, else its date, else nothing.
    pub(super) validator: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    #[serde(flatten)]
    identity: Identity,
    part_bytes: u64,
}

/// The parts of one file that are safely on disk.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    pub(super) identity: Identity,
    pub(super) parts: Parts,
    pub(super) done: BTreeSet<u64>,
}

impl Journal {
    /// Begins a journal, in place of any other.
    pub(super) fn create(path: &Path, identity: Identity, part_bytes: u64) -> Result<Self> {
        let fault = |error| file_error("write", path, error);
        let parts = Parts {
            size_bytes: identity.size_bytes,
            part_bytes,
        };
        let head = Head {
            identity: identity.clone(),
            part_bytes,
        };
        let mut line = serde_json::to_string(&head).map_err(|e| fault(e.into()))?;
        line.push('\n');
        let mut file = File::create(path).map_err(fault)?;
        file.write_all(line.as_bytes()).map_err(fault)?;
        Ok(Self {
            file,
            identity,
            parts,
            done: BTreeSet::new(),
        })
    }

    /// Goes on with a journal; nothing if there is none that can be read. A last line that was cut
    /// off does not count.
    pub(super) fn open(path: &Path) -> Result<Option<Self>> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(file_error("read", path, error)),
        };
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut lines = text.get(..whole).unwrap_or_default().lines();
        let head = lines
            .next()
            .and_then(|l| serde_json::from_str::<Head>(l).ok());
        let Some(head) = head.filter(|head| head.part_bytes > 0) else {
            return Ok(None);
        };
        let parts = Parts {
            size_bytes: head.identity.size_bytes,
            part_bytes: head.part_bytes,
        };
        let done = lines.filter_map(|line| line.parse().ok());
        let done = done.filter(|&part| part < parts.n_parts()).collect();
        let file = OpenOptions::new().append(true).open(path);
        let file = file.map_err(|error| file_error("write", path, error))?;
        // What follows must not be joined to the torn line.
        file.set_len(whole as u64)
            .map_err(|error| file_error("write", path, error))?;
        Ok(Some(Self {
            file,
            identity: head.identity,
            parts,
            done,
        }))
    }

    /// Notes a part whose bytes are on disk.
    pub(super) fn note(&mut self, part: u64, path: &Path) -> Result<()> {
        let line = format!("{part}\n");
        self.file
            .write_all(line.as_bytes())
            .map_err(|error| file_error("write", path, error))?;
        self.done.insert(part);
        Ok(())
    }

    /// Bytes on disk.
    pub(super) fn done_bytes(&self) -> u64 {
        let lengths = self.done.iter().map(|&part| {
            let range = self.parts.range(part);
            range.end - range.start
        });
        lengths.sum()
    }

    /// The parts that are missing.
    pub(super) fn missing(&self) -> Vec<u64> {
        let all = 0..self.parts.n_parts();
        all.filter(|part| !self.done.contains(part)).collect()
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn identity() -> Identity {
        Identity {
            size_bytes: 25,
            validator: Some("\"v1\"".into()),
        }
    }

    #[test]
    fn a_journal_goes_on_after_a_torn_line() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("j");
        let mut journal = Journal::create(&path, identity(), 10).unwrap();
        journal.note(2, &path).unwrap();
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("99\nnonsense\n0");
        std::fs::write(&path, text).unwrap();

        let mut journal = Journal::open(&path).unwrap().unwrap();
        assert_eq!(journal.identity, identity());
        assert_eq!((journal.missing(), journal.done_bytes()), (vec![0, 1], 5));
        journal.note(1, &path).unwrap();

        let journal = Journal::open(&path).unwrap().unwrap();
        assert_eq!((journal.missing(), journal.done_bytes()), (vec![0], 15));
    }

    #[test]
    fn what_is_no_journal_begins_anew() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("j");
        assert!(Journal::open(&path).unwrap().is_none());
        for text in [
            "",
            "{}\n",
            r#"{"size_bytes":1,"validator":null,"part_bytes":0}"#,
        ] {
            std::fs::write(&path, text).unwrap();
            assert!(Journal::open(&path).unwrap().is_none(), "{text}");
        }
    }
}
