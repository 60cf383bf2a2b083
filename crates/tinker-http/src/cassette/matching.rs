//! Which recorded answer a request gets. Pure: no connection, no clock.

use std::collections::HashMap;

use serde_json::Value;
use tinker_types::{DYNAMIC_CONFIG, RETRIEVE_FUTURES, SESSION_HEARTBEAT, SESSIONS, TELEMETRY};

use super::body::Body;
use super::tape::{Exchange, Outcome};

/// Requests whose bodies hold times, random ids or what else a second run says otherwise: they are
/// answered in the order of the recording.
const BY_ROUTE: [&str; 2] = [SESSION_HEARTBEAT, TELEMETRY];

/// What is asked for, in a form that does not depend on spelling.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    method: String,
    path: String,
    body: Vec<u8>,
}

/// The recorded exchanges that answer one key, and how many of them are used up.
#[derive(Debug, Default)]
struct Queue {
    exchanges: Vec<usize>,
    n_used: usize,
}

/// What to do with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Give the outcome of this exchange, which has not been given before.
    Next(usize),
    /// Give it once more: the request repeats one whose answer does not change.
    Again(usize),
    /// Say nothing: a poll of a sampler whose news have all been told.
    Silence,
    /// The recording holds the request, and ends before this one.
    UsedUp,
    /// The recording holds requests like this one with other bodies, such as this exchange's.
    OtherBody(usize),
    /// It need not have been recorded: heartbeats come with time, not with the program.
    Housekeeping,
    /// The recording holds nothing like it.
    Unknown,
}

/// Hands the exchanges of a cassette out.
#[derive(Debug)]
pub(super) struct Matcher {
    queues: HashMap<Key, Queue>,
    /// By method and path, an exchange to compare with.
    routes: HashMap<(String, String), usize>,
}

impl Matcher {
    pub(super) fn new(exchanges: &[Exchange]) -> Self {
        let mut queues = HashMap::<Key, Queue>::new();
        let mut routes = HashMap::new();
        for (n, exchange) in exchanges.iter().enumerate() {
            let key = key(&exchange.method, &exchange.path, exchange.body.as_ref());
            queues.entry(key).or_default().exchanges.push(n);
            let route = (exchange.method.clone(), exchange.path.clone());
            routes.entry(route).or_insert(n);
        }
        Self { queues, routes }
    }

    /// Takes the next outcome of a request.
    pub(super) fn take(
        &mut self,
        exchanges: &[Exchange],
        method: &str,
        path: &str,
        body: Option<&Body>,
    ) -> Found {
        let Some(queue) = self.queues.get_mut(&key(method, path, body)) else {
            return self.miss(method, path);
        };
        if let Some(&next) = queue.exchanges.get(queue.n_used) {
            queue.n_used += 1;
            return Found::Next(next);
        }
        if path == RETRIEVE_FUTURES {
            return Found::Silence;
        }
        let last = queue.exchanges.last().copied();
        match last.filter(|&n| exchanges.get(n).is_some_and(is_final)) {
            Some(last) => Found::Again(last),
            None if is_housekeeping(path) => Found::Housekeeping,
            None => Found::UsedUp,
        }
    }

    fn miss(&self, method: &str, path: &str) -> Found {
        if is_housekeeping(path) {
            return Found::Housekeeping;
        }
        let route = (method.to_owned(), path.to_owned());
        self.routes
            .get(&route)
            .map_or(Found::Unknown, |&n| Found::OtherBody(n))
    }

    /// The exchanges that nobody has asked for.
    pub(super) fn unused(&self) -> Vec<usize> {
        let mut unused: Vec<usize> = self
            .queues
            .values()
            .flat_map(|queue| queue.exchanges.iter().skip(queue.n_used))
            .copied()
            .collect();
        unused.sort_unstable();
        unused
    }
}

/// Whether a program can do without the answer.
pub(super) fn is_housekeeping(path: &str) -> bool {
    [SESSION_HEARTBEAT, TELEMETRY, DYNAMIC_CONFIG].contains(&path)
        || (path.starts_with(SESSIONS) && path.ends_with("/finish"))
        || path.starts_with("/api/v1/cancel_future")
}

/// Whether the same request would be answered the same for ever: a result, or a lasting refusal.
fn is_final(exchange: &Exchange) -> bool {
    match &exchange.outcome {
        Outcome::Answer { status, body, .. } => match status {
            200..=299 => {
                !matches!(body.json(), Some(Value::Object(fields)) if says_try_again(&fields))
            }
            408 | 409 | 429 => false,
            _ => (400..500).contains(status),
        },
        Outcome::Failure { .. } | Outcome::Abandoned => false,
    }
}

fn says_try_again(fields: &serde_json::Map<String, Value>) -> bool {
    fields.get("type").and_then(Value::as_str) == Some("try_again")
}

fn key(method: &str, path: &str, body: Option<&Body>) -> Key {
    let body = match body {
        Some(_) if BY_ROUTE.contains(&path) => Vec::new(),
        // What a poll says it knows depends on time; whose poll it is does not.
        Some(body) if path == RETRIEVE_FUTURES => target(body),
        Some(body) => canonical(body),
        None => Vec::new(),
    };
    Key {
        method: method.to_owned(),
        path: path.to_owned(),
        body,
    }
}

fn target(body: &Body) -> Vec<u8> {
    let target = body.json().and_then(|body| body.get("target").cloned());
    let mut target = target.unwrap_or_default();
    target.sort_all_objects();
    target.to_string().into_bytes()
}

/// JSON without its spelling; other bytes as they are.
fn canonical(body: &Body) -> Vec<u8> {
    match body.json() {
        Some(mut value) => {
            value.sort_all_objects();
            value.to_string().into_bytes()
        }
        None => body.bytes.to_vec(),
    }
}

/// Where two bodies differ first, for people.
pub(super) fn difference(recorded: Option<&Body>, asked: Option<&Body>) -> String {
    let json = |body: Option<&Body>| body.and_then(Body::json);
    match (json(recorded), json(asked)) {
        (Some(recorded), Some(asked)) => first_difference(&recorded, &asked, "")
            .unwrap_or_else(|| "the bodies differ in spelling".to_owned()),
        _ => {
            let n_bytes = |body: Option<&Body>| body.map_or(0, |body| body.bytes.len());
            format!(
                "{} bytes were recorded and {} are asked with",
                n_bytes(recorded),
                n_bytes(asked)
            )
        }
    }
}

fn first_difference(recorded: &Value, asked: &Value, at: &str) -> Option<String> {
    match (recorded, asked) {
        (Value::Object(a), Value::Object(b)) => {
            let names = a
                .keys()
                .chain(b.keys().filter(|name| !a.contains_key(*name)));
            names.into_iter().find_map(|name| {
                let (a, b) = (a.get(name), b.get(name));
                let (a, b) = (a.unwrap_or(&Value::Null), b.unwrap_or(&Value::Null));
                first_difference(a, b, &format!("{at}.{name}"))
            })
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => a
            .iter()
            .zip(b)
            .enumerate()
            .find_map(|(n, (a, b))| first_difference(a, b, &format!("{at}[{n}]"))),
        _ if recorded == asked => None,
        _ => {
            let (a, b) = (short(recorded), short(asked));
            Some(format!("{at} was {a} and is {b}"))
        }
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 {
        return text;
    }
    let start: String = text.chars().take(57).collect();
    format!("{start}...")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn body(text: &str) -> Body {
        Body {
            content_type: "application/json".into(),
            bytes: text.to_owned().into(),
        }
    }

    fn exchange(path: &str, sent: &str, status: u16, received: &str) -> Exchange {
        Exchange {
            number: 0,
            at_ms: 0,
            took_ms: 0,
            retry_count: 0,
            method: "POST".into(),
            path: path.into(),
            headers: BTreeMap::new(),
            body: Some(body(sent)),
            outcome: Outcome::Answer {
                status,
                headers: BTreeMap::new(),
                body: body(received),
            },
        }
    }

    fn check(exchanges: &[Exchange], asked: &[(&str, &str, Found)]) -> Matcher {
        let mut matcher = Matcher::new(exchanges);
        for (path, sent, expected) in asked {
            let found = matcher.take(exchanges, "POST", path, Some(&body(sent)));
            assert_eq!(found, *expected, "{path} {sent}");
        }
        matcher
    }

    #[test]
    fn equal_requests_get_their_answers_in_order_and_the_last_for_ever() {
        let tape = [
            exchange(
                "/poll",
                r#"{"id":1,"more":true}"#,
                200,
                r#"{"type":"try_again"}"#,
            ),
            exchange("/poll", r#"{"id":2}"#, 200, "{}"),
            exchange("/poll", r#"{"more":true,"id":1}"#, 200, r#"{"n":1}"#),
        ];

        let matcher = check(
            &tape,
            &[
                ("/poll", r#"{ "more": true, "id": 1 }"#, Found::Next(0)),
                ("/poll", r#"{"id":1,"more":true}"#, Found::Next(2)),
                ("/poll", r#"{"id":1,"more":true}"#, Found::Again(2)),
            ],
        );
        assert_eq!(matcher.unused(), [1]);
    }

    #[test]
    fn a_recording_that_ends_in_waiting_is_used_up() {
        for (status, answer) in [
            (200, r#"{"type":"try_again"}"#),
            (408, ""),
            (503, ""),
            (429, ""),
        ] {
            let tape = [exchange("/poll", "{}", status, answer)];

            check(
                &tape,
                &[
                    ("/poll", "{}", Found::Next(0)),
                    ("/poll", "{}", Found::UsedUp),
                ],
            );
        }
    }

    #[test]
    fn what_comes_with_time_is_answered_whatever_it_says() {
        let tape = [exchange(TELEMETRY, r#"{"id":1}"#, 200, "{}")];

        check(
            &tape,
            &[
                (TELEMETRY, r#"{"id":2}"#, Found::Next(0)),
                (TELEMETRY, r#"{"id":3}"#, Found::Again(0)),
                (SESSION_HEARTBEAT, r#"{"id":3}"#, Found::Housekeeping),
                ("/other", "{}", Found::Unknown),
            ],
        );
    }

    #[test]
    fn polls_of_a_sampler_are_told_its_news_and_then_nothing() {
        let poll = |sampler: &str, cursor| {
            format!(r#"{{"target":{{"sampling_session_id":"{sampler}"}},"prev_cursor":{cursor}}}"#)
        };
        let tape = [
            exchange(RETRIEVE_FUTURES, &poll("a", 0), 200, "{}"),
            exchange(RETRIEVE_FUTURES, &poll("b", 0), 200, "{}"),
            exchange(RETRIEVE_FUTURES, &poll("a", 3), 200, "{}"),
        ];

        check(
            &tape,
            &[
                (RETRIEVE_FUTURES, &poll("a", 0), Found::Next(0)),
                (RETRIEVE_FUTURES, &poll("a", 1), Found::Next(2)),
                (RETRIEVE_FUTURES, &poll("b", 9), Found::Next(1)),
                (RETRIEVE_FUTURES, &poll("a", 3), Found::Silence),
            ],
        );
    }

    #[test]
    fn other_bodies_are_told_apart() {
        let tape = [exchange(
            "/step",
            r#"{"a":{"lr":[0.1,0.2]},"b":1}"#,
            200,
            "{}",
        )];
        let asked = r#"{"a":{"lr":[0.1,0.3]},"b":1}"#;

        check(&tape, &[("/step", asked, Found::OtherBody(0))]);

        let told = difference(tape[0].body.as_ref(), Some(&body(asked)));
        assert_eq!(told, ".a.lr[1] was 0.2 and is 0.3");
        let told = difference(Some(&body("\u{1}")), None);
        assert_eq!(told, "1 bytes were recorded and 0 are asked with");
    }
}
