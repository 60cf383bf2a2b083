//! The file: its head, its lines, and reading them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::body::Body;
use super::summary::Summary;
use crate::error::{Error, ErrorKind, Result};

/// The version of the format that is written, and the newest that is read.
pub(super) const FORMAT: u32 = 1;

/// The first line of a cassette.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    /// The version of the format.
    pub(super) tinker_cassette: u32,
    /// The client that recorded.
    pub(super) client: String,
    /// When, in seconds since 1970.
    pub(super) started_unix_s: u64,
}

/// One request that was sent, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// Its place in the order in which requests were sent, from 0.
    pub number: u64,
    /// When it was sent, in milliseconds since the recording began.
    pub at_ms: u64,
    /// Milliseconds until its outcome.
    pub took_ms: u64,
    /// How often the same call had been sent before.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry_count: u32,
    /// Its method.
    pub method: String,
    /// Its path below the server's address, with its query.
    pub path: String,
    /// Its harmless headers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// Its body, if it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<Body>,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// An answer, whatever its status.
    Answer {
        /// The status.
        status: u16,
        /// The headers that the client understands.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        headers: BTreeMap<String, String>,
        /// The body.
        body: Body,
    },
    /// No answer that could be read.
    Failure {
        /// Why.
        reason: String,
    },
    /// The client lost interest before an answer came.
    Abandoned,
}

impl Outcome {
    /// The status of the answer, if one came.
    #[must_use]
    pub const fn status(&self) -> Option<u16> {
        match self {
            Self::Answer { status, .. } => Some(*status),
            Self::Failure { .. } | Self::Abandoned => None,
        }
    }
}

/// A recording, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cassette {
    head: Head,
    exchanges: Vec<Exchange>,
    is_cut: bool,
}

impl Cassette {
    /// Reads a cassette. A last line that was cut off, as by a killed process, is left out.
    ///
    /// # Errors
    /// If the file cannot be read, is not a cassette, is of a newer format, or one of its lines is
    /// damaged; the error names the line.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|error| {
            let text = format!("cassette {} cannot be opened", path.display());
            Error::new(ErrorKind::File, text).with_source(error)
        })?;
        Self::read(BufReader::new(file), &path.display().to_string())
    }

    /// Reads a cassette called `name`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn read(mut reader: impl BufRead, name: &str) -> Result<Self> {
        let mut lines = Vec::new();
        let mut is_cut = false;
        loop {
            let mut line = Vec::new();
            let n_bytes = reader.read_until(b'\n', &mut line).map_err(|error| {
                let text = format!("cassette {name} cannot be read");
                Error::new(ErrorKind::File, text).with_source(error)
            })?;
            match line.last() {
                _ if n_bytes == 0 => break,
                Some(b'\n') => lines.push(line),
                _ => is_cut = true,
            }
        }
        let mut lines = lines.iter().enumerate();
        let head = lines.next().map(|(_, line)| line.as_slice());
        let head = read_head(head.unwrap_or_default(), name)?;
        let mut exchanges = lines
            .map(|(n, line)| {
                serde_json::from_slice(line).map_err(|error| {
                    let text = format!("line {} of cassette {name} is damaged", n + 1);
                    Error::new(ErrorKind::InvalidRequest, text).with_source(error)
                })
            })
            .collect::<Result<Vec<Exchange>>>()?;
        // Lines stand in the order of the outcomes.
        exchanges.sort_by_key(|exchange| exchange.number);
        Ok(Self {
            head,
            exchanges,
            is_cut,
        })
    }

    /// All exchanges, in the order in which their requests were sent.
    #[must_use]
    pub fn exchanges(&self) -> &[Exchange] {
        &self.exchanges
    }

    /// Name and version of the client that recorded.
    #[must_use]
    pub fn client(&self) -> &str {
        &self.head.client
    }

    /// When the recording began, in seconds since 1970.
    #[must_use]
    pub const fn started_unix_s(&self) -> u64 {
        self.head.started_unix_s
    }

    /// Whether the last line was cut off.
    #[must_use]
    pub const fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// What was recorded, route by route.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary::of(&self.exchanges)
    }
}

fn read_head(line: &[u8], name: &str) -> Result<Head> {
    let fault = |text: String| Error::new(ErrorKind::InvalidRequest, text);
    let head: Head = serde_json::from_slice(line)
        .map_err(|error| fault(format!("{name} is not a cassette")).with_source(error))?;
    if head.tinker_cassette > FORMAT {
        return Err(fault(format!(
            "cassette {name} has format {}; this client reads up to {FORMAT}",
            head.tinker_cassette
        )));
    }
    Ok(head)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
const fn is_zero(n: &u32) -> bool {
    *n == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = r#"{"tinker_cassette":1,"client":"c","started_unix_s":5}"#;

    fn line(number: u64) -> String {
        format!(
            r#"{{"number":{number},"at_ms":1,"took_ms":2,"method":"GET","path":"/p","outcome":"abandoned"}}"#
        )
    }

    fn read(text: &str) -> Result<Cassette> {
        Cassette::read(text.as_bytes(), "c.jsonl")
    }

    #[test]
    fn exchanges_stand_in_the_order_of_their_requests() {
        let cassette = read(&format!("{HEAD}\n{}\n{}\n", line(1), line(0))).unwrap();

        let numbers: Vec<_> = cassette.exchanges().iter().map(|e| e.number).collect();
        assert_eq!(numbers, [0, 1]);
        assert_eq!((cassette.client(), cassette.started_unix_s()), ("c", 5));
        assert!(!cassette.is_cut());
    }

    #[test]
    fn a_torn_last_line_is_left_out() {
        let torn = &line(1)[..20];

        let cassette = read(&format!("{HEAD}\n{}\n{torn}", line(0))).unwrap();

        assert_eq!(cassette.exchanges().len(), 1);
        assert!(cassette.is_cut());
    }

    #[test]
    fn what_is_not_a_cassette_is_named() {
        for (text, expected) in [
            ("", "c.jsonl is not a cassette"),
            ("{}\n", "c.jsonl is not a cassette"),
            (
                r#"{"tinker_cassette":2,"client":"c","started_unix_s":5}
"#,
                "cassette c.jsonl has format 2; this client reads up to 1",
            ),
            (
                &format!("{HEAD}\n{}\nnonsense\n", line(0)),
                "line 3 of cassette c.jsonl is damaged",
            ),
        ] {
            assert_eq!(read(text).unwrap_err().message(), expected);
        }
    }
}
