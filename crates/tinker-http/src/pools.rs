//! One connection pool per traffic class, so that a large upload does not hold up a heartbeat.

use std::sync::OnceLock;
use std::time::Duration;

use reqwest::redirect;

use crate::base_url::BaseUrl;
use crate::error::{Error, ErrorKind, Result};

/// Time to make a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Time between signs of life on an idle HTTP/2 connection, and for the answer to one.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// Kinds of traffic that do not share connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrafficClass {
    /// Settings and sessions.
    Session,
    /// Training operations.
    Train,
    /// Sample submissions.
    Sample,
    /// Waiting for results.
    Retrieve,
    /// Runs and checkpoints.
    Rest,
}

/// How long each class waits for the server to send something.
///
/// The time starts with the request and again with every part of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Default 60 s; heartbeats take 10 s.
    pub session: Duration,
    /// Default 300 s: uploads are large and the time includes them.
    pub train: Duration,
    /// Default 60 s.
    pub sample: Duration,
    /// Default 45 s: servers hold a poll for less.
    pub retrieve: Duration,
    /// Default 60 s.
    pub rest: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            session: Duration::from_secs(60),
            train: Duration::from_secs(300),
            sample: Duration::from_secs(60),
            retrieve: Duration::from_secs(45),
            rest: Duration::from_secs(60),
        }
    }
}

impl Timeouts {
    const fn of(&self, class: TrafficClass) -> Duration {
        match class {
            TrafficClass::Session => self.session,
            TrafficClass::Train => self.train,
            TrafficClass::Sample => self.sample,
            TrafficClass::Retrieve => self.retrieve,
            TrafficClass::Rest => self.rest,
        }
    }
}

/// The pools, built when first needed: each one loads the trust store.
#[derive(Debug)]
pub(crate) struct Pools {
    user_agent: String,
    bypass_proxy: bool,
    proxy: Option<reqwest::Proxy>,
    timeouts: Timeouts,
    clients: [OnceLock<reqwest::Client>; 5],
}

impl Pools {
    pub(crate) fn new(
        base_url: &BaseUrl,
        user_agent: String,
        proxy: Option<reqwest::Proxy>,
        timeouts: Timeouts,
    ) -> Self {
        Self {
            user_agent,
            // A proxy of the environment cannot reach this machine's own loopback.
            bypass_proxy: base_url.is_loopback() && proxy.is_none(),
            proxy,
            timeouts,
            clients: Default::default(),
        }
    }

    /// The pool of a class.
    pub(crate) fn get(&self, class: TrafficClass) -> Result<&reqwest::Client> {
        let slot = match class {
            TrafficClass::Session => &self.clients[0],
            TrafficClass::Train => &self.clients[1],
            TrafficClass::Sample => &self.clients[2],
            TrafficClass::Retrieve => &self.clients[3],
            TrafficClass::Rest => &self.clients[4],
        };
        if let Some(client) = slot.get() {
            return Ok(client);
        }
        let client = self.build(class)?;
        Ok(slot.get_or_init(|| client))
    }

    /// A pool that nobody else has. A connection is driven by the runtime that made it, and ends with
    /// it; so what must depend on one runtime only has a pool to itself.
    pub(crate) fn apart(&self) -> Result<reqwest::Client> {
        self.build(TrafficClass::Session)
    }

    /// A client for storages that signed addresses point to. It has no key and no header of a
    /// gateway, follows at most five redirects, and leaves what comes as it is.
    pub(crate) fn storage(&self, stall_timeout: Duration) -> Result<reqwest::Client> {
        let policy = redirect::Policy::custom(|attempt| {
            let was_encrypted = attempt.previous().iter().any(|url| url.scheme() == "https");
            if attempt.previous().len() > 5 || (was_encrypted && attempt.url().scheme() != "https")
            {
                return attempt.error("refused");
            }
            attempt.follow()
        });
        let mut builder = reqwest::Client::builder()
            .user_agent(&self.user_agent)
            .redirect(policy)
            // It would tell the next host the signed address.
            .referer(false)
            .no_gzip()
            .no_zstd()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(stall_timeout);
        if self.bypass_proxy {
            builder = builder.no_proxy();
        }
        if let Some(proxy) = &self.proxy {
            builder = builder.proxy(proxy.clone());
        }
        builder.build().map_err(|error| {
            Error::new(ErrorKind::Connect, "cannot set up a connection pool").with_source(error)
        })
    }

    fn build(&self, class: TrafficClass) -> Result<reqwest::Client> {
        let mut builder = reqwest::Client::builder()
            .user_agent(&self.user_agent)
            // reqwest would carry the key to wherever a redirect points.
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(self.timeouts.of(class))
            .http2_adaptive_window(true)
            // Finds dead connections that a network silently dropped.
            .http2_keep_alive_interval(KEEP_ALIVE)
            .http2_keep_alive_timeout(KEEP_ALIVE)
            .tcp_nodelay(true);
        if self.bypass_proxy {
            builder = builder.no_proxy();
        }
        if let Some(proxy) = &self.proxy {
            builder = builder.proxy(proxy.clone());
        }
        builder.build().map_err(|error| {
            Error::new(ErrorKind::Connect, "cannot set up a connection pool").with_source(error)
        })
    }
}
