//! A scripted double of the service: it plays the flow by itself and misbehaves where told to.
//!
//! Without a script it answers the start-up, creates what is asked for and finishes every future at
//! once. [`Mock::script`] queues other answers for a path, [`Mock::answer`] decides by request.

mod replies;
mod seen;
mod service;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use wiremock::matchers::any;
use wiremock::{MockServer, Request, ResponseTemplate};

pub use replies::{
    Reply, empty, failed, json, lost_connection, metadata_only, proto, refusal, try_again,
};
pub use seen::Seen;
pub use service::{forward_backward_output, sample_response};

type Answer = Box<dyn FnMut(&Seen) -> Option<Reply> + Send>;
type Dialect = Box<dyn FnMut(&Seen) -> Reply + Send>;

/// A running double.
pub struct Mock {
    server: MockServer,
    state: Arc<Mutex<State>>,
}

/// What the double will answer and what it was asked.
#[derive(Default)]
struct State {
    queues: HashMap<String, VecDeque<Reply>>,
    answers: Vec<(String, Answer)>,
    dialect: Option<Dialect>,
    seen: Vec<Seen>,
    service: service::Service,
}

impl Mock {
    /// Starts a double on a free port.
    pub async fn start() -> Self {
        Self::with_config(Value::Object(serde_json::Map::new())).await
    }

    /// Starts a double that hands these settings to clients.
    pub async fn with_config(client_config: Value) -> Self {
        let state = Arc::new(Mutex::new(State {
            service: service::Service::new(client_config),
            ..State::default()
        }));
        let server = MockServer::start().await;
        let breaks = Arc::clone(&state);
        wiremock::Mock::given(move |request: &Request| lock(&breaks).breaks(request))
            .respond_with_err(|_: &Request| {
                std::io::Error::from(std::io::ErrorKind::ConnectionReset)
            })
            .with_priority(1)
            .mount(&server)
            .await;
        let answers = Arc::clone(&state);
        wiremock::Mock::given(any())
            .respond_with(move |request: &Request| lock(&answers).answer(request))
            .mount(&server)
            .await;
        Self { server, state }
    }

    /// Where it listens, without a trailing slash.
    #[must_use]
    pub fn base_url(&self) -> String {
        self.server.uri()
    }

    /// Queues answers for a path, given once each before the double plays its own part again.
    pub fn script(&self, path: &str, replies: impl IntoIterator<Item = Reply>) {
        let mut state = lock(&self.state);
        state
            .queues
            .entry(path.to_owned())
            .or_default()
            .extend(replies);
    }

    /// Decides answers for a path by request; `None` leaves a request to the script and the double.
    pub fn answer(&self, path: &str, decide: impl FnMut(&Seen) -> Option<Reply> + Send + 'static) {
        lock(&self.state)
            .answers
            .push((path.to_owned(), Box::new(decide)));
    }

    /// Answers what no script claims in place of the double's own part.
    pub(crate) fn speak(&self, dialect: impl FnMut(&Seen) -> Reply + Send + 'static) {
        lock(&self.state).dialect = Some(Box::new(dialect));
    }

    /// Everything asked so far, in order of arrival.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.state).seen.clone()
    }

    /// What was asked of one path, in order of arrival.
    #[must_use]
    pub fn seen_at(&self, path: &str) -> Vec<Seen> {
        let mut seen = self.seen();
        seen.retain(|seen| seen.path == path);
        seen
    }

    /// Forgets what was asked so far, so that a test sees its own requests only.
    pub fn forget(&self) {
        lock(&self.state).seen.clear();
    }
}

impl State {
    /// Whether the connection of this request is to break; takes that answer off the script.
    fn breaks(&mut self, request: &Request) -> bool {
        let Some(queue) = self.queues.get_mut(request.url.path()) else {
            return false;
        };
        let is_break = matches!(queue.front(), Some(Reply::LostConnection));
        if is_break {
            queue.pop_front();
            self.seen.push(Seen::new(request));
        }
        is_break
    }

    fn answer(&mut self, request: &Request) -> ResponseTemplate {
        let seen = Seen::new(request);
        self.seen.push(seen.clone());
        let answers = self
            .answers
            .iter_mut()
            .filter(|(path, _)| *path == seen.path);
        let decided = answers.filter_map(|(_, decide)| decide(&seen)).next();
        let scripted = || {
            self.queues
                .get_mut(&seen.path)
                .and_then(VecDeque::pop_front)
        };
        let answer = decided.or_else(scripted);
        let own = || self.dialect.as_mut().map(|dialect| dialect(&seen));
        match answer.or_else(own) {
            Some(Reply::Template(template)) => *template,
            Some(Reply::LostConnection) | None => self.service.answer(&seen),
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Mock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mock({})", self.base_url())
    }
}
