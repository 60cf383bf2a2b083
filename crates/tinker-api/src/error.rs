//! Errors of the library: failed operations, failed calls, and requests refused before sending.

use std::time::Duration;

use tinker_http::{ErrorKind, RequestType};
use tinker_types::{CheckpointKind, ErrorCategory, RequestId, TinkerPath, TypeError};

use crate::custom_loss::CustomLossError;
use crate::ledger::LedgerError;

/// Result of the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, by what a caller can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server took the operation and it failed. Sending it again fails again.
    #[error("{operation} failed: {message} (category {category}, request id {request_id})")]
    RequestFailed {
        /// The operation.
        operation: RequestType,
        /// Whose fault it is.
        category: ErrorCategory,
        /// What the server says.
        message: String,
        /// The future.
        request_id: RequestId,
    },
    /// A call failed; see its kind.
    #[error(transparent)]
    Transport(#[from] tinker_http::Error),
    /// The name of a save is taken, perhaps by this very save: an attempt may have been made that was
    /// not answered.
    #[error(
        "{operation} may have been made: an attempt was not answered, and the name is taken now"
    )]
    MaybeSaved {
        /// The operation.
        operation: RequestType,
        /// What the last attempt was answered.
        source: tinker_http::Error,
    },
    /// A request that cannot be right was not sent.
    #[error("{0}")]
    InvalidRequest(String),
    /// The checkpoint is of another kind than the operation needs.
    #[error("{path} is not a {needed} checkpoint; did you mean {twin}?")]
    WrongCheckpointKind {
        /// What was given.
        path: Box<TinkerPath>,
        /// What is needed.
        needed: &'static str,
        /// The path of that kind under the same name; it need not exist.
        twin: Box<TinkerPath>,
    },
    /// The server's answer lacks what was asked for.
    #[error("{0}")]
    Protocol(String),
    /// An earlier operation may or may not have reached the server, so no later one can be sent.
    #[error("the training client has stopped: {0}; create a new one from the last checkpoint")]
    Stopped(String),
    /// Nothing brings the result any more: the runtime that the client was created on has ended, or a
    /// task panicked. The operation may have been sent.
    #[error("{0}")]
    Abandoned(String),
    /// The session was ended by [`ServiceClient::close`](crate::ServiceClient::close).
    #[error("the session is closed: create a new service client")]
    Closed,
    /// The step ledger cannot be used, or does not agree with the program or the server.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A loss that is computed here has no usable value or gradient.
    #[error(transparent)]
    CustomLoss(#[from] CustomLossError),
    /// The result was not waited for any longer.
    #[error("no result of {operation} after {after:?}")]
    TimedOut {
        /// The operation.
        operation: RequestType,
        /// The time waited.
        after: Duration,
    },
}

impl Error {
    /// The kind of a failed call.
    #[must_use]
    pub const fn kind(&self) -> Option<&ErrorKind> {
        match self {
            Self::Transport(error) | Self::MaybeSaved { source: error, .. } => Some(error.kind()),
            _ => None,
        }
    }

    /// The name of the variant, for reports.
    const fn name(&self) -> &'static str {
        match self {
            Self::RequestFailed { .. } => "RequestFailed",
            Self::Transport(_) => "Transport",
            Self::MaybeSaved { .. } => "MaybeSaved",
            Self::InvalidRequest(_) => "InvalidRequest",
            Self::WrongCheckpointKind { .. } => "WrongCheckpointKind",
            Self::Protocol(_) => "Protocol",
            Self::Stopped(_) => "Stopped",
            Self::Abandoned(_) => "Abandoned",
            Self::Closed => "Closed",
            Self::Ledger(_) => "Ledger",
            Self::CustomLoss(_) => "CustomLoss",
            Self::TimedOut { .. } => "TimedOut",
        }
    }

    /// Tells the service that a training run could not be created, or an operation of one failed,
    /// if the program agreed to reports.
    pub(crate) fn report(&self, http: &tinker_http::Client) {
        if http.reports() {
            http.report_fatal(self.name(), &self.reported(), self.is_user_error());
        }
    }

    /// What a report may say: the service's own words, or the kind of the failure. What is written
    /// here or by a loss may quote data, or name a file of this machine.
    fn reported(&self) -> String {
        match self {
            Self::RequestFailed {
                operation, message, ..
            } => format!("{operation} failed: {message}"),
            Self::Transport(error) => error.status().map_or_else(
                || format!("{:?}", error.kind()),
                |status| format!("{:?}, status {status}", error.kind()),
            ),
            Self::TimedOut { .. } => self.to_string(),
            _ => self.name().to_owned(),
        }
    }

    /// Whether the user's input caused it, as far as is known.
    #[must_use]
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::InvalidRequest(_) | Self::WrongCheckpointKind { .. } | Self::Closed => true,
            Self::RequestFailed { category, .. } => *category == ErrorCategory::User,
            Self::Transport(error) => matches!(
                error.kind(),
                ErrorKind::InvalidRequest | ErrorKind::NotFound | ErrorKind::PermissionDenied
            ),
            _ => false,
        }
    }

    /// Whether the server was away, or failing, for longer than it was waited for.
    #[must_use]
    pub fn is_server_lost(&self) -> bool {
        matches!(
            self.kind(),
            Some(ErrorKind::Connect | ErrorKind::Timeout | ErrorKind::Server)
        )
    }

    /// External checkpoints are weights that were brought in, or taken out: the server decides.
    pub(crate) fn check_kind(path: &TinkerPath, kind: CheckpointKind) -> Result<()> {
        if [kind, CheckpointKind::External].contains(&path.checkpoint.kind) {
            return Ok(());
        }
        Err(Self::WrongCheckpointKind {
            path: Box::new(path.clone()),
            needed: match kind {
                CheckpointKind::Training => "training",
                CheckpointKind::Sampler => "sampler",
                CheckpointKind::External => "external",
            },
            twin: Box::new(path.twin(kind)),
        })
    }
}

impl From<TypeError> for Error {
    fn from(error: TypeError) -> Self {
        Self::InvalidRequest(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_training_checkpoint_names_its_sampler_twin() {
        let path = "tinker://r/weights/final".parse().unwrap();

        let error = Error::check_kind(&path, CheckpointKind::Sampler).unwrap_err();

        assert_eq!(
            error.to_string(),
            "tinker://r/weights/final is not a sampler checkpoint; \
             did you mean tinker://r/sampler_weights/final?"
        );
    }

    #[test]
    fn whether_an_external_checkpoint_will_do_is_for_the_server_to_say() {
        let path = "tinker://r/external_weights/uploaded".parse().unwrap();

        for kind in [CheckpointKind::Sampler, CheckpointKind::Training] {
            assert!(Error::check_kind(&path, kind).is_ok());
        }
    }

    #[test]
    fn a_report_quotes_neither_data_nor_files() {
        let quoting = "row 3: `my secret diary`, in /home/ann/diary.jsonl";
        let errors = [
            Error::CustomLoss(CustomLossError::Panicked(quoting.to_owned())),
            Error::InvalidRequest(quoting.to_owned()),
            Error::Stopped(quoting.to_owned()),
        ];

        for error in errors {
            assert!(error.to_string().contains("diary"));
            assert_eq!(error.reported(), error.name());
        }
    }
}
