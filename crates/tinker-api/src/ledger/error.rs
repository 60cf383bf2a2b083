//! Why a ledger cannot be used, or does not agree with the program or the server.

use std::path::{Path, PathBuf};

use tinker_http::RequestType;
use tinker_types::TrainingRunId;

/// What is wrong with a step ledger. Nothing is sent that a ledger does not vouch for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The file cannot be read or written.
    #[error("cannot {doing} the ledger {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The ledger.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A line that was on the disk is not what was written. (What a crash or a power cut tears off
    /// the end is removed: the server is asked for it again.)
    #[error(
        "the ledger {} is damaged in line {line}: {reason}", path.display()
    )]
    Damaged {
        /// The ledger.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// Another version wrote it.
    #[error(
        "the ledger {} has format {found} and this version reads {known}", path.display()
    )]
    OtherFormat {
        /// The ledger.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The format that is read and written.
        known: u32,
    },
    /// Another process works with it.
    #[error(
        "the ledger {} is in use by {}", path.display(), holder(*pid)
    )]
    InUse {
        /// The ledger.
        path: PathBuf,
        /// The process, as far as is known.
        pid: Option<u32>,
    },
    /// The program starts another training run than the ledger tells of.
    #[error(
        "the ledger {} is of another run: its training run {number} is {recorded}, and the program \
         asks for {asked}", path.display()
    )]
    OtherRun {
        /// The ledger.
        path: PathBuf,
        /// Number of the training run within the session, from 0.
        number: u64,
        /// What was created.
        recorded: String,
        /// What should be created now.
        asked: String,
    },
    /// The program asks for another operation than it did before it was restarted.
    #[error("operation {seq_id} of {run} was {recorded} and is {asked} now")]
    Diverged {
        /// The training run.
        run: TrainingRunId,
        /// The operation's number.
        seq_id: u64,
        /// What was sent.
        recorded: String,
        /// What should be sent now.
        asked: String,
    },
    /// The server does not have what it acknowledged, or has something else.
    #[error("the server's view of {run} differs from the ledger's: {detail}")]
    ServerDiffers {
        /// The training run.
        run: TrainingRunId,
        /// In what.
        detail: String,
    },
    /// The server refused this operation before the restart, and the program went on without it.
    #[error("{operation} (seq_id {seq_id}) was refused before the restart: {message}")]
    RefusedBefore {
        /// The operation.
        operation: RequestType,
        /// The number that it had; a later one has it now.
        seq_id: u64,
        /// Why.
        message: String,
    },
}

impl LedgerError {
    /// What to do next: lower case, no final period.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Io { .. } => "look at the path, its permissions and the space on the disk",
            Self::Damaged { .. } => {
                "restore the file, or move it away and go on from the last checkpoint"
            }
            Self::OtherFormat { .. } => {
                "use the version of this program that wrote it, or choose another path"
            }
            Self::InUse { .. } => "wait for the end of that process, or choose another path",
            Self::OtherRun { .. } => "give each run a ledger of its own",
            Self::Diverged { .. } => {
                "a restarted program makes the same calls with the same data; \
                 for another program choose another path"
            }
            Self::ServerDiffers { .. } => {
                "go on from the run's last checkpoint with another ledger, or use Recovery"
            }
            Self::RefusedBefore { .. } => "correct the request, and start with another ledger",
        }
    }

    pub(super) fn io(
        doing: &'static str,
        path: &Path,
    ) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(
        || "another process".to_owned(),
        |pid| format!("process {pid}"),
    )
}
