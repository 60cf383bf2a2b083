//! One connection pool per traffic class, so that a large upload does not hold up a heartbeat.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::redirect;

use crate::base_url::BaseUrl;
use crate::error::{Error, ErrorKind, Result};
use crate::tls::Tls;

/// Time to make a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Time between signs of life on an idle HTTP/2 connection, and for the answer to one.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// Calls at once in one client of reqwest where calls may share a connection. It makes one HTTP/2
/// connection only, and calls beyond what the server allows on it wait for others to end: polls for
/// as long as samples take. RFC 9113 (section 6.5.2) asks servers to allow at least 100.
const MAX_STREAMS: usize = 100;

/// Connections of a class that rest until they are needed again, where each call takes one.
const MAX_IDLE: usize = 64;

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

/// The pools, built when first needed.
#[derive(Debug)]
pub(crate) struct Pools {
    user_agent: String,
    bypass_proxy: bool,
    is_encrypted: bool,
    proxy: Option<reqwest::Proxy>,
    timeouts: Timeouts,
    tls: Tls,
    classes: [Mutex<Vec<Member>>; 5],
}

/// One of the clients of a class.
#[derive(Debug)]
struct Member {
    client: reqwest::Client,
    /// Held by each call under way.
    place: Arc<()>,
}

impl Member {
    fn n_calls(&self) -> usize {
        Arc::strong_count(&self.place) - 1
    }

    fn lease(&self) -> Lease {
        Lease {
            client: self.client.clone(),
            _place: Some(Arc::clone(&self.place)),
        }
    }
}

/// A client of reqwest for one call, to be kept until its answer was read.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) client: reqwest::Client,
    _place: Option<Arc<()>>,
}

impl Lease {
    /// Of a client that no others share.
    pub(crate) const fn apart(client: reqwest::Client) -> Self {
        Self {
            client,
            _place: None,
        }
    }
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
            is_encrypted: base_url.is_encrypted(),
            proxy,
            timeouts,
            tls: Tls::default(),
            classes: Default::default(),
        }
    }

    /// A client of a class that has room for a call.
    pub(crate) fn get(&self, class: TrafficClass) -> Result<Lease> {
        let members = match class {
            TrafficClass::Session => &self.classes[0],
            TrafficClass::Train => &self.classes[1],
            TrafficClass::Sample => &self.classes[2],
            TrafficClass::Retrieve => &self.classes[3],
            TrafficClass::Rest => &self.classes[4],
        };
        // Where a call takes a connection of its own, one client makes as many as are needed.
        let room = if self.is_encrypted {
            MAX_STREAMS
        } else {
            usize::MAX
        };
        lease(members, room, || self.build(class))
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
            .tls_backend_preconfigured(self.tls.trusting()?)
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
        // Only documents may be elsewhere than the server.
        let is_plain = !self.is_encrypted && self.bypass_proxy && class != TrafficClass::Rest;
        let tls = if is_plain {
            Tls::trusting_nobody()?
        } else {
            self.tls.trusting()?
        };
        let mut builder = reqwest::Client::builder()
            .user_agent(&self.user_agent)
            .tls_backend_preconfigured(tls)
            // reqwest would carry the key to wherever a redirect points.
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(self.timeouts.of(class))
            .http2_adaptive_window(true)
            // Finds dead connections that a network silently dropped.
            .http2_keep_alive_interval(KEEP_ALIVE)
            .http2_keep_alive_timeout(KEEP_ALIVE)
            .tcp_nodelay(true);
        if !self.is_encrypted {
            // HTTP/1.1 has no refusals of the protocol, for which reqwest keeps a copy of each call.
            builder = builder.retry(reqwest::retry::never().max_retries_per_request(0));
            // Each call of a burst took a connection. Most rest for long then, and each takes a file.
            builder = builder.pool_max_idle_per_host(MAX_IDLE);
        }
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

/// A member with room for a call. A new one is built while others can be leased: that takes long.
fn lease(
    members: &Mutex<Vec<Member>>,
    room: usize,
    build: impl FnOnce() -> Result<reqwest::Client>,
) -> Result<Lease> {
    let lock = || members.lock().unwrap_or_else(PoisonError::into_inner);
    let with_room = |members: &[Member]| {
        let member = members.iter().find(|member| member.n_calls() < room)?;
        Some(member.lease())
    };
    if let Some(lease) = with_room(&lock()) {
        return Ok(lease);
    }
    let client = build()?;
    let mut members = lock();
    // Another call may have been quicker; its client serves both.
    if let Some(lease) = with_room(&members) {
        return Ok(lease);
    }
    let place = Arc::default();
    let member = Member { client, place };
    let lease = member.lease();
    members.push(member);
    Ok(lease)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_built_while_others_are_leased_and_only_one_is_kept() {
        let pools = pools("http://127.0.0.1:9");
        let members = Mutex::default();
        let build = || pools.build(TrafficClass::Retrieve);
        let mut other = None;

        let slow = || {
            assert!(members.try_lock().is_ok(), "the others wait");
            other = Some(lease(&members, 100, build)?);
            build()
        };
        let _own = lease(&members, 100, slow).unwrap();

        let members = members.lock().unwrap();
        assert_eq!((members.len(), members[0].n_calls()), (1, 2));
    }

    fn pools(server: &str) -> Pools {
        let base_url = server.parse().unwrap();
        Pools::new(&base_url, "test".into(), None, Timeouts::default())
    }

    /// Makes so many calls at once; how many clients the class has then.
    fn clients(pools: &Pools, n_calls: usize) -> usize {
        let calls = (0..n_calls).map(|_| pools.get(TrafficClass::Retrieve));
        let _calls: Vec<_> = calls.map(Result::unwrap).collect();
        pools.classes[3].lock().unwrap().len()
    }

    #[test]
    fn no_call_waits_for_room_on_a_shared_connection() {
        let pools = pools("https://service.test");

        // (calls at once, clients)
        for (n_calls, expected) in [(100, 1), (101, 2), (250, 3), (300, 3), (1, 3)] {
            assert_eq!(clients(&pools, n_calls), expected, "{n_calls} calls");
        }
        assert!(pools.classes[2].lock().unwrap().is_empty());
    }

    #[test]
    fn one_client_is_enough_where_each_call_has_a_connection() {
        assert_eq!(clients(&pools("http://127.0.0.1:9"), 1000), 1);
    }
}
