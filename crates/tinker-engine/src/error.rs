//! What can go wrong in the engine, named by what the caller can do about it.

use std::path::PathBuf;

/// Result of an engine call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An engine error. The text names the thing and its values.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request is wrong; the engine's state is unchanged.
    #[error("{0}")]
    Invalid(String),
    /// The model directory cannot be used.
    #[error("model {path}: {message}", path = path.display())]
    Model {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A value became infinite or not a number; the engine's state is unchanged.
    #[error("{0}")]
    NotFinite(String),
    /// The device has no memory left or does not answer; the engine's state is unchanged.
    #[error("{0}")]
    Device(String),
    /// An adapter or slot that is not (or no longer) there.
    #[error("{kind} {id} is not loaded")]
    Unknown {
        /// `adapter` or `slot`.
        kind: &'static str,
        /// Its number.
        id: u64,
    },
}
