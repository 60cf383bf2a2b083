//! What one place says about servers and sessions: today the environment. A file or a profile would
//! be another such layer beneath it.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use tinker_types::ProjectId;

use crate::env::{self, Variable};
use crate::failure::{Failure, Result};
use crate::human::parse_duration;

/// Where the official client stores keys, below the home directory.
const STORED_CREDENTIALS: &str = ".tinker/credentials.json";

/// The settings of one place; what it leaves open is for the next place to say.
#[derive(Default)]
pub(super) struct Layer {
    /// Address of the server.
    pub(super) base_url: Option<String>,
    /// Time between two heartbeats of a session, if it is not the client library's own.
    pub(super) heartbeat: Option<Duration>,
    /// Project of new sessions.
    pub(super) project: Option<ProjectId>,
    /// Labels of new sessions.
    pub(super) tags: Vec<String>,
    /// Headers for a gateway before the service.
    pub(super) gateway: Gateway,
    /// Whether failures are reported to the service.
    pub(super) telemetry: bool,
    /// A key, unchecked.
    pub(super) api_key: Option<String>,
    /// A command that prints a key.
    pub(super) credential_command: Option<String>,
    /// A file of keys, which need not be there.
    pub(super) stored_credentials: Option<PathBuf>,
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layer")
            .field("base_url", &self.base_url)
            .field("project", &self.project)
            .field("tags", &self.tags)
            .finish_non_exhaustive()
    }
}

/// What a Cloudflare Access gateway asks for. No secret is ever printed.
#[derive(Default)]
pub(super) struct Gateway {
    pub(super) client_id: Option<String>,
    pub(super) client_secret: Option<String>,
}

impl Gateway {
    /// The headers by name; each is sent if it is known, as the official client does.
    pub(super) fn headers(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let id = self.client_id.as_deref();
        let secret = self.client_secret.as_deref();
        let id = id.map(|id| ("CF-Access-Client-Id", id));
        let secret = secret.map(|secret| ("CF-Access-Client-Secret", secret));
        id.into_iter().chain(secret)
    }
}

impl Layer {
    /// What the environment says.
    ///
    /// # Errors
    /// A variable holds what it cannot.
    pub(super) fn of_environment() -> Result<Self> {
        let home = etcetera::home_dir().ok();
        Ok(Self {
            base_url: env::TINKER_BASE_URL.get(),
            heartbeat: read(env::TINKER_HEARTBEAT, parse_interval)?,
            project: read(env::TINKER_PROJECT_ID, |text| {
                text.trim()
                    .parse()
                    .map_err(|error: tinker_types::TypeError| error.to_string())
            })?,
            tags: split(&env::TINKER_TAGS.get().unwrap_or_default()),
            gateway: Gateway {
                client_id: env::CLOUDFLARE_ACCESS_CLIENT_ID.get(),
                client_secret: env::CLOUDFLARE_ACCESS_CLIENT_SECRET.get(),
            },
            telemetry: env::TINKER_TELEMETRY.get().is_some_and(|text| is_on(&text)),
            api_key: env::TINKER_API_KEY.get(),
            credential_command: env::TINKER_CREDENTIAL_CMD.get(),
            stored_credentials: home.map(|home| home.join(STORED_CREDENTIALS)),
        })
    }
}

/// The value of a variable, where it has one.
fn read<T>(
    variable: Variable,
    parse: impl Fn(&str) -> std::result::Result<T, String>,
) -> Result<Option<T>> {
    let Some(text) = variable.get() else {
        return Ok(None);
    };
    match parse(&text) {
        Ok(value) => Ok(Some(value)),
        Err(what) => Err(Failure::usage(format!("{}={text}: {what}", variable.name))),
    }
}

fn parse_interval(text: &str) -> std::result::Result<Duration, String> {
    let time = parse_duration(text)?;
    match time.is_zero() {
        true => Err("it must be more than nothing".to_owned()),
        false => Ok(time),
    }
}

/// Labels between commas; those that are empty are none.
fn split(text: &str) -> Vec<String> {
    let tags = text.split(',').map(str::trim);
    tags.filter(|tag| !tag.is_empty())
        .map(str::to_owned)
        .collect()
}

/// The words that the official client takes for yes.
fn is_on(text: &str) -> bool {
    matches!(text.to_lowercase().as_str(), "1" | "true" | "yes" | "on")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_stand_between_commas() {
        for (text, expected) in [
            ("", &[][..]),
            ("a", &["a"]),
            (" a, b ,,c,", &["a", "b", "c"]),
        ] {
            assert_eq!(split(text), expected, "{text:?}");
        }
    }

    #[test]
    fn telemetry_is_agreed_to_in_the_official_words_only() {
        for text in ["1", "true", "YES", "On"] {
            assert!(is_on(text), "{text}");
        }
        for text in ["", "0", "2", "no", "off", "false", "y"] {
            assert!(!is_on(text), "{text}");
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let secret = || Some("tml-secret".to_owned());
        let layer = Layer {
            gateway: Gateway {
                client_id: secret(),
                client_secret: secret(),
            },
            api_key: secret(),
            credential_command: secret(),
            ..Layer::default()
        };

        assert!(!format!("{layer:?}").contains("secret"));
    }
}
