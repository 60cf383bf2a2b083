//! What can go wrong with run folders; every message names the file.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure to read, write or find a run folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried, such as `append to`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line is not the JSON that the file promises.
    #[error("`{}` line {line} column {column}: {reason}", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// In bytes, from 1; 0 if the line as a whole is at fault.
        column: usize,
        /// What the parser said.
        reason: String,
    },
    /// A value cannot be written as JSON.
    #[error("cannot write `{}` as JSON", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Another process writes the folder.
    #[error("run folder `{}` is in use by {holder}; wait for it or stop it", path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
        /// The process, as far as the lock file says.
        holder: String,
    },
    /// A new run would mix its rows with those of an earlier one.
    #[error(
        "run folder `{}` already holds a run; resume it, or choose another name",
        path.display()
    )]
    AlreadyExists {
        /// The folder.
        path: PathBuf,
    },
    /// The folder holds no run.
    #[error("`{}` is not a run folder: it has no config.json", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
    },
    /// No run has this name.
    #[error("no run `{name}` in `{}`; {known}", root.display())]
    UnknownRun {
        /// What was asked for.
        name: String,
        /// Where runs are looked for.
        root: PathBuf,
        /// The newest runs, or that there are none.
        known: String,
    },
    /// Several runs begin with this name.
    #[error("run `{name}` is ambiguous in `{}`: {matches}", root.display())]
    AmbiguousRun {
        /// What was asked for.
        name: String,
        /// Where runs are looked for.
        root: PathBuf,
        /// The runs it could mean.
        matches: String,
    },
}

impl Error {
    /// An adapter for `map_err` that adds what was tried and on which file.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the disk or the quota is full, so that freeing space and resuming helps.
    pub fn is_disk_full(&self) -> bool {
        let full = |kind| {
            matches!(
                kind,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        };
        matches!(self, Self::Io { source, .. } if full(source.kind()))
    }
}
