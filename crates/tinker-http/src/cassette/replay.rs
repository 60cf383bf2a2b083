//! A server that says what a cassette says, to clients on this machine.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, ORIGIN};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use super::body::Body;
use super::matching::{Found, Matcher, difference};
use super::recorder::plain;
use super::redact::Secrets;
use super::tape::{Cassette, Exchange, Outcome};
use crate::base_url::BaseUrl;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};

/// Largest request that is read.
const MAX_REQUEST_BYTES: usize = 1 << 30;

/// Where a replay has what was read at other addresses.
const ELSEWHERE: &str = "/elsewhere/";

/// How fast a cassette is played.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pace {
    /// Every answer comes at once.
    #[default]
    Instant,
    /// Every answer takes as long as it took.
    Recorded,
}

/// A server on a loopback port that answers from a [`Cassette`]. It ends when dropped.
///
/// A request gets the outcome of the recorded request with the same method, path and body (JSON in
/// any spelling), each in its order; the last lasting answer is repeated, as the service repeats
/// it. A recorded failure closes the connection; a request that was given up is left unanswered. What was not recorded is refused with a 422 that
/// says how it differs; heartbeats and telemetry are taken in any case. Any key is accepted, web
/// pages are not.
#[derive(Debug)]
pub struct Replay {
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    base_url: BaseUrl,
    exchanges: Vec<Exchange>,
    pace: Pace,
    clock: Clock,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    matcher: Matcher,
    secrets: Secrets,
    report: ReplayReport,
}

/// How well a program kept to a cassette.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplayReport {
    /// Requests that got an outcome of their own.
    pub n_replayed: u64,
    /// Requests that got an outcome once more.
    pub n_repeated: u64,
    /// Requests that the cassette does not hold.
    pub unmatched: Vec<Unmatched>,
    /// Numbers of the exchanges that were not asked for.
    pub unused: Vec<u64>,
}

/// A request that a cassette does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmatched {
    /// Its method.
    pub method: String,
    /// Its path and query.
    pub path: String,
    /// Why no recorded request is the same.
    pub reason: String,
}

impl Replay {
    /// Plays a cassette on a free port of 127.0.0.1. Needs a tokio runtime.
    ///
    /// # Errors
    /// If no port can be had.
    pub async fn start(cassette: Cassette, pace: Pace) -> Result<Self> {
        let fault = |error: std::io::Error| {
            Error::new(ErrorKind::Connect, "no port can be had for the replay").with_source(error)
        };
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener = TcpListener::bind(address).await.map_err(fault)?;
        let base_url = format!("http://{}", listener.local_addr().map_err(fault)?).parse()?;
        let exchanges = cassette.exchanges().to_vec();
        let state = State {
            matcher: Matcher::new(&exchanges),
            secrets: Secrets::default(),
            report: ReplayReport::default(),
        };
        let shared = Arc::new(Shared {
            base_url,
            exchanges,
            pace,
            clock: Clock::start(),
            state: Mutex::new(state),
        });
        Ok(Self {
            accepting: tokio::spawn(accept(listener, Arc::clone(&shared))),
            shared,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn base_url(&self) -> &BaseUrl {
        &self.shared.base_url
    }

    /// What has been asked so far, and what has not.
    #[must_use]
    pub fn report(&self) -> ReplayReport {
        let state = self.shared.state();
        let unused = state.matcher.unused().into_iter();
        let number = |n: usize| Some(self.shared.exchanges.get(n)?.number);
        ReplayReport {
            unused: unused.filter_map(number).collect(),
            ..state.report.clone()
        }
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Takes connections until it is aborted; they end with it.
async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                connections.spawn(serve(stream, Arc::clone(&shared)));
            }
            // Out of descriptors: some are given back as clients leave.
            Err(_) => shared.clock.sleep(Duration::from_millis(10)).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(move |request| {
        let shared = Arc::clone(&shared);
        async move { shared.answer(request).await }
    });
    let connection = hyper::server::conn::http1::Builder::new();
    // Recorded failures end connections, too: nothing to report.
    let _ = connection
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// Ends a connection without an answer.
#[derive(Debug, thiserror::Error)]
#[error("no answer was recorded")]
struct Hangup;

type Reply = Response<Full<Bytes>>;

/// How a request is met.
enum Reaction<'a> {
    Give(&'a Exchange),
    /// Any answer will do.
    Accept,
    /// Until the client leaves.
    Wait,
}

impl<'a> From<Option<&'a Exchange>> for Reaction<'a> {
    /// The matcher knows all exchanges.
    fn from(exchange: Option<&'a Exchange>) -> Self {
        exchange.map_or(Self::Accept, Self::Give)
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Reply, Hangup> {
        let (head, body) = request.into_parts();
        if head.headers.contains_key(ORIGIN) {
            return Ok(say(
                StatusCode::FORBIDDEN,
                "web pages may not read a cassette",
            ));
        }
        let Ok(body) = Limited::new(body, MAX_REQUEST_BYTES).collect().await else {
            return Err(Hangup);
        };
        let body = read_body(&head.headers, body.to_bytes());
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        let path = path.strip_prefix(ELSEWHERE).unwrap_or(path);
        let key = head
            .headers
            .get("x-api-key")
            .and_then(|key| key.to_str().ok());
        let found = self.find(head.method.as_str(), path, key, body);
        match found {
            Ok(Reaction::Give(exchange)) => self.give(exchange).await,
            Ok(Reaction::Accept) => Ok(say(StatusCode::OK, "")),
            Ok(Reaction::Wait) => std::future::pending().await,
            Err(reason) => Ok(say(StatusCode::UNPROCESSABLE_ENTITY, &reason)),
        }
    }

    /// What to do, or why the request cannot be answered.
    fn find(
        &self,
        method: &str,
        path: &str,
        key: Option<&str>,
        body: Option<Body>,
    ) -> Result<Reaction<'_>, String> {
        let mut state = self.state();
        if let Some(key) = key {
            state.secrets.learn(key);
        }
        // What was cleaned for the recording must be cleaned to be found.
        let body = body.map(|body| state.secrets.body(body));
        let found = state
            .matcher
            .take(&self.exchanges, method, path, body.as_ref());
        let reason = match found {
            Found::Next(n) => {
                state.report.n_replayed += 1;
                return Ok(self.exchanges.get(n).into());
            }
            Found::Again(n) => {
                state.report.n_repeated += 1;
                return Ok(self.exchanges.get(n).into());
            }
            Found::Housekeeping => return Ok(Reaction::Accept),
            Found::Silence => return Ok(Reaction::Wait),
            Found::UsedUp => "the cassette ends before this repetition of the request".to_owned(),
            Found::Unknown => "the cassette holds no such request".to_owned(),
            Found::OtherBody(n) => {
                let recorded = self.exchanges.get(n).and_then(|e| e.body.as_ref());
                let difference = difference(recorded, body.as_ref());
                format!("the cassette holds this request with another body: {difference}")
            }
        };
        state.report.unmatched.push(Unmatched {
            method: method.to_owned(),
            path: path.to_owned(),
            reason: reason.clone(),
        });
        Err(reason)
    }

    async fn give(&self, exchange: &Exchange) -> Result<Reply, Hangup> {
        if self.pace == Pace::Recorded {
            self.clock
                .sleep(Duration::from_millis(exchange.took_ms))
                .await;
        }
        let (status, headers, body) = match &exchange.outcome {
            Outcome::Answer {
                status,
                headers,
                body,
            } => (status, headers, body),
            Outcome::Failure { .. } => return Err(Hangup),
            // The client left; so will this one.
            Outcome::Abandoned => return std::future::pending().await,
        };
        let mut response = Response::builder().status(*status);
        if !body.content_type.is_empty() {
            response = response.header(CONTENT_TYPE, &body.content_type);
        }
        for (name, value) in headers {
            response = match name.as_str() {
                // What was read elsewhere is on the cassette, too.
                "location" => response.header(name, format!("{}{ELSEWHERE}{value}", self.base_url)),
                _ => response.header(name, value),
            };
        }
        // A cassette that was edited into what HTTP cannot say.
        response
            .body(Full::new(body.bytes.clone()))
            .map_err(|_| Hangup)
    }
}

fn read_body(headers: &HeaderMap, bytes: Bytes) -> Option<Body> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let content_type = text(CONTENT_TYPE);
    // Clients send a body with every POST, if an empty one.
    if bytes.is_empty() && content_type.is_none() {
        return None;
    }
    Some(Body {
        content_type: content_type.unwrap_or_default().to_owned(),
        bytes: plain(text(CONTENT_ENCODING) == Some("zstd"), &bytes),
    })
}

/// An answer of the replay itself: nothing for `""`, else an error with this text.
fn say(status: StatusCode, detail: &str) -> Reply {
    let json = match detail {
        "" => serde_json::json!({}),
        detail => serde_json::json!({ "detail": detail }),
    };
    let mut response = Response::new(Full::new(json.to_string().into()));
    *response.status_mut() = status;
    let json = hyper::header::HeaderValue::from_static(crate::call::JSON);
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}
