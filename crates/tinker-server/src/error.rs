//! What can go wrong in starting and running the server, named by what its owner can do about it.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Result of a server operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the server itself; what a request gets back is an `ApiError`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another process serves this data directory.
    #[error(
        "data directory {home} is already served by process {pid}: stop it with `tinker serve stop` or choose another with TINKER_HOME",
        home = home.display()
    )]
    AlreadyRunning {
        /// The data directory.
        home: PathBuf,
        /// The other process, or `unknown` while it is starting.
        pid: String,
    },
    /// Another program listens on the port.
    #[error("port {port} of {host} is taken: choose another with --port, or 0 for any free one", port = addr.port(), host = addr.ip())]
    PortTaken {
        /// Where the server was to listen.
        addr: SocketAddr,
    },
    /// The file system refused.
    #[error("cannot {action} {path}{hint}", path = path.display(), hint = io_hint(source))]
    Io {
        /// What was tried: `write`, `read`, `create`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The metadata database refused.
    #[error("metadata database: {0}")]
    Database(#[from] rusqlite::Error),
    /// A file of the server is not what it should be.
    #[error("{path} is damaged: {message}", path = path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A file that another, newer version of this program wrote.
    #[error("cannot read {path}: {message}", path = path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Which version, and what to do.
        message: String,
    },
    /// A model, checkpoint, run or session that does not exist; the text lists what does.
    #[error("{0}")]
    NotFound(String),
    /// A wrong value from the caller; the text names it.
    #[error("{0}")]
    Invalid(String),
    /// A number or name that was used for something else before; the text names both.
    #[error("{0}")]
    Conflict(String),
    /// The server keeps as much as it may; the text says how much that is and what to do.
    #[error("{0}")]
    OverQuota(String),
    /// There is too little memory for it; the text says how much it takes and what to do.
    #[error("{0}")]
    NoMemory(String),
    /// There is too little memory for it until other work has ended.
    #[error("{message}")]
    AwaitsMemory {
        /// What it takes.
        n_bytes: u64,
        /// Who takes it, and how much there is.
        message: String,
    },
    /// The engine refused.
    #[error(transparent)]
    Engine(#[from] tinker_engine::Error),
    /// The server is shutting down or one of its threads has ended.
    #[error("the server is stopping")]
    Stopping,
}

impl Error {
    /// A file system error with what was tried.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the same operation may succeed later: the server's surroundings are at fault.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Io { source, .. } => is_passing_io(source),
            Self::Database(source) => is_passing_database(source),
            Self::AwaitsMemory { .. } => true,
            _ => false,
        }
    }

    /// The message with its causes, for a log or a failed request.
    #[must_use]
    pub fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

/// Whether a file system may do later what it refuses now: a device, a limit or rights that its
/// owner can mend, and not a path or content that is wrong as it stands.
pub(crate) fn is_passing_io(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    !matches!(
        error.kind(),
        Kind::NotFound
            | Kind::IsADirectory
            | Kind::NotADirectory
            | Kind::InvalidInput
            | Kind::InvalidData
            | Kind::UnexpectedEof
            | Kind::Unsupported
    )
}

fn is_passing_database(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode as Code;
    matches!(
        error.sqlite_error_code(),
        Some(
            Code::SystemIoFailure
                | Code::DiskFull
                | Code::CannotOpen
                | Code::DatabaseBusy
                | Code::DatabaseLocked
                | Code::OutOfMemory
                | Code::PermissionDenied
                | Code::ReadOnly
        )
    )
}

/// The next step for the two disk errors that people meet.
fn io_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (the disk is full: free some space or move the data directory with TINKER_HOME)"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            " (not writable: change its owner or move the data directory with TINKER_HOME)"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_io(source: io::Error) -> bool {
        Error::io("read", Path::new("x"), source).is_passing()
    }

    #[test]
    fn faults_of_device_and_limits_pass_and_wrong_paths_do_not() {
        // EIO, EMFILE and ENOSPC.
        for code in [5, 24, 28] {
            assert!(of_io(io::Error::from_raw_os_error(code)), "{code}");
        }
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::IsADirectory] {
            assert!(!of_io(kind.into()), "{kind}");
        }
        assert!(!Error::Invalid("x".into()).is_passing());
    }

    #[test]
    fn a_full_database_passes_and_a_wrong_statement_does_not() {
        let full = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL);
        assert!(Error::from(rusqlite::Error::SqliteFailure(full, None)).is_passing());

        let wrong = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CONSTRAINT);
        assert!(!Error::from(rusqlite::Error::SqliteFailure(wrong, None)).is_passing());
        assert!(!Error::from(rusqlite::Error::QueryReturnedNoRows).is_passing());
    }
}
