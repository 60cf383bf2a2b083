//! Handlers, one file per group of endpoints. They parse, call [`crate::app::App`], and answer.

pub(crate) mod admin;
pub(crate) mod anthropic;
pub(crate) mod api_keys;
pub(crate) mod checkpoints;
pub(crate) mod custom_losses;
pub(crate) mod futures;
pub(crate) mod models;
pub(crate) mod openai;
pub(crate) mod sampling;
pub(crate) mod search;
pub(crate) mod service;
pub(crate) mod sessions;
pub(crate) mod signed;
pub(crate) mod training;
pub(crate) mod training_runs;
pub(crate) mod uploads;
pub(crate) mod weights;

use axum::http::HeaderMap;
use serde::Deserialize;
use tinker_types::{Cursor, ProjectId, TrainingRunId};

/// What names an operation of a run. The rest of its request is read when its turn comes: if that
/// is wrong, the operation fails, its number is used up, and later operations do not wait for it.
#[derive(Debug, Deserialize)]
pub(crate) struct Numbered {
    model_id: TrainingRunId,
    #[serde(default)]
    seq_id: u64,
}

/// What names a call whose answer may have been lost; the same one when the call is repeated.
pub(crate) fn idempotency_key(headers: &HeaderMap) -> Option<String> {
    let value = headers.get("x-idempotency-key")?;
    value.to_str().ok().map(str::to_owned)
}

/// Which part of a list is asked for; further parameters, such as the scope of access, are ignored:
/// everything here has one owner.
#[derive(Debug, Deserialize)]
pub(crate) struct Page {
    #[serde(default)]
    limit: Option<u64>,
    #[serde(default)]
    offset: u64,
    #[serde(default)]
    project_id: Option<ProjectId>,
}

impl Page {
    /// The rows of the page and where it sits.
    fn cut<T>(&self, rows: Vec<T>, default_limit: u64) -> (Vec<T>, Cursor) {
        let limit = self.limit.unwrap_or(default_limit);
        let cursor = Cursor {
            offset: self.offset,
            limit,
            total_count: rows.len() as u64,
        };
        let skipped = usize::try_from(self.offset).unwrap_or(usize::MAX);
        let taken = usize::try_from(limit).unwrap_or(usize::MAX);
        (rows.into_iter().skip(skipped).take(taken).collect(), cursor)
    }
}
