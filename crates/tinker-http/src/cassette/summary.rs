//! A cassette at a glance.

use std::collections::BTreeMap;
use std::fmt;

use super::tape::{Exchange, Outcome};

/// What a cassette holds, route by route.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// By method and path; ids in paths are replaced by `{id}`.
    pub routes: BTreeMap<String, RouteSummary>,
    /// Milliseconds from the first request to the last outcome.
    pub took_ms: u64,
}

/// What was said on one route.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteSummary {
    /// Requests, repetitions included.
    pub n_requests: u64,
    /// Those of them that repeat an earlier one.
    pub n_retries: u64,
    /// Those without an answer.
    pub n_failures: u64,
    /// How often each status was answered.
    pub statuses: BTreeMap<u16, u64>,
    /// Bytes of bodies sent, before compression.
    pub sent_bytes: u64,
    /// Bytes of bodies received, after decompression.
    pub received_bytes: u64,
    /// The longest time to an outcome, in milliseconds.
    pub slowest_ms: u64,
}

impl Summary {
    pub(super) fn of(exchanges: &[Exchange]) -> Self {
        let mut summary = Self::default();
        for exchange in exchanges {
            let name = format!("{} {}", exchange.method, route(&exchange.path));
            summary.routes.entry(name).or_default().add(exchange);
            let end = exchange.at_ms.saturating_add(exchange.took_ms);
            summary.took_ms = summary.took_ms.max(end);
        }
        summary
    }
}

impl RouteSummary {
    fn add(&mut self, exchange: &Exchange) {
        self.n_requests += 1;
        self.n_retries += u64::from(exchange.retry_count > 0);
        self.sent_bytes += exchange.body.as_ref().map_or(0, |b| b.bytes.len() as u64);
        self.slowest_ms = self.slowest_ms.max(exchange.took_ms);
        match &exchange.outcome {
            Outcome::Answer { status, body, .. } => {
                *self.statuses.entry(*status).or_default() += 1;
                self.received_bytes += body.bytes.len() as u64;
            }
            Outcome::Failure { .. } | Outcome::Abandoned => self.n_failures += 1,
        }
    }
}

/// A path with what differs between objects taken out.
fn route(path: &str) -> String {
    let path = path.split('?').next().unwrap_or_default();
    let mut parts: Vec<&str> = path.split('/').collect();
    // Below /api/v1/NOUN stands an id, and below an id of a run the name of a checkpoint.
    let is_nested = matches!(
        parts.get(3),
        Some(&("training_runs" | "sessions" | "samplers"))
    );
    if is_nested {
        for at in [4, 7] {
            if let Some(part) = parts.get_mut(at)
                && *part != "search"
            {
                *part = "{id}";
            }
        }
    }
    parts.join("/")
}

impl fmt::Display for Summary {
    /// One line a route.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, route) in &self.routes {
            let statuses: Vec<_> = route
                .statuses
                .iter()
                .map(|(status, n)| format!("{status} x{n}"))
                .collect();
            write!(
                f,
                "{name}: {} requests, {} retries, {} unanswered [{}], {} bytes out, {} bytes in, ",
                route.n_requests,
                route.n_retries,
                route.n_failures,
                statuses.join(", "),
                route.sent_bytes,
                route.received_bytes,
            )?;
            writeln!(f, "at most {} ms", route.slowest_ms)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cassette::Body;

    #[test]
    fn ids_in_paths_do_not_make_routes() {
        for (path, expected) in [
            ("/api/v1/asample", "/api/v1/asample"),
            ("/api/v1/sessions?limit=1", "/api/v1/sessions"),
            ("/api/v1/sessions/search", "/api/v1/sessions/search"),
            (
                "/api/v1/training_runs/a:train:0/checkpoints/weights/0001",
                "/api/v1/training_runs/{id}/checkpoints/weights/{id}",
            ),
        ] {
            assert_eq!(route(path), expected);
        }
    }

    #[test]
    fn counts_what_was_sent_repeated_and_lost() {
        let exchange = |retry_count, outcome| Exchange {
            number: 0,
            at_ms: 10,
            took_ms: 5,
            retry_count,
            method: "POST".into(),
            path: "/api/v1/optim_step".into(),
            headers: BTreeMap::new(),
            body: Some(Body {
                content_type: String::new(),
                bytes: "1234".into(),
            }),
            outcome,
        };
        let failure = Outcome::Failure {
            reason: "reset".into(),
        };
        let answer = Outcome::Answer {
            status: 200,
            headers: BTreeMap::new(),
            body: Body {
                content_type: String::new(),
                bytes: "12".into(),
            },
        };

        let summary = Summary::of(&[exchange(0, failure), exchange(1, answer)]);

        assert_eq!(summary.took_ms, 15);
        assert_eq!(
            summary.to_string(),
            "POST /api/v1/optim_step: 2 requests, 1 retries, 1 unanswered [200 x1], \
             8 bytes out, 2 bytes in, at most 5 ms\n"
        );
    }
}
