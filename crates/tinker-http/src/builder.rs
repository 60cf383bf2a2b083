//! How a client is configured: nothing is read from the environment, nothing is sent.

use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use crate::auth::ApiKey;
use crate::base_url::BaseUrl;
use crate::cassette::Recorder;
use crate::client::Client;
use crate::credentials::Credentials;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observer};
use crate::machine::{PollPolicy, RetryPolicy};
use crate::pools::Timeouts;

/// The version of the official client whose protocol this one speaks; servers key flags on it.
pub const PROTOCOL_VERSION: &str = "0.38.0";

/// Settings of a [`Client`]. Setters cannot fail; [`build`](Self::build) can.
#[derive(Debug, Clone, Default)]
pub struct ClientBuilder {
    pub(crate) base_url: String,
    pub(crate) credentials: Option<Credentials>,
    pub(crate) user_agent: Option<String>,
    pub(crate) headers: Vec<(String, Hidden)>,
    pub(crate) proxy: Option<Hidden>,
    pub(crate) retry: RetryPolicy,
    pub(crate) poll: PollPolicy,
    pub(crate) timeouts: Timeouts,
    pub(crate) observer: Observer,
    pub(crate) recorder: Option<Recorder>,
    pub(crate) telemetry: bool,
}

/// A text that may hold a secret: a proxy's address, a gateway's header.
#[derive(Clone)]
pub(crate) struct Hidden(String);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl ClientBuilder {
    /// A client of the server at `base_url`.
    #[must_use]
    pub fn new(base_url: impl Into<String>) -> Self {
        Self {
            base_url: base_url.into(),
            ..Self::default()
        }
    }

    /// The key to authenticate with. This, or [`credentials`](Self::credentials), is required.
    #[must_use]
    pub fn api_key(self, key: ApiKey) -> Self {
        self.credentials(key.into())
    }

    /// What to authenticate with, where it need not be a key that is known yet.
    #[must_use]
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.credentials = Some(credentials);
        self
    }

    /// The program's name and version, put before this client's in `User-Agent`.
    #[must_use]
    pub fn user_agent(mut self, product: impl Into<String>) -> Self {
        self.user_agent = Some(product.into());
        self
    }

    /// A header to send with every request, such as an access gateway's. Never printed.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), Hidden(value.into())));
        self
    }

    /// A proxy for every request, instead of the system's.
    #[must_use]
    pub fn proxy(mut self, address: impl Into<String>) -> Self {
        self.proxy = Some(Hidden(address.into()));
        self
    }

    /// How calls are repeated.
    #[must_use]
    pub fn retry_policy(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// How results are waited for.
    #[must_use]
    pub fn poll_policy(mut self, policy: PollPolicy) -> Self {
        self.poll = policy;
        self
    }

    /// How long a server that cannot be reached is waited for, by calls and by results.
    #[must_use]
    pub const fn wait_for_server(mut self, time: Duration) -> Self {
        self.retry.reconnect_timeout = time;
        self.poll.outage_timeout = time;
        self
    }

    /// How long each traffic class waits for an answer.
    #[must_use]
    pub const fn timeouts(mut self, timeouts: Timeouts) -> Self {
        self.timeouts = timeouts;
        self
    }

    /// Is told what the client waits for. Called from the client's tasks: must not block.
    #[must_use]
    pub fn observer(mut self, observer: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        self.observer = Observer::new(observer);
        self
    }

    /// Agrees to reports to the service about what fails, without data or secrets. Default no.
    #[must_use]
    pub const fn telemetry(mut self, agreed: bool) -> Self {
        self.telemetry = agreed;
        self
    }

    /// Writes down all that is said to the server, without secrets.
    #[must_use]
    pub fn record(mut self, recorder: Recorder) -> Self {
        self.recorder = Some(recorder);
        self
    }

    /// Checks the settings. Sends nothing.
    ///
    /// # Errors
    /// If the base URL, the key, a header or the proxy is malformed, the key is missing, or a policy
    /// leaves no attempt or an answer no time.
    pub fn build(self) -> Result<Client> {
        self.check_policies()?;
        let base_url: BaseUrl = self.base_url.parse()?;
        if base_url.is_exposed() {
            tracing::warn!(base_url = %base_url, "the API key travels unencrypted to {base_url}");
        }
        Client::from_builder(self, base_url)
    }

    fn check_policies(&self) -> Result<()> {
        let refuse = |what| Err(Error::new(ErrorKind::InvalidRequest, what));
        if self.retry.max_attempts == 0 {
            return refuse(
                "retry policy: max_attempts is 0; with 1 each request is sent once".into(),
            );
        }
        let times = &self.timeouts;
        let classes = [
            ("session", times.session),
            ("train", times.train),
            ("sample", times.sample),
            ("retrieve", times.retrieve),
            ("rest", times.rest),
        ];
        match classes.iter().find(|(_, time)| time.is_zero()) {
            None => Ok(()),
            Some((class, _)) => refuse(format!(
                "timeouts: {class} is 0; give it the time that an answer may take"
            )),
        }
    }

    pub(crate) fn header_map(&self) -> Result<HeaderMap> {
        let mut map = HeaderMap::new();
        for (name, Hidden(value)) in &self.headers {
            let fault = || {
                Error::new(
                    ErrorKind::InvalidRequest,
                    format!("header {name:?} is malformed"),
                )
            };
            let key = HeaderName::try_from(name).map_err(|_| fault())?;
            let mut value = HeaderValue::try_from(value).map_err(|_| fault())?;
            value.set_sensitive(true);
            map.insert(key, value);
        }
        Ok(map)
    }

    pub(crate) fn reqwest_proxy(&self) -> Result<Option<reqwest::Proxy>> {
        self.proxy
            .as_ref()
            .map(|Hidden(address)| {
                reqwest::Proxy::all(address).map_err(|_| {
                    Error::new(ErrorKind::InvalidRequest, "proxy address is malformed")
                })
            })
            .transpose()
    }
}
