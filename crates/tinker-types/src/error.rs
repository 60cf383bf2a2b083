//! Errors of values that cannot be built, and the error body of the API.

use serde::{Deserialize, Serialize};

/// A value that breaks the rules of its type; the text names the thing and its values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TypeError(String);

impl TypeError {
    /// An error with this text: lower case, no final period.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// Body of a non-2xx answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong, for people; some servers send a structure here.
    pub detail: serde_json::Value,
}

impl ErrorBody {
    /// A body with this text.
    #[must_use]
    pub fn new(detail: impl Into<String>) -> Self {
        Self {
            detail: serde_json::Value::String(detail.into()),
        }
    }
}
