//! A credential that cannot be used, and what to do about that.

use tinker_api::CredentialOrigin;

use crate::failure::{Failure, FailureKind};

/// Why the credential that comes first cannot be used; never the credential itself.
#[derive(Debug, Clone)]
pub(super) struct BadCredential {
    what: String,
    hint: String,
}

impl BadCredential {
    pub(super) fn new(error: impl Into<tinker_api::Error>) -> Self {
        let error = error.into();
        let origin = match &error {
            tinker_api::Error::Transport(error) => error.credential_origin(),
            _ => None,
        };
        Self {
            hint: origin.map_or_else(
                // Only a file can fail before it says what it holds.
                || format!("mend or remove the file, set TINKER_API_KEY, {OR_EMBEDDED}"),
                hint_for,
            ),
            // With its causes, in one line.
            what: format!("{:#}", anyhow::Error::new(error)),
        }
    }
}

impl From<BadCredential> for Failure {
    fn from(bad: BadCredential) -> Self {
        Self::new(FailureKind::Credentials, bad.what).hint(bad.hint)
    }
}

const OR_EMBEDDED: &str = "or use --local for the embedded server";

/// What to do about a credential that was refused, by where it came from.
pub(crate) fn hint_for(origin: &CredentialOrigin) -> String {
    match origin {
        CredentialOrigin::Environment => format!("check TINKER_API_KEY, {OR_EMBEDDED}"),
        CredentialOrigin::Command => {
            format!("see what TINKER_CREDENTIAL_CMD prints, {OR_EMBEDDED}")
        }
        CredentialOrigin::Stored { path, .. } => format!(
            "store another key in {}, set TINKER_API_KEY, {OR_EMBEDDED}",
            path.display()
        ),
        _ => format!("check the API key, {OR_EMBEDDED}"),
    }
}
