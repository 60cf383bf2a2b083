//! What a download tells whoever waits for it.

use std::time::Duration;

/// Something that happened in a download.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DownloadEvent {
    /// The files are known.
    Started {
        /// How many.
        n_files: usize,
    },
    /// The size of a file is known.
    FileStarted {
        /// Its name.
        name: String,
        /// Its size, if the storage says.
        size_bytes: Option<u64>,
        /// How much of it an earlier download left.
        resumed_bytes: u64,
    },
    /// Some more bytes are on disk.
    Progress {
        /// Bytes of all files on disk, those of earlier downloads included.
        done_bytes: u64,
        /// Bytes of all files whose size is known.
        known_bytes: u64,
    },
    /// A part failed and will be asked for again.
    Retrying {
        /// The file.
        name: String,
        /// Why.
        reason: String,
        /// Time to the next attempt.
        wait: Duration,
    },
    /// Addresses were asked for anew.
    Signed {
        /// Whether the storage had refused the old ones; otherwise they were about to expire.
        was_refused: bool,
    },
    /// A file is complete.
    FileDone {
        /// Its name.
        name: String,
        /// Its size.
        size_bytes: u64,
        /// Its SHA-256 sum, in hexadecimal.
        sha256: String,
    },
    /// The archive was unpacked.
    Unpacked {
        /// Files in it.
        n_files: u64,
        /// Their size.
        n_bytes: u64,
    },
}
