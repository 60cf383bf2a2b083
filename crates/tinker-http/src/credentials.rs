//! Where a credential comes from: a key that was given, a command that prints one, or a file.
//!
//! The order is the official client's. Nothing is read from the environment here: who does hands
//! its values in.

use std::fmt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use tokio::process::Command;

use crate::auth::{ApiKey, expiry_of};
use crate::error::{Error, ErrorKind, Result};
use crate::stored_credentials::StoredCredentials;

/// Longest time that a credential command may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// Largest output of a credential command that is read.
const MAX_OUTPUT: usize = 64 << 10;

/// Everything that may name a credential; empty texts count as absent.
#[derive(Clone, Default)]
pub struct CredentialSources {
    /// A key that the program was given.
    pub api_key: Option<String>,
    /// The key of the environment (`TINKER_API_KEY`).
    pub environment_key: Option<String>,
    /// A shell command whose output is a credential (`TINKER_CREDENTIAL_CMD`).
    pub command: Option<String>,
    /// A file of stored keys, such as `~/.tinker/credentials.json`.
    pub stored: Option<PathBuf>,
}

impl fmt::Debug for CredentialSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialSources")
            .field("api_key", &self.api_key.as_ref().map(|_| "***"))
            .field(
                "environment_key",
                &self.environment_key.as_ref().map(|_| "***"),
            )
            .field("command", &self.command.as_ref().map(|_| "***"))
            .field("stored", &self.stored)
            .finish()
    }
}

impl CredentialSources {
    /// Chooses: the key, else the environment's, else the command, else the stored default. A
    /// malformed key gives way to the command, if there is one; never to a stored key. Reads the
    /// file only if it comes to it, and runs nothing.
    ///
    /// # Errors
    /// Of kind `Unauthenticated` if there is no credential, or the key is malformed and there is no
    /// command; of kind `File` if the file cannot be read.
    pub fn resolve(&self) -> Result<Credentials> {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let command = given(&self.command).map(CredentialCommand);
        let key = match given(&self.api_key).or_else(|| given(&self.environment_key)) {
            Some(text) => match (text.parse::<ApiKey>(), &command) {
                (Ok(key), _) => Some(key),
                (Err(_), Some(_)) => None,
                (Err(error), None) => return Err(error),
            },
            None if command.is_some() => None,
            None => Some(self.stored_key()?),
        };
        Ok(Credentials { key, command })
    }

    fn stored_key(&self) -> Result<ApiKey> {
        let stored = match &self.stored {
            Some(path) => StoredCredentials::load(path)?,
            None => StoredCredentials::default(),
        };
        match stored.default_key() {
            Some(record) => record.key.parse(),
            None => Err(Error::new(
                ErrorKind::Unauthenticated,
                "there is no credential: give an API key, set TINKER_API_KEY or \
                 TINKER_CREDENTIAL_CMD, or store a key",
            )),
        }
    }
}

/// A key, a command that prints one, or both: servers may insist on the command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    key: Option<ApiKey>,
    command: Option<CredentialCommand>,
}

impl From<ApiKey> for Credentials {
    fn from(key: ApiKey) -> Self {
        Self {
            key: Some(key),
            command: None,
        }
    }
}

impl Credentials {
    /// The key, unless a command stands in for it.
    pub(crate) const fn key(&self) -> Option<&ApiKey> {
        self.key.as_ref()
    }

    /// A credential for one use. `insists`: the server takes nothing but what a command prints,
    /// or a token.
    pub(crate) async fn current(&self, insists: bool, wall_clock: SystemTime) -> Result<String> {
        match (&self.key, &self.command) {
            (Some(key), _) if !insists || key.is_token() => {
                check_expiry(
                    key,
                    wall_clock,
                    "the API key is a token that has expired: give a \
                     fresh one, or set TINKER_CREDENTIAL_CMD to a command that prints one",
                )?;
                Ok(key.expose().to_owned())
            }
            (_, Some(command)) => {
                let key = command.run().await?;
                check_expiry(
                    &key,
                    wall_clock,
                    "the credential command printed a token that has expired",
                )?;
                Ok(key.expose().to_owned())
            }
            (_, None) => Err(refused(
                "this server wants short-lived credentials: set TINKER_CREDENTIAL_CMD to a \
                 command that prints one",
            )),
        }
    }
}

fn check_expiry(key: &ApiKey, wall_clock: SystemTime, message: &str) -> Result<()> {
    if !key.is_token() {
        return Ok(());
    }
    let Some(expiry) = expiry_of(key.expose()) else {
        return Err(refused(
            "a token must say when it expires; this one does not",
        ));
    };
    let now = wall_clock
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    if now >= expiry {
        return Err(refused(message));
    }
    Ok(())
}

fn refused(message: &str) -> Error {
    Error::new(ErrorKind::Unauthenticated, message)
}

/// A shell command that prints a credential. Never printed: it may hold one.
#[derive(Clone, PartialEq, Eq)]
struct CredentialCommand(String);

impl fmt::Debug for CredentialCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CredentialCommand(***)")
    }
}

impl CredentialCommand {
    /// Runs the command. Neither its output nor its complaints are ever shown.
    async fn run(&self) -> Result<ApiKey> {
        let mut shell = match cfg!(windows) {
            true => shell("cmd", "/C"),
            false => shell("sh", "-c"),
        };
        let running = shell
            .arg(&self.0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(COMMAND_TIMEOUT, running)
            .await
            .map_err(|_| refused("the credential command did not end within a minute"))?
            .map_err(|error| refused("the credential command cannot be run").with_source(error))?;
        let text =
            String::from_utf8_lossy(output.stdout.get(..MAX_OUTPUT).unwrap_or(&output.stdout));
        if text.trim().is_empty() {
            return Err(refused(&format!(
                "the credential command printed nothing ({})",
                output.status
            )));
        }
        text.parse::<ApiKey>().map_err(|_| {
            refused("the credential command printed what is neither a key nor a token")
        })
    }
}

fn shell(program: &str, flag: &str) -> Command {
    let mut command = Command::new(program);
    command.arg(flag);
    command
}
