//! The client: one server, one key, and what calls share.

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use reqwest::header::HeaderMap;

use crate::adaptive::{AdaptiveGate, Room, max_open_files};
use crate::base_url::BaseUrl;
use crate::builder::ClientBuilder;
use crate::cassette::Recorder;
use crate::clock::Clock;
use crate::credentials::Credentials;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Observer};
use crate::in_flight::{FlightTable, InFlight};
use crate::machine::{Link, PollPolicy, RetryPolicy};
use crate::pools::Pools;
use crate::setup::Setup;
use crate::telemetry::Telemetry;
use crate::tokens::TokenCell;

/// A client of one server. Cheap to clone; clones share connections, token and budgets.
///
/// The first call fetches the server's settings. Each endpoint is one method; those that submit
/// work return a future's id, which the `retrieve` methods wait for.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) base_url: BaseUrl,
    /// Where the server is now, if it moved since.
    moved: RwLock<Option<BaseUrl>>,
    pub(crate) credentials: Credentials,
    /// Whether the server takes nothing but what a credential command prints.
    pub(crate) insists_on_command: AtomicBool,
    /// Held while a credential command runs.
    pub(crate) command_turn: tokio::sync::Mutex<()>,
    pub(crate) headers: HeaderMap,
    pub(crate) retry: RetryPolicy,
    pub(crate) poll: PollPolicy,
    pub(crate) pools: Pools,
    pub(crate) clock: Clock,
    pub(crate) observer: Observer,
    pub(crate) recorder: Option<Recorder>,
    pub(crate) telemetry: Option<Arc<Telemetry>>,
    pub(crate) link: Mutex<Link>,
    pub(crate) samples: AdaptiveGate,
    pub(crate) flights: FlightTable,
    pub(crate) token: TokenCell,
    pub(crate) setup: tokio::sync::OnceCell<Setup>,
}

impl Client {
    /// A builder for the server at `base_url`.
    #[must_use]
    pub fn builder(base_url: impl Into<String>) -> ClientBuilder {
        ClientBuilder::new(base_url)
    }

    pub(crate) fn from_builder(builder: ClientBuilder, base_url: BaseUrl) -> Result<Self> {
        let headers = builder.header_map()?;
        let proxy = builder.reqwest_proxy()?;
        let Some(credentials) = builder.credentials else {
            return Err(Error::new(
                ErrorKind::Unauthenticated,
                format!("no API key was given for {base_url}"),
            ));
        };
        let own = concat!("tinker-rust/", env!("CARGO_PKG_VERSION"));
        let user_agent = match builder.user_agent {
            Some(product) => format!("{product} {own}"),
            None => own.to_owned(),
        };
        let room = if base_url.is_encrypted() {
            Room::of_encrypted()
        } else {
            Room::of_plain(max_open_files())
        };
        let inner = Inner {
            samples: AdaptiveGate::of_process(&base_url.to_string(), &credentials, room),
            pools: Pools::new(&base_url, user_agent, proxy, builder.timeouts),
            base_url,
            moved: RwLock::default(),
            credentials,
            insists_on_command: AtomicBool::new(false),
            command_turn: tokio::sync::Mutex::default(),
            headers,
            retry: builder.retry,
            poll: builder.poll,
            clock: Clock::start(),
            observer: builder.observer,
            recorder: builder.recorder,
            telemetry: builder.telemetry.then(Arc::default),
            link: Mutex::default(),
            flights: FlightTable::default(),
            token: TokenCell::default(),
            setup: tokio::sync::OnceCell::new(),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Where the server was when the client was built.
    #[must_use]
    pub fn base_url(&self) -> &BaseUrl {
        &self.inner.base_url
    }

    /// Sends every request to `base_url` from now on, calls under way included: the same server,
    /// with the same key and below the same path, has another port now.
    pub fn move_to(&self, base_url: BaseUrl) {
        let mut moved = self
            .inner
            .moved
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *moved = Some(base_url);
    }

    /// Where a call to `url` goes now.
    pub(crate) fn place(&self, url: &url::Url) -> url::Url {
        let moved = self.inner.moved.read();
        let moved = moved.unwrap_or_else(PoisonError::into_inner);
        match &*moved {
            Some(base_url) => base_url.place(url),
            None => url.clone(),
        }
    }

    /// How calls are repeated.
    #[must_use]
    pub fn retry_policy(&self) -> &RetryPolicy {
        &self.inner.retry
    }

    /// How results are waited for.
    #[must_use]
    pub fn poll_policy(&self) -> &PollPolicy {
        &self.inner.poll
    }

    /// Time since the client was built, by the clock that its decisions use.
    #[must_use]
    pub fn now(&self) -> std::time::Duration {
        self.inner.clock.now()
    }

    /// Waits, by the same clock.
    pub async fn sleep(&self, time: std::time::Duration) {
        self.inner.clock.sleep(time).await;
    }

    /// Tells the client's observer.
    pub fn tell(&self, event: &Event) {
        self.inner.observer.tell(event);
    }

    /// The limit on samples in flight; clients of this process with the same server and key share it.
    #[must_use]
    pub fn sample_gate(&self) -> &AdaptiveGate {
        &self.inner.samples
    }

    /// What this client and its clones have under way, oldest first: calls being sent and results
    /// awaited. Costs a copy of each row.
    #[must_use]
    pub fn in_flight(&self) -> Vec<InFlight> {
        self.inner.flights.rows(self.now())
    }

    pub(crate) const fn from_inner(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// A client that does not keep what it shares alive.
    pub(crate) fn downgrade(&self) -> Weak<Inner> {
        Arc::downgrade(&self.inner)
    }

    /// The client again, if another one is left.
    pub(crate) fn upgrade(inner: &Weak<Inner>) -> Option<Self> {
        inner.upgrade().map(Self::from_inner)
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// Notes that the server could not be reached.
    pub(crate) fn note_lost(&self, error: &str) {
        if self.link().lost(self.now()) {
            self.tell(&Event::ServerLost {
                error: error.to_owned(),
            });
        }
    }

    /// Notes that it answered.
    pub(crate) fn note_reached(&self) {
        let back = self.link().reached(self.now());
        if let Some(after) = back {
            self.tell(&Event::ServerBack { after });
        }
    }

    fn link(&self) -> std::sync::MutexGuard<'_, Link> {
        self.inner
            .link
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("base_url", &self.inner.base_url)
            .finish_non_exhaustive()
    }
}
