//! How a command fails: the exit code, what happened, and what to do next.

use std::fmt::{self, Display};
use std::process::ExitCode;

use tinker_api::{CredentialOrigin, ErrorKind, LedgerError};

use crate::settings::hint_for;

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
    /// What to do next where nobody who knows more has said it.
    general_hint: Option<String>,
}

impl Failure {
    /// A failure of `kind`, with what happened: lower case, no final period.
    pub(crate) fn new(kind: FailureKind, what: impl Into<String>) -> Self {
        Self {
            kind,
            error: anyhow::Error::msg(what.into()),
            hint: None,
            general_hint: None,
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

    /// What happened, with its causes, on one line.
    pub(crate) fn what(&self) -> String {
        format!("{:#}", self.error)
    }

    /// The same failure with advice; the first advice given, nearest to the cause, is kept.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The same failure with advice to follow after what is advised already.
    pub(crate) fn then(mut self, hint: impl Into<String>) -> Self {
        let hint = hint.into();
        self.hint = Some(match self.hint.or_else(|| self.general_hint.take()) {
            Some(first) => format!("{first}\nhint: {hint}"),
            None => hint,
        });
        self
    }

    /// The same failure as another kind.
    pub(crate) fn kind(mut self, kind: FailureKind) -> Self {
        self.kind = kind;
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
        match self.hint.as_ref().or(self.general_hint.as_ref()) {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        let api = error.chain().find_map(|cause| cause.downcast_ref());
        Self {
            kind: api.map_or(FailureKind::General, kind_of_api),
            hint: None,
            general_hint: api.map(hint_of_api),
            error,
        }
    }
}

impl From<tinker_api::Error> for Failure {
    fn from(error: tinker_api::Error) -> Self {
        anyhow::Error::new(error).into()
    }
}

fn kind_of_api(error: &tinker_api::Error) -> FailureKind {
    use tinker_api::Error;
    match error {
        Error::Transport(error) => kind_of_call(error.kind()),
        Error::Ledger(error) => kind_of_ledger(error),
        Error::InvalidRequest(_) | Error::WrongCheckpointKind { .. } => FailureKind::Usage,
        Error::RequestFailed { .. } if error.is_user_error() => FailureKind::Usage,
        _ => FailureKind::General,
    }
}

const fn kind_of_call(kind: &ErrorKind) -> FailureKind {
    match kind {
        ErrorKind::Unauthenticated | ErrorKind::PermissionDenied => FailureKind::Credentials,
        ErrorKind::NotFound => FailureKind::NotFound,
        ErrorKind::Conflict => FailureKind::Conflict,
        ErrorKind::InvalidRequest => FailureKind::Usage,
        ErrorKind::RateLimited { .. } | ErrorKind::BillingPaused => FailureKind::Capacity,
        ErrorKind::Unsupported => FailureKind::Unsupported,
        // Expired, Timeout, Connect, Decode, Server, File, Untrusted: neither the command nor its
        // input is wrong, and there is no code of their own.
        _ => FailureKind::General,
    }
}

/// Somebody else has the ledger, or it is of something else.
const fn kind_of_ledger(error: &LedgerError) -> FailureKind {
    match error {
        LedgerError::InUse { .. } | LedgerError::OtherRun { .. } | LedgerError::Diverged { .. } => {
            FailureKind::Conflict
        }
        _ => FailureKind::General,
    }
}

fn hint_of_api(error: &tinker_api::Error) -> String {
    let tinker_api::Error::Transport(call) = error else {
        return error.hint().to_owned();
    };
    match (call.kind(), call.credential_origin()) {
        (ErrorKind::Unauthenticated, Some(origin)) => hint_for(origin),
        (ErrorKind::Unauthenticated, None) => hint_for(&CredentialOrigin::Given),
        (ErrorKind::Connect, _) => {
            "check the address and whether the server runs; --local uses the embedded one"
                .to_owned()
        }
        _ => call.hint().to_owned(),
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
            Error::AlreadyRunning { .. } | Error::PortTaken { .. } | Error::Conflict(_) => {
                FailureKind::Conflict
            }
            Error::NotFound(_) => FailureKind::NotFound,
            Error::Invalid(_) => FailureKind::Usage,
            _ => FailureKind::General,
        };
        let needs_hint =
            matches!(error, Error::Io { .. }) && !error.to_string().contains("TINKER_HOME");
        let failure = Self::from(anyhow::Error::new(error)).kind(kind);
        match needs_hint {
            true => failure.hint("check the data directory, or choose another with TINKER_HOME"),
            false => failure,
        }
    }
}

impl From<tinker_runs::Error> for Failure {
    fn from(error: tinker_runs::Error) -> Self {
        use tinker_runs::Error;
        let kind = match error {
            Error::Locked { .. } | Error::AlreadyExists { .. } => FailureKind::Conflict,
            Error::NotARun { .. } | Error::UnknownRun { .. } => FailureKind::NotFound,
            Error::AmbiguousRun { .. } => FailureKind::Usage,
            _ => FailureKind::General,
        };
        let hint = match &error {
            error if error.is_disk_full() => {
                Some("free some space, or move the data directory with TINKER_HOME")
            }
            Error::BadLine { .. } => Some("restore or mend the file, or begin a new run"),
            Error::Io { .. } => {
                Some("check the folder, or choose another with --log-path or TINKER_HOME")
            }
            _ => None,
        };
        let failure = Self::from(anyhow::Error::new(error)).kind(kind);
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl From<tinker_recipes::Error> for Failure {
    fn from(error: tinker_recipes::Error) -> Self {
        use tinker_recipes::Error;
        let kind = match &error {
            error if error.is_bad_input() => FailureKind::Usage,
            Error::DataChanged { .. } | Error::AlreadyComplete { .. } => FailureKind::Conflict,
            Error::NoUsableCheckpoint { .. } => FailureKind::NotFound,
            _ => FailureKind::General,
        };
        match error {
            Error::Runs(error) => error.into(),
            // The ledger is the run folder's own, and gone: what comes next does without it.
            Error::Service {
                source: tinker_api::Error::Ledger(LedgerError::Diverged { .. }),
                ..
            } => Self::from(anyhow::Error::new(error))
                .kind(FailureKind::General)
                .hint("a resumed run goes on from its last checkpoint"),
            Error::Service { .. } => Self::from(anyhow::Error::new(error)),
            // The same steps would fail again, so that there is nothing to resume.
            error @ Error::BadRow { .. } => Self::from(anyhow::Error::new(error)).kind(kind).hint(
                "a row is one line: {\"messages\": [...]} or {\"prompt\": \"...\", \"completion\": \"...\"}",
            ),
            error if error.is_divergence() => {
                Self::from(anyhow::Error::new(error)).kind(kind).hint(
                    "begin a new run with a lower --lr, and --grad-clip-norm 1 if that is not \
                     enough",
                )
            }
            error => Self::from(anyhow::Error::new(error)).kind(kind),
        }
    }
}

impl From<tinker_chat::Error> for Failure {
    /// Tokenizers and chat formats are chosen by whoever calls, and so is what they write.
    fn from(error: tinker_chat::Error) -> Self {
        Self::from(anyhow::Error::new(error)).kind(FailureKind::Usage)
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

        let failure = Failure::from(cause).hint("check the path");

        assert_eq!(
            failure.to_string(),
            "error: cannot read `a.jsonl`\ncause: no such file\nhint: check the path"
        );
    }

    #[test]
    fn a_cause_that_was_said_is_not_repeated() {
        let failure = Failure::from(anyhow::anyhow!("b").context("a: b"));

        assert_eq!(failure.to_string(), "error: a: b");
    }

    #[test]
    fn advice_that_follows_has_a_line_of_its_own() {
        let failure = Failure::usage("x").then("first").then("second");

        assert_eq!(failure.to_string(), "error: x\nhint: first\nhint: second");
    }

    #[test]
    fn what_a_command_advises_stands_before_what_is_said_in_general() {
        let failure = || Failure::from(tinker_api::Error::Stopped("x".to_owned()));
        let general = "hint: create a new client from the last checkpoint";

        assert!(failure().to_string().ends_with(general));
        assert!(failure().hint("near").to_string().ends_with("\nhint: near"));
        let then = failure().then("tinker resume x").to_string();
        assert!(
            then.ends_with(&format!("{general}\nhint: tinker resume x")),
            "{then}"
        );
    }

    /// Calls that fail on the way are in the tests of the binary.
    #[test]
    fn every_error_of_the_library_has_an_exit_code_and_a_hint() {
        use std::time::Duration;
        use tinker_api::{Error, ErrorCategory, RequestType};

        let failed = |category| Error::RequestFailed {
            operation: RequestType::ForwardBackward,
            category,
            message: "m".to_owned(),
            request_id: "r".parse().unwrap(),
        };
        let path = || Box::new("tinker://r/weights/a".parse().unwrap());
        let ledger = || std::path::PathBuf::from("run.ledger");
        let source = std::io::ErrorKind::StorageFull.into();
        for (error, code) in [
            (failed(ErrorCategory::User), 2),
            (failed(ErrorCategory::Server), 1),
            (failed(ErrorCategory::Unknown("new".to_owned())), 1),
            (Error::InvalidRequest("x".to_owned()), 2),
            (
                Error::WrongCheckpointKind {
                    path: path(),
                    needed: "sampler",
                    twin: path(),
                },
                2,
            ),
            (Error::Protocol("x".to_owned()), 1),
            (Error::Stopped("x".to_owned()), 1),
            (Error::Abandoned("x".to_owned()), 1),
            (Error::Closed, 1),
            (
                Error::TimedOut {
                    operation: RequestType::OptimStep,
                    after: Duration::from_secs(1),
                },
                1,
            ),
            (
                LedgerError::InUse {
                    path: ledger(),
                    pid: None,
                }
                .into(),
                4,
            ),
            (
                LedgerError::OtherRun {
                    path: ledger(),
                    number: 0,
                    recorded: "a".to_owned(),
                    asked: "b".to_owned(),
                }
                .into(),
                4,
            ),
            (
                LedgerError::Diverged {
                    run: "r".parse().unwrap(),
                    seq_id: 1,
                    recorded: "a".to_owned(),
                    asked: "b".to_owned(),
                }
                .into(),
                4,
            ),
            (
                LedgerError::Damaged {
                    path: ledger(),
                    line: 3,
                    reason: "r".to_owned(),
                }
                .into(),
                1,
            ),
            (
                LedgerError::Io {
                    doing: "write",
                    path: ledger(),
                    source,
                }
                .into(),
                1,
            ),
        ] {
            let text = format!("{error:?}");
            let failure = Failure::from(error);

            assert_eq!(failure.kind.code(), code, "{text}");
            assert!(failure.to_string().contains("\nhint: "), "{failure}");
        }
    }

    #[test]
    fn the_hint_nearest_to_the_cause_wins() {
        let failure = Failure::usage("x").hint("near").hint("far");

        assert!(failure.to_string().ends_with("hint: near"));
    }

    #[test]
    fn a_run_that_did_not_fit_its_ledger_can_be_resumed() {
        let source = LedgerError::Diverged {
            run: "run-0".parse().unwrap(),
            seq_id: 1,
            recorded: "OptimStep".into(),
            asked: "SaveWeights".into(),
        };
        let doing = "training step 3".to_owned();
        let source = source.into();

        let failure = Failure::from(tinker_recipes::Error::Service { doing, source });

        assert_eq!(failure.kind, FailureKind::General);
        let text = failure.to_string();
        assert!(
            text.ends_with("hint: a resumed run goes on from its last checkpoint"),
            "{text}"
        );
    }
}
