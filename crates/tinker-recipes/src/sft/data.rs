//! Reading chat rows from JSONL, with the line and column of whatever is wrong.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tinker_chat::{Message, Role, TrainOnWhat};

use crate::error::{Error, Result};

/// The rows of a data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    /// The file.
    pub path: PathBuf,
    /// SHA-256 of its bytes, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// The rows, in file order; never empty.
    pub rows: Vec<Row>,
}

/// One conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Line in the file, from 1.
    pub line: usize,
    /// The messages; never empty.
    pub messages: Vec<Message>,
}

impl Dataset {
    /// Reads `path`: one JSON object per line, `{"messages": [...]}` or `{"prompt", "completion"}`,
    /// which become a user and an assistant message. Other keys and blank lines are ignored.
    ///
    /// # Errors
    /// The file is missing, unreadable or empty; a row is not UTF-8, not JSON, or of another shape;
    /// or, for modes that train the assistant, a row has no assistant message.
    pub fn read(path: &Path, train_on: TrainOnWhat) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::ReadData {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &bytes, train_on)
    }

    /// Reads `bytes` as the content of `path`; see [`Self::read`].
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(path: &Path, bytes: &[u8], train_on: TrainOnWhat) -> Result<Self> {
        let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let mut rows = Vec::new();
        for (index, line) in text.split(|&byte| byte == b'\n').enumerate() {
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let row = parse_row(path, index + 1, line)?;
            let has_assistant = row.messages.iter().any(|m| m.role == Role::Assistant);
            if !has_assistant && trains_the_assistant(train_on) {
                return Err(Error::NoAssistantMessage {
                    path: path.to_owned(),
                    line: row.line,
                });
            }
            rows.push(row);
        }
        if rows.is_empty() {
            return Err(Error::EmptyData {
                path: path.to_owned(),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            sha256: hex(&Sha256::digest(bytes)),
            rows,
        })
    }
}

fn trains_the_assistant(mode: TrainOnWhat) -> bool {
    match mode {
        TrainOnWhat::LastAssistantMessage
        | TrainOnWhat::LastAssistantTurn
        | TrainOnWhat::AllAssistantMessages => true,
        TrainOnWhat::AllMessages
        | TrainOnWhat::AllTokens
        | TrainOnWhat::AllUserAndSystemMessages
        | TrainOnWhat::Customized => false,
    }
}

#[derive(Deserialize)]
struct RawRow {
    messages: Option<Vec<Message>>,
    prompt: Option<String>,
    completion: Option<String>,
}

fn parse_row(path: &Path, line_number: usize, line: &[u8]) -> Result<Row> {
    let bad = |column, reason: String| Error::BadRow {
        path: path.to_owned(),
        line: line_number,
        column,
        reason,
    };
    let text = std::str::from_utf8(line).map_err(|error| {
        let valid = &line[..error.valid_up_to()];
        let column = String::from_utf8_lossy(valid).chars().count() + 1;
        bad(column, "the text is not UTF-8".to_owned())
    })?;
    let raw: RawRow = serde_json::from_str(text).map_err(|error| {
        let start = text.find(|c: char| !c.is_whitespace()).unwrap_or(0);
        if error.is_data() && !text[start..].starts_with('{') {
            let reason = "a row is a JSON object on a line of its own, and this is none";
            return bad(character_column(text, start + 1), reason.to_owned());
        }
        bad(character_column(text, error.column()), reason_of(&error))
    })?;
    let messages = match (raw.messages, raw.prompt, raw.completion) {
        (Some(messages), None, None) if !messages.is_empty() => messages,
        (Some(_), None, None) => return Err(bad(1, "`messages` is empty".to_owned())),
        (None, Some(prompt), Some(completion)) => {
            vec![Message::user(prompt), Message::assistant(completion)]
        }
        _ => {
            let reason = "a row needs `messages`, or `prompt` and `completion`";
            return Err(bad(1, reason.to_owned()));
        }
    };
    Ok(Row {
        line: line_number,
        messages,
    })
}

/// The parser's message without its position, which counts from this line alone.
fn reason_of(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let reason = text
        .rsplit_once(" at line ")
        .map_or(text.as_str(), |(reason, _)| reason);
    if error.is_data() {
        reason.to_owned()
    } else {
        format!("not JSON: {reason}")
    }
}

/// The parser counts bytes; people and editors count characters.
fn character_column(text: &str, byte_column: usize) -> usize {
    let n_bytes = byte_column.saturating_sub(1);
    text.char_indices()
        .take_while(|(at, _)| *at < n_bytes)
        .count()
        + 1
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
