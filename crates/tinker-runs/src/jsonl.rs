//! Files of one JSON object per line that may end in a line torn by a crash.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::durable::open_append;
use crate::error::{Error, Result};

/// How much an appended line must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// The end of the process.
    Process,
    /// A power cut.
    PowerCut,
}

/// Appends lines to one file.
#[derive(Debug)]
pub(crate) struct LineWriter {
    path: PathBuf,
    file: std::fs::File,
    durability: Durability,
}

impl LineWriter {
    /// Opens or creates `path`, removing a torn last line.
    pub(crate) fn open(path: PathBuf, durability: Durability) -> Result<Self> {
        repair(&path)?;
        let file = open_append(&path)?;
        Ok(Self {
            path,
            file,
            durability,
        })
    }

    pub(crate) fn append(&mut self, row: &impl Serialize) -> Result<()> {
        let encode = |source| Error::Encode {
            path: self.path.clone(),
            source,
        };
        let mut line = serde_json::to_vec(row).map_err(encode)?;
        line.push(b'\n');
        // One write call, so that a reader sees a whole line or a torn last one.
        self.file
            .write_all(&line)
            .map_err(Error::io("append to", &self.path))?;
        if self.durability == Durability::PowerCut {
            self.file
                .sync_data()
                .map_err(Error::io("sync", &self.path))?;
        }
        Ok(())
    }
}

/// Reads every row of `path`; a missing file has none. Blank lines and a torn last line are
/// skipped.
pub(crate) fn read_rows<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Error::io("read", path))?,
    };
    let mut rows = Vec::new();
    for (index, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let is_torn = !line.ends_with(b"\n");
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match parse_line(line) {
            Ok(row) => rows.push(row),
            Err(_) if is_torn => {}
            Err(error) => {
                let (line, column) = (index + 1, error.column());
                let reason = reason_of(&error);
                return Err(Error::BadLine {
                    path: path.to_owned(),
                    line,
                    column,
                    reason,
                });
            }
        }
    }
    Ok(rows)
}

/// The parser's message without its position, which is told apart and counts from a row alone.
pub(crate) fn reason_of(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let reason = text.rsplit_once(" at line ");
    reason
        .map_or(text.as_str(), |(reason, _)| reason)
        .to_owned()
}

/// Parses a row. Python writes numbers that are not finite as `NaN` and `Infinity`, which JSON does
/// not have; they are read as null.
fn parse_line<T: DeserializeOwned>(line: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(line).or_else(|error| {
        let cleaned = without_non_finite(line);
        if cleaned == line {
            Err(error)
        } else {
            serde_json::from_slice(&cleaned)
        }
    })
}

fn without_non_finite(line: &[u8]) -> Vec<u8> {
    let mut cleaned = Vec::with_capacity(line.len());
    let mut rest = line;
    let mut in_string = false;
    while let Some(&byte) = rest.first() {
        let word = [&b"NaN"[..], b"Infinity", b"-Infinity"]
            .into_iter()
            .find(|word| !in_string && rest.starts_with(word));
        if let Some(word) = word {
            cleaned.extend_from_slice(b"null");
            rest = &rest[word.len()..];
            continue;
        }
        let n_taken = if in_string && byte == b'\\' {
            2.min(rest.len())
        } else {
            1
        };
        in_string ^= byte == b'"';
        cleaned.extend_from_slice(&rest[..n_taken]);
        rest = &rest[n_taken..];
    }
    cleaned
}

/// Ends the file with a whole line: completes a last line that only lacks its line feed, and cuts
/// one that is not JSON.
fn repair(path: &Path) -> Result<()> {
    // A pipe or a device has no last line to look at.
    if !path.is_file() {
        return Ok(());
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let n_whole = bytes
        .iter()
        .rposition(|&byte| byte == b'\n')
        .map_or(0, |at| at + 1);
    let torn = &bytes[n_whole..];
    if torn.is_empty() {
        return Ok(());
    }
    let mut file = OpenOptions::new()
        .append(true)
        .open(path)
        .map_err(Error::io("repair", path))?;
    if parse_line::<serde_json::Map<String, serde_json::Value>>(torn).is_ok() {
        file.write_all(b"\n").map_err(Error::io("repair", path))?;
    } else {
        file.set_len(n_whole as u64)
            .map_err(Error::io("repair", path))?;
    }
    file.sync_all().map_err(Error::io("sync", path))
}
