//! What can stop a recipe; every message names the thing, the value and the next step.

use std::io;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of a recipe.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The data file cannot be read.
    #[error("cannot read data file `{}`", path.display())]
    ReadData {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The data file has no rows.
    #[error("data file `{}` is empty; it needs one JSON object per line", path.display())]
    EmptyData {
        /// The file.
        path: PathBuf,
    },
    /// A row is not what the recipe reads.
    #[error("`{}` line {line} column {column}: {reason}", path.display())]
    BadRow {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// In characters, from 1.
        column: usize,
        /// What is wrong.
        reason: String,
    },
    /// A conversation that the assistant takes no part in.
    #[error("`{}` line {line}: no assistant message, so there is nothing to train", path.display())]
    NoAssistantMessage {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
    },
    /// A conversation that the renderer cannot write.
    #[error("`{}` line {line} cannot be rendered", path.display())]
    Render {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// Why.
        source: tinker_chat::Error,
    },
    /// Rows that do not fit, and nobody asked to cut them.
    #[error(
        "`{}`: {n_long} of {n_rows} rows are longer than {max_length} tokens (longest: {longest} \
         tokens, line {line}); ask for truncation, raise the limit, or remove them",
        path.display()
    )]
    RowsTooLong {
        /// The file.
        path: PathBuf,
        /// Number of rows that do not fit.
        n_long: usize,
        /// Number of rows.
        n_rows: usize,
        /// The limit in tokens.
        max_length: usize,
        /// Length of the longest row in tokens.
        longest: usize,
        /// Its line, from 1.
        line: usize,
    },
    /// Truncation or the held-out split left no row to train on.
    #[error("`{}`: no row is left to train on: {reason}", path.display())]
    NothingToTrain {
        /// The file.
        path: PathBuf,
        /// What happened to the rows.
        reason: String,
    },
    /// A setting out of its range.
    #[error("{name} `{value}`: {reason}")]
    BadOption {
        /// The setting.
        name: &'static str,
        /// What was given.
        value: String,
        /// What it must be.
        reason: String,
    },
    /// The model's learning rate is not known.
    #[error(
        "no calibrated learning rate for `{model}`; give one (LoRA runs of models of 1 to 70 \
         billion parameters use 1e-4 to 5e-4)"
    )]
    NoLearningRate {
        /// The base model.
        model: String,
    },
    /// Nobody knows which chat format the model speaks.
    #[error("no renderer is known for `{model}`; name one of: {known}")]
    NoRenderer {
        /// The base model.
        model: String,
        /// Known names.
        known: String,
    },
    /// The data are not those that the run began with.
    #[error(
        "data file `{}` has changed since the run began (SHA-256 {found:.12}…, not {expected:.12}…); \
         restore it, or start a new run",
        path.display()
    )]
    DataChanged {
        /// The file.
        path: PathBuf,
        /// Hash in the run folder.
        expected: String,
        /// Hash now.
        found: String,
    },
    /// The run ended as planned; there is nothing to resume.
    #[error("run `{run}` is complete at step {n_steps} of {n_steps}; there is nothing to resume")]
    AlreadyComplete {
        /// The run.
        run: String,
        /// Its steps.
        n_steps: u64,
    },
    /// No checkpoint of the run can be loaded any more.
    #[error(
        "run `{run}` has no checkpoint to resume from ({n_tried} recorded, none usable on the \
         server); start a new run"
    )]
    NoUsableCheckpoint {
        /// The run.
        run: String,
        /// How many were recorded.
        n_tried: usize,
    },
    /// The server's answer does not fit the request.
    #[error("the server's answer to {request} is unusable: {reason}")]
    BadAnswer {
        /// What was asked.
        request: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The loss is not a number.
    #[error(
        "the loss at step {step} is {loss}; start again with a learning rate below \
         {learning_rate:e}"
    )]
    LossNotFinite {
        /// The step.
        step: u64,
        /// Mean negative log-likelihood.
        loss: f64,
        /// Learning rate of the step.
        learning_rate: f64,
    },
    /// The weights are beyond computing with, in the server's words.
    #[error("{doing} failed; start again with a learning rate below {learning_rate:e}")]
    Diverged {
        /// What was being done.
        doing: String,
        /// Highest learning rate of the run.
        learning_rate: f64,
        /// What is not finite.
        source: tinker_api::Error,
    },
    /// A request failed for good.
    #[error("{doing} failed")]
    Service {
        /// What was being done.
        doing: String,
        /// Why.
        source: tinker_api::Error,
    },
    /// The run folder cannot be read or written.
    #[error(transparent)]
    Runs(#[from] tinker_runs::Error),
    /// A chat format or a tokenizer failed outside the data.
    #[error(transparent)]
    Chat(#[from] tinker_chat::Error),
}

impl Error {
    /// A request of a run with this learning rate that failed for good.
    ///
    /// What goes in is finite, the base weights too, so that numbers which are not mean that the
    /// adapter has diverged. Servers say so in words alone.
    pub(crate) fn of_request(doing: String, learning_rate: f64, source: tinker_api::Error) -> Self {
        let is_not_finite = matches!(
            &source,
            tinker_api::Error::RequestFailed { message, .. }
                if ["NaN", "not finite", "is inf", "is -inf"].iter().any(|word| message.contains(word))
        );
        if is_not_finite {
            Self::Diverged {
                doing,
                learning_rate,
                source,
            }
        } else {
            Self::Service { doing, source }
        }
    }

    /// Whether the service says that the request itself is at fault.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Service { source, .. } if source.is_user_error())
    }

    /// Whether going on from a checkpoint would end in the same way: the weights have diverged.
    pub fn is_divergence(&self) -> bool {
        matches!(self, Self::LossNotFinite { .. } | Self::Diverged { .. })
    }

    /// Whether the run is as whole on the server as it was, so that a resumed one goes on with it
    /// there instead of a checkpoint: the server could not be reached, or not be asked with this
    /// key, or the run folder could not be written.
    pub fn leaves_run_in_place(&self) -> bool {
        use tinker_api::{Error as ApiError, ErrorKind, LedgerError};
        match self {
            Self::Runs(_) => true,
            Self::Service { source, .. } => {
                source.is_server_lost()
                    || matches!(
                        source,
                        ApiError::Stopped(_)
                            | ApiError::Abandoned(_)
                            | ApiError::Ledger(LedgerError::Io { .. })
                    )
                    || matches!(
                        source.kind(),
                        Some(
                            ErrorKind::Unauthenticated
                                | ErrorKind::PermissionDenied
                                | ErrorKind::BillingPaused
                                | ErrorKind::RateLimited { .. }
                        )
                    )
            }
            _ => false,
        }
    }

    /// Whether the data or the settings are at fault, rather than a server or the disk.
    pub fn is_bad_input(&self) -> bool {
        matches!(
            self,
            Self::ReadData { .. }
                | Self::EmptyData { .. }
                | Self::BadRow { .. }
                | Self::NoAssistantMessage { .. }
                | Self::Render { .. }
                | Self::RowsTooLong { .. }
                | Self::NothingToTrain { .. }
                | Self::BadOption { .. }
                | Self::NoLearningRate { .. }
                | Self::NoRenderer { .. }
                | Self::Chat(_)
        )
    }
}

#[cfg(test)]
mod tests {
    use tinker_api::RequestType;
    use tinker_types::ErrorCategory;

    use super::*;

    fn of_message(message: &str) -> Error {
        let source = tinker_api::Error::RequestFailed {
            operation: RequestType::ForwardBackward,
            category: ErrorCategory::User,
            message: message.to_owned(),
            request_id: "r".parse().unwrap(),
        };
        Error::of_request("training step 3".to_owned(), 0.01, source)
    }

    #[test]
    fn numbers_that_are_none_mean_divergence() {
        for message in [
            "sequence 0: the log-probability at position 0 is NaN",
            "sequence 0: its gradient is not finite",
            "sequence 0: the loss is inf",
        ] {
            let error = of_message(message);

            assert!(error.is_divergence(), "{message}");
            assert_eq!(
                error.to_string(),
                "training step 3 failed; start again with a learning rate below 1e-2"
            );
        }
    }

    #[test]
    fn other_failures_are_no_divergence() {
        let error = of_message("the disk is full");

        assert!(!error.is_divergence());
        assert_eq!(error.to_string(), "training step 3 failed");
    }
}
