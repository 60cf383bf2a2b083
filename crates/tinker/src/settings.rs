//! Which server a command talks to, how, and where data lives: flag, then environment, then default.

mod credential;
mod layer;

use std::path::{Path, PathBuf};

use etcetera::BaseStrategy as _;
use tinker_api::{ApiKey, BaseUrl, CredentialSources, Credentials, ServiceClientBuilder};
use tinker_recipes::sft::TrainedOn;

use self::credential::BadCredential;
pub(crate) use self::credential::hint_for;
use self::layer::Layer;
use crate::env;
use crate::failure::{Failure, FailureKind, Result};

/// Where Thinking Machines serves the API.
pub(crate) const HOSTED_URL: &str = "https://tinker.thinkingmachines.dev/services/tinker-prod";
/// The base model of commands that are not told one: it is always there.
pub(crate) const DEFAULT_MODEL: &str = "tinker/nano";
/// Names that start so are models of the embedded server.
const EMBEDDED_PREFIX: &str = "tinker/";

/// The flags that choose a server, on every command.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct ServerFlags {
    /// Use the embedded server on this machine, started if it does not run
    #[arg(
        long,
        global = true,
        conflicts_with = "base_url",
        help_heading = "Global options"
    )]
    pub(crate) local: bool,
    /// Use the server at this address
    #[arg(
        long,
        global = true,
        value_name = "URL",
        help_heading = "Global options"
    )]
    pub(crate) base_url: Option<String>,
}

/// What flags and environment say, before a command asks.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Data directory.
    pub(crate) home: PathBuf,
    flags: ServerFlags,
    /// What lies beneath the flags.
    environment: Layer,
    /// Chosen among all layers. What is wrong with it matters only to commands that need one.
    credentials: std::result::Result<Option<Credentials>, BadCredential>,
}

/// The server of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// The one on this machine.
    Embedded,
    /// Another one.
    Remote {
        /// Its address.
        base_url: String,
        /// What to show it.
        credentials: Credentials,
    },
}

impl Target {
    /// What a run records of it.
    pub(crate) fn to_record(&self) -> TrainedOn {
        match self {
            Self::Embedded => TrainedOn::Embedded,
            Self::Remote { base_url, .. } => TrainedOn::BaseUrl(base_url.clone()),
        }
    }
}

impl Settings {
    /// Reads the environment beneath `flags`.
    ///
    /// # Errors
    /// There is no home directory to keep data in, or a variable holds what it cannot.
    pub(crate) fn load(flags: &ServerFlags) -> Result<Self> {
        Ok(Self::new(home()?, flags.clone(), Layer::of_environment()?))
    }

    fn new(home: PathBuf, flags: ServerFlags, environment: Layer) -> Self {
        let sources = CredentialSources {
            api_key: None,
            environment_key: environment.api_key.clone(),
            command: environment.credential_command.clone(),
            stored: environment.stored_credentials.clone(),
        };
        Self {
            home,
            flags,
            environment,
            credentials: sources.find().map_err(BadCredential::new),
        }
    }

    /// The server for a command about `model`, where it names one.
    ///
    /// # Errors
    /// A remote server is asked for and there is no key.
    pub(crate) fn target(&self, model: Option<&str>) -> Result<Target> {
        if self.flags.local {
            return Ok(Target::Embedded);
        }
        let url = self.base_url();
        // A directory can only be read by a server on this machine.
        let is_embedded =
            model.is_some_and(|name| name.starts_with(EMBEDDED_PREFIX) || Path::new(name).is_dir());
        match (url, self.has_credential()) {
            (Some(url), has_key) => {
                check_address(url)?;
                if has_key {
                    self.remote(url)
                } else {
                    Err(no_key_for(url))
                }
            }
            (None, true) if !is_embedded => self.remote(HOSTED_URL),
            (None, _) => Ok(Target::Embedded),
        }
    }

    /// The server to go on with a run on `model`: the one it was trained on, where its checkpoints
    /// are. Runs that do not record one are asked for as [`Self::target`] does.
    ///
    /// # Errors
    /// A flag names another server, or the environment does while the recorded one needs a key: a
    /// key is for the server it was set for. Or there is no key.
    pub(crate) fn target_of_run(&self, server: Option<&TrainedOn>, model: &str) -> Result<Target> {
        let Some(server) = server else {
            return self.target(Some(model));
        };
        match server {
            TrainedOn::Embedded => match &self.flags.base_url {
                Some(url) => Err(other_server(url, "the embedded server", "--local")),
                None => Ok(Target::Embedded),
            },
            TrainedOn::BaseUrl(url) => {
                let flag = format!("--base-url {url}");
                match self.base_url() {
                    _ if self.flags.local => Err(other_server("the embedded server", url, &flag)),
                    Some(given) if given.trim_end_matches('/') != url => {
                        Err(other_server(given, url, &flag))
                    }
                    _ if !self.has_credential() => Err(no_key_for(url)),
                    _ => self.remote(url),
                }
            }
        }
    }

    /// The flags that a command printed for later needs to reach `target`, when it names no
    /// embedded model itself.
    pub(crate) fn server_flags_to_repeat(&self, target: &Target) -> String {
        let has_flag = self.flags.local || self.flags.base_url.is_some();
        if !has_flag && self.target(None).is_ok_and(|default| default == *target) {
            return String::new();
        }
        match target {
            Target::Embedded => " --local".to_owned(),
            Target::Remote { base_url, .. } => format!(" --base-url {base_url}"),
        }
    }

    /// The key in the environment, which `tinker serve` asks its clients for.
    ///
    /// # Errors
    /// It cannot be a key.
    pub(crate) fn serve_key(&self) -> Result<Option<ApiKey>> {
        let Some(text) = &self.environment.api_key else {
            return Ok(None);
        };
        match text.parse::<ApiKey>() {
            Ok(key) => Ok(Some(key)),
            Err(error) => {
                let what = format!("{}: {}", env::TINKER_API_KEY.name, error.message());
                Err(Failure::new(FailureKind::Credentials, what)
                    .hint("correct it, or unset it: the server then makes a key of its own"))
            }
        }
    }

    /// Puts what the settings say of sessions and of the way to `target` into a client.
    pub(crate) fn configure(
        &self,
        target: &Target,
        mut builder: ServiceClientBuilder,
    ) -> ServiceClientBuilder {
        let layer = &self.environment;
        builder = builder.tags(layer.tags.iter().cloned());
        if let Some(project) = &layer.project {
            builder = builder.project(project.clone());
        }
        if let Some(interval) = layer.heartbeat {
            builder = builder.heartbeat_interval(interval);
        }
        match target {
            Target::Embedded => builder,
            Target::Remote { .. } => layer
                .gateway
                .headers()
                .fold(builder, |builder, (name, value)| {
                    builder.header(name, value)
                })
                .telemetry(layer.telemetry),
        }
    }

    /// The address that was asked for.
    fn base_url(&self) -> Option<&String> {
        let below = self.environment.base_url.as_ref();
        self.flags.base_url.as_ref().or(below)
    }

    /// Whether there is a credential, be it one that cannot be used.
    const fn has_credential(&self) -> bool {
        !matches!(self.credentials, Ok(None))
    }

    fn remote(&self, base_url: &str) -> Result<Target> {
        let credentials = self.credentials.clone()?;
        Ok(Target::Remote {
            base_url: base_url.trim_end_matches('/').to_owned(),
            credentials: credentials.ok_or_else(|| no_key_for(base_url))?,
        })
    }
}

fn check_address(url: &str) -> Result<()> {
    match url.parse::<BaseUrl>() {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::usage(error.message())
            .hint("write it like https://host/path or http://127.0.0.1:8642")),
    }
}

fn no_key_for(url: &str) -> Failure {
    Failure::new(FailureKind::Credentials, format!("no API key for {url}"))
        .hint("set TINKER_API_KEY or TINKER_CREDENTIAL_CMD; some servers accept any value that starts with tml-")
}

fn other_server(given: &str, recorded: &str, flag: &str) -> Failure {
    let what = format!("the run was trained on {recorded}, not on {given}");
    Failure::new(FailureKind::Conflict, what).hint(format!(
        "its checkpoints are there: resume with {flag}, or begin a new run"
    ))
}

/// `$TINKER_HOME`, else the platform's data directory.
fn home() -> Result<PathBuf> {
    if let Some(home) = env::TINKER_HOME.get() {
        return std::path::absolute(&home)
            .map_err(|error| Failure::usage(format!("TINKER_HOME={home}: {error}")));
    }
    let base = etcetera::choose_base_strategy().map_err(|_| {
        Failure::usage("there is no home directory to keep data in")
            .hint("set TINKER_HOME to a directory")
    })?;
    Ok(base.data_dir().join("tinker"))
}

#[cfg(test)]
mod tests;
