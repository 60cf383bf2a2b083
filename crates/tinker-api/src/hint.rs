//! What to do about each error, in a sentence for people.

use tinker_types::ErrorCategory;

use crate::error::Error;

impl Error {
    /// What to do next: lower case, no final period.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::RequestFailed {
                category: ErrorCategory::User,
                ..
            } => "correct the input that the message names: sent again, it fails again",
            Self::RequestFailed { .. } => "look into the server's log, then submit it anew",
            Self::Transport(error) => error.hint(),
            Self::MaybeSaved { .. } => {
                "list the run's checkpoints to see whether it was, or save under another name"
            }
            Self::InvalidRequest(_) => "correct the value that the message names",
            Self::WrongCheckpointKind { .. } => "use the path that the message names",
            Self::CustomLoss(_) => "correct the loss, and continue from the last checkpoint",
            Self::Protocol(_) => "update the server, or report it with its version",
            Self::Stopped(_) => "create a new client from the last checkpoint",
            Self::Abandoned(_) => {
                "keep the runtime that the client is created on for as long as the client, and look \
                 for a panic in the log"
            }
            Self::Closed => "create a new service client",
            Self::TimedOut { .. } => "wait longer: the operation goes on",
            Self::Ledger(error) => error.hint(),
        }
    }
}
