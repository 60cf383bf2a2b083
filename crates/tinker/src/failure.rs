//! How a command fails: the exit code, what happened, and what to do next.

use std::fmt::{self, Display};
use std::process::ExitCode;

/// The exit codes of `tinker`; 0 is success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// Anything without a code of its own: 1.
    General,
    /// Wrong flags or bad input: 2.
    Usage,
    /// Missing or refused credentials: 3.
    Credentials,
    /// Something else is in the way, such as a run that exists or a port in use: 4.
    Conflict,
    /// The thing named does not exist: 5.
    NotFound,
    /// This server cannot do it: 6.
    Unsupported,
    /// Too many requests, or no capacity: 7.
    Capacity,
    /// Interrupted, and resumable where the command says so: 130.
    Interrupted,
}

impl FailureKind {
    /// The code that the process exits with.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::General => 1,
            Self::Usage => 2,
            Self::Credentials => 3,
            Self::Conflict => 4,
            Self::NotFound => 5,
            Self::Unsupported => 6,
            Self::Capacity => 7,
            Self::Interrupted => 130,
        }
    }
}

impl From<FailureKind> for ExitCode {
    fn from(kind: FailureKind) -> Self {
        Self::from(kind.code())
    }
}

/// Result of a command.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// A failed command.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Which exit code.
    pub(crate) kind: FailureKind,
    /// What happened, with its causes.
    error: anyhow::Error,
    /// What to do next.
    hint: Option<String>,
}

impl Failure {
    /// A failure of `kind`, with what happened: lower case, no final period.
    pub(crate) fn new(kind: FailureKind, what: impl Into<String>) -> Self {
        Self {
            kind,
            error: anyhow::Error::msg(what.into()),
            hint: None,
        }
    }

    /// Bad flags or bad input.
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self::new(FailureKind::Usage, what)
    }

    /// Something that is not there.
    pub(crate) fn not_found(what: impl Into<String>) -> Self {
        Self::new(FailureKind::NotFound, what)
    }

    /// The same failure with advice; the first advice given, nearest to the cause, is kept.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The same failure as another kind.
    pub(crate) fn kind(mut self, kind: FailureKind) -> Self {
        self.kind = kind;
        self
    }

    /// The same failure as the cause of `what`.
    pub(crate) fn context(mut self, what: impl Into<String>) -> Self {
        self.error = self.error.context(what.into());
        self
    }
}

/// `error:`, a `cause:` line for each cause, and `hint:`.
impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.error)?;
        let mut said = self.error.to_string();
        for cause in self.error.chain().skip(1) {
            let cause = cause.to_string();
            // Some libraries repeat the cause in their own text.
            if !said.contains(&cause) {
                write!(f, "\ncause: {cause}")?;
                said = cause;
            }
        }
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self {
            kind: FailureKind::General,
            error,
            hint: None,
        }
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        anyhow::Error::new(error)
            .context("cannot write JSON")
            .into()
    }
}

impl From<tinker_server::Error> for Failure {
    fn from(error: tinker_server::Error) -> Self {
        use tinker_server::Error;
        let kind = match error {
            Error::AlreadyRunning { .. } | Error::PortTaken { .. } => FailureKind::Conflict,
            Error::NotFound(_) => FailureKind::NotFound,
            Error::Invalid(_) => FailureKind::Usage,
            _ => FailureKind::General,
        };
        Self::from(anyhow::Error::new(error)).kind(kind)
    }
}

impl From<tinker_types::TypeError> for Failure {
    fn from(error: tinker_types::TypeError) -> Self {
        Self::usage(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_what_why_and_what_next() {
        let cause = anyhow::anyhow!("no such file").context("cannot read `a.jsonl`");

        let failure = Failure::from(cause)
            .context("training data")
            .hint("check the path");

        assert_eq!(
            failure.to_string(),
            "error: training data\ncause: cannot read `a.jsonl`\ncause: no such file\nhint: check the path"
        );
    }

    #[test]
    fn a_cause_that_was_said_is_not_repeated() {
        let failure = Failure::from(anyhow::anyhow!("b").context("a: b"));

        assert_eq!(failure.to_string(), "error: a: b");
    }

    #[test]
    fn the_hint_nearest_to_the_cause_wins() {
        let failure = Failure::usage("x").hint("near").hint("far");

        assert!(failure.to_string().ends_with("hint: near"));
    }
}
