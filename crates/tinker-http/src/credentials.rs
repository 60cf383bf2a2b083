//! Where a credential comes from: a key that was given, a command that prints one, or a file.
//!
//! The order is the official client's. Nothing is read from the environment here: who does hands
//! its values in.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, SystemTime};

use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use crate::auth::{ApiKey, expiry_of};
use crate::error::{Error, ErrorKind, Result};
use crate::stored_credentials::StoredCredentials;

/// Longest time that a credential command may take.
pub(crate) const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// Largest output of a credential command, in bytes.
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

/// Where a credential came from; `Display` names it for people.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CredentialOrigin {
    /// The program was given it.
    Given,
    /// The environment: `TINKER_API_KEY`.
    Environment,
    /// What a command printed: `TINKER_CREDENTIAL_CMD`.
    Command,
    /// The default key of a file of stored keys.
    Stored {
        /// The key's name.
        name: String,
        /// The file.
        path: PathBuf,
    },
}

impl fmt::Display for CredentialOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Given => f.write_str("the API key"),
            Self::Environment => f.write_str("TINKER_API_KEY"),
            Self::Command => f.write_str("TINKER_CREDENTIAL_CMD"),
            Self::Stored { name, path } => {
                write!(f, "the stored key {name:?} in {}", path.display())
            }
        }
    }
}

impl CredentialSources {
    /// Chooses as [`find`](Self::find) does.
    ///
    /// # Errors
    /// As `find`, and of kind `Unauthenticated` if there is no credential.
    pub fn resolve(&self) -> Result<Credentials> {
        self.find()?.ok_or_else(|| {
            refused(
                "there is no credential: give an API key, set TINKER_API_KEY or \
                 TINKER_CREDENTIAL_CMD, or store a key",
            )
        })
    }

    /// Chooses: the key, else the environment's, else the command, else the stored default, else
    /// nothing. A malformed key gives way to the command, if there is one; never to a stored key.
    /// Reads the file only if it comes to it, and runs nothing.
    ///
    /// # Errors
    /// Of kind `Unauthenticated` if the key is malformed and there is no command; of kind `File` if
    /// the file cannot be read.
    pub fn find(&self) -> Result<Option<Credentials>> {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let command = given(&self.command).map(CredentialCommand);
        let key = given(&self.api_key).map(|key| (key, CredentialOrigin::Given));
        let environment = || {
            let key = given(&self.environment_key)?;
            Some((key, CredentialOrigin::Environment))
        };
        let key = match key.or_else(environment) {
            Some((text, origin)) => match (parse(&text, &origin), &command) {
                (Ok(key), _) => Some((key, origin)),
                (Err(_), Some(_)) => None,
                (Err(error), None) => return Err(error),
            },
            None if command.is_some() => None,
            None => self.stored_key()?,
        };
        let origin = match (&key, &command) {
            (None, None) => return Ok(None),
            (Some((_, origin)), _) => origin.clone(),
            (None, Some(_)) => CredentialOrigin::Command,
        };
        Ok(Some(Credentials {
            key: key.map(|(key, _)| key),
            command,
            origin,
        }))
    }

    fn stored_key(&self) -> Result<Option<(ApiKey, CredentialOrigin)>> {
        let Some(path) = &self.stored else {
            return Ok(None);
        };
        let stored = StoredCredentials::load(path)?;
        let Some(record) = stored.default_key() else {
            return Ok(None);
        };
        let origin = CredentialOrigin::Stored {
            name: record.name.clone(),
            path: path.clone(),
        };
        Ok(Some((parse(&record.key, &origin)?, origin)))
    }
}

/// A key, or an error that says where the text came from.
fn parse(text: &str, origin: &CredentialOrigin) -> Result<ApiKey> {
    text.parse()
        .map_err(|error: Error| match origin {
            CredentialOrigin::Given => error,
            origin => refused(&format!("{origin}: {}", error.message())),
        })
        .map_err(|error| error.with_credential(origin))
}

/// A key, a command that prints one, or both: servers may insist on the command. Two are equal if
/// they authenticate alike, wherever they came from.
#[derive(Debug, Clone)]
pub struct Credentials {
    key: Option<ApiKey>,
    command: Option<CredentialCommand>,
    /// Of the key, if there is one.
    origin: CredentialOrigin,
}

impl PartialEq for Credentials {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key && self.command == other.command
    }
}

impl Eq for Credentials {}

impl From<ApiKey> for Credentials {
    fn from(key: ApiKey) -> Self {
        Self {
            key: Some(key),
            command: None,
            origin: CredentialOrigin::Given,
        }
    }
}

impl Credentials {
    /// The key, unless a command stands in for it.
    pub(crate) const fn key(&self) -> Option<&ApiKey> {
        self.key.as_ref()
    }

    /// Where the credential for one use comes from; `insists` as for [`current`](Self::current).
    pub(crate) fn origin(&self, insists: bool) -> &CredentialOrigin {
        match (&self.key, &self.command) {
            (Some(key), Some(_)) if insists && !key.is_token() => &CredentialOrigin::Command,
            _ => &self.origin,
        }
    }

    /// A credential for one use. `insists`: the server takes nothing but what a command prints,
    /// or a token.
    pub(crate) async fn current(&self, insists: bool, wall_clock: SystemTime) -> Result<String> {
        let current = match (&self.key, &self.command) {
            (Some(key), _) if !insists || key.is_token() => {
                let expired = || {
                    format!(
                        "{} is a token that has expired: give a fresh one, or set \
                         TINKER_CREDENTIAL_CMD to a command that prints one",
                        self.origin
                    )
                };
                check_expiry(key, wall_clock, expired).map(|()| key.expose().to_owned())
            }
            (_, Some(command)) => command.run().await.and_then(|key| {
                let expired =
                    || "the credential command printed a token that has expired".to_owned();
                check_expiry(&key, wall_clock, expired)?;
                Ok(key.expose().to_owned())
            }),
            (_, None) => Err(refused(
                "this server wants short-lived credentials: set TINKER_CREDENTIAL_CMD to a \
                 command that prints one",
            )),
        };
        current.map_err(|error| error.with_credential(self.origin(insists)))
    }
}

fn check_expiry(
    key: &ApiKey,
    wall_clock: SystemTime,
    message: impl FnOnce() -> String,
) -> Result<()> {
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
        return Err(refused(&message()));
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
        let (printed, status) = tokio::time::timeout(COMMAND_TIMEOUT, self.output())
            .await
            .map_err(|_| refused("the credential command did not end within a minute"))?
            .map_err(|error| refused("the credential command cannot be run").with_source(error))?;
        let Some(status) = status else {
            return Err(refused("the credential command printed more than 64 KiB"));
        };
        let text = String::from_utf8_lossy(&printed);
        if text.trim().is_empty() {
            return Err(refused(&format!(
                "the credential command printed nothing ({status})"
            )));
        }
        text.parse::<ApiKey>().map_err(|_| {
            refused("the credential command printed what is neither a key nor a token")
        })
    }

    /// What it prints, and how it ended; if that is too much, it is ended instead.
    async fn output(&self) -> io::Result<(Vec<u8>, Option<ExitStatus>)> {
        let mut shell = match cfg!(windows) {
            true => shell("cmd", "/C"),
            false => shell("sh", "-c"),
        };
        let mut child = shell
            .arg(&self.0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let mut printed = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            let most = MAX_OUTPUT as u64 + 1;
            stdout.take(most).read_to_end(&mut printed).await?;
        }
        if printed.len() > MAX_OUTPUT {
            return Ok((printed, None));
        }
        Ok((printed, Some(child.wait().await?)))
    }
}

fn shell(program: &str, flag: &str) -> Command {
    let mut command = Command::new(program);
    command.arg(flag);
    command
}
