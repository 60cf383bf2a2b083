//! The lines of a ledger: one record each, in JSON, after a check that depends on all lines before.

use serde::{Deserialize, Serialize};
use tinker_types::{ErrorCategory, RequestId, SessionId, TrainingRunId};

/// The format that is read and written; 1 had no [`Record::Synced`].
pub(super) const FORMAT: u32 = 2;
/// Hexadecimal digits of a check.
pub(super) const CHECK_LEN: usize = 16;

/// BLAKE3 of a request's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Digest(blake3::Hash);

impl Digest {
    /// The digest of `bytes`.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0.to_hex().to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = blake3::HexError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        blake3::Hash::from_hex(text).map(Self)
    }
}

/// What a line says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub(super) enum Record {
    /// The first line.
    Ledger { format: u32 },
    /// So many bytes of the file were on the disk before this line was written.
    Synced { n_bytes: u64 },
    /// A session was opened.
    Session { session_id: SessionId },
    /// A training run will be asked for.
    Creating {
        session_id: SessionId,
        number: u64,
        digest: Digest,
        summary: String,
    },
    /// It was created.
    Created {
        session_id: SessionId,
        number: u64,
        run: TrainingRunId,
    },
    /// An operation will be sent.
    Sending {
        run: TrainingRunId,
        seq_id: u64,
        operation: String,
        digest: Digest,
    },
    /// The server took it.
    Accepted {
        run: TrainingRunId,
        seq_id: u64,
        request_id: RequestId,
    },
    /// The server refused it.
    Refused {
        run: TrainingRunId,
        seq_id: u64,
        message: String,
    },
    /// Its result came; absent if it is large, or cannot be written in JSON.
    Done {
        run: TrainingRunId,
        seq_id: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        result: Option<serde_json::Value>,
    },
    /// It failed.
    Failed {
        run: TrainingRunId,
        seq_id: u64,
        category: ErrorCategory,
        message: String,
    },
}

/// The check that the next line continues.
#[derive(Debug, Clone)]
pub(super) struct Chain(String);

/// How many bytes a line says were on the disk, if it is about that. Its check is not looked at:
/// what it continues may be lost.
pub(super) fn synced_by(line: &[u8]) -> Option<u64> {
    let json = line.get(CHECK_LEN..)?.strip_prefix(b" ")?;
    match serde_json::from_slice(json) {
        Ok(Record::Synced { n_bytes }) => Some(n_bytes),
        _ => None,
    }
}

/// Why a line does not continue its chain.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is not what was written.
    Check,
    /// It is, and is not understood.
    Meaning(String),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Check => f.write_str("its check does not fit"),
            Self::Meaning(reason) => f.write_str(reason),
        }
    }
}

impl Chain {
    /// The start of a file.
    pub(super) fn start() -> Self {
        Self("0".repeat(CHECK_LEN))
    }

    fn next(&self, json: &[u8]) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.0.as_bytes()).update(json);
        let mut check = hasher.finalize().to_hex().to_string();
        check.truncate(CHECK_LEN);
        check
    }

    /// Appends the line of a record to `out`.
    pub(super) fn write(&mut self, record: &Record, out: &mut Vec<u8>) -> serde_json::Result<()> {
        let json = serde_json::to_vec(record)?;
        self.0 = self.next(&json);
        out.extend_from_slice(self.0.as_bytes());
        out.push(b' ');
        out.extend_from_slice(&json);
        out.push(b'\n');
        Ok(())
    }

    /// Reads a line without its end.
    pub(super) fn read(&mut self, line: &[u8]) -> Result<Record, Fault> {
        let (check, json) = line.split_at_checked(CHECK_LEN).ok_or(Fault::Check)?;
        let json = json.strip_prefix(b" ").ok_or(Fault::Check)?;
        let expected = self.next(json);
        if expected.as_bytes() != check {
            return Err(Fault::Check);
        }
        self.0 = expected;
        serde_json::from_slice(json).map_err(|error| Fault::Meaning(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> [Record; 3] {
        let run: TrainingRunId = "S1:train:0".parse().unwrap();
        [
            Record::Ledger { format: FORMAT },
            Record::Sending {
                run: run.clone(),
                seq_id: 1,
                operation: "OptimStep".into(),
                digest: Digest::of(b"bytes"),
            },
            Record::Done {
                run,
                seq_id: 1,
                result: Some(serde_json::json!({"metrics": {"grad_norm": 0.1}})),
            },
        ]
    }

    fn lines() -> Vec<Vec<u8>> {
        let mut chain = Chain::start();
        let line = |record: &Record| {
            let mut out = Vec::new();
            chain.write(record, &mut out).unwrap();
            assert_eq!(out.pop(), Some(b'\n'));
            out
        };
        records().iter().map(line).collect()
    }

    #[test]
    fn lines_read_as_they_were_written() {
        let mut chain = Chain::start();

        for (line, record) in lines().iter().zip(records()) {
            assert_eq!(chain.read(line).unwrap(), record);
        }
    }

    #[test]
    fn a_changed_a_missing_and_a_cut_line_are_noticed() {
        let lines = lines();
        for i in 0..lines[0].len() {
            let mut changed = lines[0].clone();
            changed[i] ^= 1;
            assert_eq!(Chain::start().read(&changed), Err(Fault::Check), "byte {i}");
            assert_eq!(Chain::start().read(&lines[0][..i]), Err(Fault::Check));
        }

        let mut chain = Chain::start();
        chain.read(&lines[0]).unwrap();

        assert_eq!(chain.read(&lines[2]), Err(Fault::Check));
    }
}
