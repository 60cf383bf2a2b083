//! A scripted server and a client that does not wait long.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tinker_http::machine::Backoff;
use tinker_http::{Client, ClientBuilder, Event, PollPolicy, RetryPolicy};
use wiremock::matchers::{method, path};
use wiremock::{Mock, MockServer, Request, Respond, ResponseTemplate};

/// Answers in order; the last one repeats.
pub(crate) struct Script(Mutex<VecDeque<ResponseTemplate>>);

impl Script {
    pub(crate) fn new(answers: impl IntoIterator<Item = ResponseTemplate>) -> Self {
        Self(Mutex::new(answers.into_iter().collect()))
    }
}

impl Respond for Script {
    fn respond(&self, _: &Request) -> ResponseTemplate {
        let mut answers = self.0.lock().unwrap();
        if answers.len() > 1 {
            answers.pop_front().unwrap()
        } else {
            answers.front().unwrap().clone()
        }
    }
}

pub(crate) fn status(code: u16) -> ResponseTemplate {
    ResponseTemplate::new(code)
}

pub(crate) fn answer(code: u16, body: Value) -> ResponseTemplate {
    ResponseTemplate::new(code).set_body_json(body)
}

pub(crate) fn ok(body: Value) -> ResponseTemplate {
    answer(200, body)
}

/// A server whose settings are the defaults.
pub(crate) async fn server() -> MockServer {
    server_with(json!({})).await
}

pub(crate) async fn server_with(config: Value) -> MockServer {
    let server = MockServer::start().await;
    script(&server, "POST", "/api/v1/client/config", [ok(config)]).await;
    server
}

pub(crate) async fn script(
    server: &MockServer,
    verb: &str,
    route: &str,
    answers: impl IntoIterator<Item = ResponseTemplate>,
) {
    Mock::given(method(verb))
        .and(path(route))
        .respond_with(Script::new(answers))
        .mount(server)
        .await;
}

/// The requests to a route, in order.
pub(crate) async fn requests(server: &MockServer, route: &str) -> Vec<Request> {
    let all = server.received_requests().await.unwrap();
    all.into_iter().filter(|r| r.url.path() == route).collect()
}

pub(crate) fn header<'a>(request: &'a Request, name: &str) -> Option<&'a str> {
    request.headers.get(name).map(|v| v.to_str().unwrap())
}

pub(crate) fn quick() -> Backoff {
    Backoff {
        base_delay: Duration::from_millis(1),
        max_delay: Duration::from_millis(4),
        jitter: 0.0,
    }
}

pub(crate) fn builder(base_url: &str) -> ClientBuilder {
    Client::builder(base_url)
        .api_key("tml-secret".parse().unwrap())
        .retry_policy(RetryPolicy {
            backoff: quick(),
            ..RetryPolicy::default()
        })
        .poll_policy(PollPolicy {
            backoff: quick(),
            min_interval: Duration::from_millis(1),
            ..PollPolicy::default()
        })
}

pub(crate) fn client(server: &MockServer) -> Client {
    builder(&server.uri()).build().unwrap()
}

/// What an observer was told.
#[derive(Clone, Default)]
pub(crate) struct Heard(Arc<Mutex<Vec<Event>>>);

impl Heard {
    pub(crate) fn attach(&self, builder: ClientBuilder) -> ClientBuilder {
        let events = Arc::clone(&self.0);
        builder.observer(move |event| events.lock().unwrap().push(event.clone()))
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().clone()
    }
}
