//! Which server a command talks to and where data lives: flag, then environment, then default.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use etcetera::BaseStrategy as _;
use tinker_recipes::sft::TrainedOn;

use crate::env;
use crate::failure::{Failure, FailureKind, Result};
use crate::human::parse_duration;
use tinker_api::{ApiKey, BaseUrl};

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
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Data directory.
    pub(crate) home: PathBuf,
    flags: ServerFlags,
    env_base_url: Option<String>,
    /// Time between two heartbeats of a session, if it is not the client library's own.
    pub(crate) heartbeat: Option<Duration>,
    /// Or what is wrong with it, which matters only to commands that need it.
    api_key: Option<std::result::Result<ApiKey, String>>,
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
        /// The key to show it.
        api_key: ApiKey,
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
        Ok(Self {
            home: home()?,
            flags: flags.clone(),
            env_base_url: env::TINKER_BASE_URL.get(),
            heartbeat: heartbeat()?,
            api_key: env::TINKER_API_KEY.get().map(|key| parse(&key)),
        })
    }

    /// The server for a command about `model`, where it names one.
    ///
    /// # Errors
    /// A remote server is asked for and there is no key.
    pub(crate) fn target(&self, model: Option<&str>) -> Result<Target> {
        if self.flags.local {
            return Ok(Target::Embedded);
        }
        let url = self.flags.base_url.as_ref().or(self.env_base_url.as_ref());
        // A directory can only be read by a server on this machine.
        let is_embedded =
            model.is_some_and(|name| name.starts_with(EMBEDDED_PREFIX) || Path::new(name).is_dir());
        match (url, self.api_key.is_some()) {
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
                let given = self.flags.base_url.as_ref().or(self.env_base_url.as_ref());
                match given {
                    _ if self.flags.local => Err(other_server("the embedded server", url, &flag)),
                    Some(given) if given.trim_end_matches('/') != url => {
                        Err(other_server(given, url, &flag))
                    }
                    _ if self.api_key.is_none() => Err(no_key_for(url)),
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
    pub(crate) fn api_key(&self) -> Result<Option<ApiKey>> {
        match &self.api_key {
            None => Ok(None),
            Some(Ok(key)) => Ok(Some(key.clone())),
            Some(Err(what)) => Err(Failure::new(FailureKind::Credentials, what)
                .hint("correct TINKER_API_KEY, or unset it to use the embedded server")),
        }
    }

    fn remote(&self, base_url: &str) -> Result<Target> {
        let no_key = || Failure::new(FailureKind::Credentials, "there is no API key");
        Ok(Target::Remote {
            base_url: base_url.trim_end_matches('/').to_owned(),
            api_key: self.api_key()?.ok_or_else(no_key)?,
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
        .hint("set TINKER_API_KEY; some servers accept any value that starts with tml-")
}

fn other_server(given: &str, recorded: &str, flag: &str) -> Failure {
    let what = format!("the run was trained on {recorded}, not on {given}");
    Failure::new(FailureKind::Conflict, what).hint(format!(
        "its checkpoints are there: resume with {flag}, or begin a new run"
    ))
}

fn parse(key: &str) -> std::result::Result<ApiKey, String> {
    key.parse()
        .map_err(|error: <ApiKey as FromStr>::Err| error.to_string())
}

/// `$TINKER_HEARTBEAT`.
fn heartbeat() -> Result<Option<Duration>> {
    let Some(text) = env::TINKER_HEARTBEAT.get() else {
        return Ok(None);
    };
    let what = match parse_duration(&text) {
        Ok(time) if !time.is_zero() => return Ok(Some(time)),
        Ok(_) => "it must be more than nothing".to_owned(),
        Err(what) => what,
    };
    Err(Failure::usage(format!("TINKER_HEARTBEAT={text}: {what}")))
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
mod tests {
    use super::*;

    fn settings(local: bool, flag_url: Option<&str>, env_url: Option<&str>, key: bool) -> Settings {
        Settings {
            home: PathBuf::new(),
            flags: ServerFlags {
                local,
                base_url: flag_url.map(str::to_owned),
            },
            env_base_url: env_url.map(str::to_owned),
            heartbeat: None,
            api_key: key.then(|| parse("tml-k")),
        }
    }

    fn url_of(settings: &Settings, model: &str) -> String {
        match settings.target(Some(model)).unwrap() {
            Target::Embedded => "embedded".to_owned(),
            Target::Remote { base_url, .. } => base_url,
        }
    }

    #[test]
    fn flag_beats_environment_beats_default() {
        let check = |local, flag, env, key, model, expected| {
            assert_eq!(url_of(&settings(local, flag, env, key), model), expected);
        };

        check(false, None, None, false, "Qwen/Qwen3-8B", "embedded");
        check(false, None, None, true, "Qwen/Qwen3-8B", HOSTED_URL);
        check(false, None, None, true, "tinker/nano", "embedded");
        check(
            false,
            None,
            Some("http://e/"),
            true,
            "tinker/nano",
            "http://e",
        );
        check(
            false,
            Some("http://f"),
            Some("http://e"),
            true,
            "x",
            "http://f",
        );
        check(true, None, Some("http://e"), true, "x", "embedded");
    }

    #[test]
    fn remote_without_a_key_is_a_credentials_failure() {
        let failure = settings(false, Some("http://f"), None, false)
            .target(None)
            .unwrap_err();

        assert_eq!(failure.kind, FailureKind::Credentials);
        assert!(failure.to_string().contains("TINKER_API_KEY"));
    }

    #[test]
    fn a_malformed_key_matters_only_where_it_is_needed() {
        let bad_key = |local| Settings {
            api_key: Some(parse("secret")),
            ..settings(local, None, None, false)
        };

        assert_eq!(bad_key(true).target(None).unwrap(), Target::Embedded);
        assert_eq!(
            bad_key(false).target(Some("tinker/nano")).unwrap(),
            Target::Embedded
        );
        let failure = bad_key(false).target(None).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Credentials);
        assert!(!failure.to_string().contains("secret"));
    }

    #[test]
    fn a_run_goes_on_where_it_was_trained() {
        let check = |settings: Settings, server: TrainedOn, expected: Option<&str>| {
            let kind = match settings.target_of_run(Some(&server), "tinker/nano") {
                Ok(Target::Embedded) => Some("embedded".to_owned()),
                Ok(Target::Remote { base_url, .. }) => Some(base_url),
                Err(failure) => {
                    assert_eq!(failure.kind, FailureKind::Conflict, "{failure}");
                    None
                }
            };
            assert_eq!(kind.as_deref(), expected);
        };
        let there = || TrainedOn::BaseUrl("http://f".to_owned());

        check(settings(false, None, None, true), there(), Some("http://f"));
        check(
            settings(false, Some("http://f/"), None, true),
            there(),
            Some("http://f"),
        );
        check(settings(true, None, None, true), there(), None);
        check(settings(false, None, Some("http://e"), true), there(), None);
        check(
            settings(false, None, Some("http://e"), true),
            TrainedOn::Embedded,
            Some("embedded"),
        );
        check(
            settings(false, Some("http://f"), None, true),
            TrainedOn::Embedded,
            None,
        );
    }

    #[test]
    fn next_command_repeats_the_flags_it_needs() {
        let check = |settings: Settings, model, expected| {
            let target = settings.target(Some(model)).unwrap();
            assert_eq!(settings.server_flags_to_repeat(&target), expected);
        };

        check(settings(false, None, None, false), "tinker/nano", "");
        check(settings(false, None, None, true), "tinker/nano", " --local");
        check(settings(true, None, None, false), "x", " --local");
        check(
            settings(false, Some("http://f"), None, true),
            "x",
            " --base-url http://f",
        );
        check(settings(false, None, Some("http://e"), true), "x", "");
        let there = TrainedOn::BaseUrl("http://f".to_owned());
        let resumed = settings(false, None, None, true);
        let target = resumed.target_of_run(Some(&there), "x").unwrap();
        assert_eq!(
            resumed.server_flags_to_repeat(&target),
            " --base-url http://f"
        );
    }
}
