//! What the server counts about itself, as Prometheus reads it (text exposition format 0.0.4) and as
//! people do.
//!
//! Labels come from closed sets (kinds of operations, routes, status codes), never from requests: their
//! number is bounded, and no id or key is among them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tinker_types::{ErrorCategory, FailedFuture};

use crate::core::lock;
use crate::operation::Outcome;
use crate::pending::Count;
use crate::process;

/// Upper bounds of the buckets of latencies, seconds: from a one-token sample to a long pass.
const BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0,
];

/// How often something took how long.
#[derive(Debug, Clone, Default)]
struct Histogram {
    /// One per bucket, not cumulative.
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum_seconds: f64,
}

impl Histogram {
    fn observe(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        if let Some(i) = BUCKETS.iter().position(|bound| seconds <= *bound) {
            self.buckets[i] += 1;
        }
        self.count += 1;
        self.sum_seconds += seconds;
    }
}

/// How an operation ended.
fn outcome_name(outcome: &Outcome) -> &'static str {
    if !outcome.is_failure() {
        return "ok";
    }
    let failure = serde_json::from_slice::<FailedFuture>(&outcome.body);
    match failure.map(|failure| failure.category) {
        Ok(ErrorCategory::User) => "user_error",
        _ => "server_error",
    }
}

/// What the engine holds in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Loaded {
    pub(crate) n_models: usize,
    /// Training runs.
    pub(crate) n_training: usize,
    /// Weights of samplers.
    pub(crate) n_sampling: usize,
}

/// What there is at a moment that is counted elsewhere.
#[derive(Debug)]
pub(crate) struct Present<'a> {
    /// The operations without a result, by kind.
    pub(crate) queue: &'a BTreeMap<&'static str, Count>,
    /// All that can be asked for.
    pub(crate) n_futures: usize,
    /// Bytes that work was promised, taken or not.
    pub(crate) promised: u64,
    /// Connections, and the most that there may be.
    pub(crate) connections: (usize, Option<usize>),
}

/// The counters. All of them start at 0 with the server.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    n_models: AtomicUsize,
    n_training: AtomicUsize,
    n_sampling: AtomicUsize,
    tokens_trained: AtomicU64,
    tokens_read: AtomicU64,
    tokens_sampled: AtomicU64,
    operations: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    latencies: Mutex<BTreeMap<&'static str, Histogram>>,
    requests: Mutex<BTreeMap<(String, u16), u64>>,
    request_latencies: Mutex<BTreeMap<String, Histogram>>,
}

impl Metrics {
    /// Notes what the engine holds.
    pub(crate) fn set_loaded(&self, loaded: Loaded) {
        self.n_models.store(loaded.n_models, Ordering::Relaxed);
        self.n_training.store(loaded.n_training, Ordering::Relaxed);
        self.n_sampling.store(loaded.n_sampling, Ordering::Relaxed);
    }

    /// What the engine held when it said so last.
    pub(crate) fn loaded(&self) -> Loaded {
        Loaded {
            n_models: self.n_models.load(Ordering::Relaxed),
            n_training: self.n_training.load(Ordering::Relaxed),
            n_sampling: self.n_sampling.load(Ordering::Relaxed),
        }
    }

    /// Counts tokens of data that went forward and backward, or forward alone.
    pub(crate) fn add_trained(&self, n: usize) {
        self.tokens_trained.fetch_add(n as u64, Ordering::Relaxed);
    }

    /// Counts the tokens of a sample.
    pub(crate) fn add_sampled(&self, n_prompt: usize, n_drawn: usize) {
        self.tokens_read
            .fetch_add(n_prompt as u64, Ordering::Relaxed);
        self.tokens_sampled
            .fetch_add(n_drawn as u64, Ordering::Relaxed);
    }

    /// Tokens trained on and tokens sampled, since the start.
    pub(crate) fn tokens(&self) -> (u64, u64) {
        let (trained, sampled) = (&self.tokens_trained, &self.tokens_sampled);
        (
            trained.load(Ordering::Relaxed),
            sampled.load(Ordering::Relaxed),
        )
    }

    /// Counts an operation that ended `took` after it was accepted.
    pub(crate) fn end_operation(&self, kind: &'static str, outcome: &Outcome, took: Duration) {
        let key = (kind, outcome_name(outcome));
        *lock(&self.operations).entry(key).or_default() += 1;
        lock(&self.latencies).entry(kind).or_default().observe(took);
    }

    /// Counts an answered request. `route` is the pattern of its path.
    pub(crate) fn end_request(&self, route: &str, status: u16, took: Duration) {
        let key = (route.to_owned(), status);
        *lock(&self.requests).entry(key).or_default() += 1;
        let mut latencies = lock(&self.request_latencies);
        latencies.entry(route.to_owned()).or_default().observe(took);
    }

    /// All counters as text.
    pub(crate) fn render(&self, version: &str, present: &Present<'_>) -> String {
        let mut page = Page::default();
        page.family("tinker_build_info", "gauge", "Version of the server.");
        page.value("tinker_build_info", &[("version", version)], 1.0);
        self.render_loaded(&mut page);
        render_queue(&mut page, present.queue);
        let name = "tinker_futures";
        page.family(name, "gauge", "Futures, finished or not, that are known.");
        page.value(name, &[], present.n_futures as f64);
        let name = "tinker_promised_memory_bytes";
        let help = "Memory that work was promised, taken or not.";
        page.family(name, "gauge", help);
        page.value(name, &[], present.promised as f64);
        render_connections(&mut page, present.connections);
        self.render_tokens(&mut page);
        self.render_operations(&mut page);
        self.render_requests(&mut page);
        render_process(&mut page);
        page.text
    }

    fn render_loaded(&self, page: &mut Page) {
        let loaded = self.loaded();
        let name = "tinker_base_models";
        page.family(name, "gauge", "Base models in memory.");
        page.value(name, &[], loaded.n_models as f64);
        let name = "tinker_adapters";
        page.family(name, "gauge", "Adapters in memory, by what they are for.");
        page.value(name, &[("use", "training")], loaded.n_training as f64);
        page.value(name, &[("use", "sampling")], loaded.n_sampling as f64);
    }

    fn render_tokens(&self, page: &mut Page) {
        let name = "tinker_tokens_total";
        page.family(
            name,
            "counter",
            "Tokens trained on, read as prompts and sampled.",
        );
        let kinds = [
            ("trained", &self.tokens_trained),
            ("prompt", &self.tokens_read),
            ("sampled", &self.tokens_sampled),
        ];
        for (kind, n) in kinds {
            page.value(name, &[("kind", kind)], n.load(Ordering::Relaxed) as f64);
        }
    }

    fn render_operations(&self, page: &mut Page) {
        let name = "tinker_operations_total";
        page.family(name, "counter", "Operations that ended, by outcome.");
        for ((kind, outcome), n) in lock(&self.operations).iter() {
            page.value(name, &[("type", kind), ("outcome", outcome)], *n as f64);
        }
        let name = "tinker_operation_seconds";
        page.family(
            name,
            "histogram",
            "Time from the acceptance of an operation to its result.",
        );
        for (kind, histogram) in lock(&self.latencies).iter() {
            page.histogram(name, ("type", kind), histogram);
        }
    }

    fn render_requests(&self, page: &mut Page) {
        let name = "tinker_http_requests_total";
        page.family(name, "counter", "Answered requests, by route and status.");
        for ((route, status), n) in lock(&self.requests).iter() {
            let labels = [("route", route.as_str()), ("status", &status.to_string())];
            page.value(name, &labels, *n as f64);
        }
        let name = "tinker_http_request_seconds";
        page.family(
            name,
            "histogram",
            "Time to the beginning of an answer; polls for results are held on purpose.",
        );
        for (route, histogram) in lock(&self.request_latencies).iter() {
            page.histogram(name, ("route", route), histogram);
        }
    }
}

fn render_queue(page: &mut Page, queue: &BTreeMap<&'static str, Count>) {
    let name = "tinker_queue_length";
    page.family(
        name,
        "gauge",
        "Accepted operations without a result, waiting or under way.",
    );
    for (kind, count) in queue {
        let states = [("waiting", count.n_waiting), ("running", count.n_running)];
        for (state, n) in states {
            page.value(name, &[("type", kind), ("state", state)], n as f64);
        }
    }
}

fn render_connections(page: &mut Page, (n_open, most): (usize, Option<usize>)) {
    let name = "tinker_connections";
    page.family(name, "gauge", "Open connections of clients.");
    page.value(name, &[], n_open as f64);
    // Absent where there may be any number.
    if let Some(most) = most {
        let name = "tinker_max_connections";
        let help = "Most connections at a time; beyond it clients wait to be accepted.";
        page.family(name, "gauge", help);
        page.value(name, &[], most as f64);
    }
}

/// The names that Prometheus' own client libraries use.
fn render_process(page: &mut Page) {
    let gauges = [
        (
            "process_resident_memory_bytes",
            "Memory in use.",
            process::memory_bytes(),
        ),
        (
            "process_open_fds",
            "Open file descriptors.",
            process::open_files(),
        ),
        (
            "process_max_fds",
            "Most file descriptors that may be open.",
            process::max_open_files(),
        ),
    ];
    for (name, help, value) in gauges {
        // Absent where the operating system does not say.
        if let Some(value) = value {
            page.family(name, "gauge", help);
            page.value(name, &[], value as f64);
        }
    }
}

/// A page in the making.
#[derive(Debug, Default)]
struct Page {
    text: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail, here and below.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.text.push_str(name);
        if !labels.is_empty() {
            let pairs: Vec<String> = labels
                .iter()
                .map(|(key, value)| format!("{key}=\"{}\"", escaped(value)))
                .collect();
            let _ = write!(self.text, "{{{}}}", pairs.join(","));
        }
        let _ = writeln!(self.text, " {value}");
    }

    fn histogram(&mut self, name: &str, label: (&str, &str), histogram: &Histogram) {
        let (bucket, mut n) = (format!("{name}_bucket"), 0);
        for (bound, in_bucket) in BUCKETS.iter().zip(&histogram.buckets) {
            n += in_bucket;
            self.value(&bucket, &[label, ("le", &bound.to_string())], n as f64);
        }
        self.value(&bucket, &[label, ("le", "+Inf")], histogram.count as f64);
        self.value(&format!("{name}_sum"), &[label], histogram.sum_seconds);
        self.value(&format!("{name}_count"), &[label], histogram.count as f64);
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', r"\\")
        .replace('"', "\\\"")
        .replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(metrics: &Metrics) -> Vec<String> {
        let present = Present {
            queue: &BTreeMap::new(),
            n_futures: 0,
            promised: 5,
            connections: (3, Some(8)),
        };
        let text = metrics.render("1.2", &present);
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn outcomes_are_told_apart_by_whose_fault_they_are() {
        let metrics = Metrics::default();
        let ends = [
            Outcome::json(&1),
            Outcome::refused("no"),
            Outcome::failed(ErrorCategory::Server, "broken"),
        ];
        for outcome in &ends {
            metrics.end_operation("sample", outcome, Duration::ZERO);
        }

        let page = page(&metrics);

        for outcome in ["ok", "user_error", "server_error"] {
            let line =
                format!("tinker_operations_total{{type=\"sample\",outcome=\"{outcome}\"}} 1");
            assert!(page.contains(&line), "{line}");
        }
    }

    #[test]
    fn buckets_are_cumulative_and_end_with_everything() {
        let metrics = Metrics::default();
        for millis in [1, 30, 700_000] {
            metrics.end_operation("x", &Outcome::json(&1), Duration::from_millis(millis));
        }

        let page = page(&metrics);

        let has = |line: &str| assert!(page.iter().any(|l| l == line), "{line}: {page:#?}");
        has("tinker_operation_seconds_bucket{type=\"x\",le=\"0.001\"} 1");
        has("tinker_operation_seconds_bucket{type=\"x\",le=\"0.025\"} 1");
        has("tinker_operation_seconds_bucket{type=\"x\",le=\"0.05\"} 2");
        has("tinker_operation_seconds_bucket{type=\"x\",le=\"600\"} 2");
        has("tinker_operation_seconds_bucket{type=\"x\",le=\"+Inf\"} 3");
        has("tinker_operation_seconds_sum{type=\"x\"} 700.031");
        has("tinker_operation_seconds_count{type=\"x\"} 3");
    }

    #[test]
    fn labels_cannot_end_their_quotes() {
        assert_eq!(escaped("a\"b\\c\nd"), r#"a\"b\\c\nd"#);
    }

    #[test]
    fn every_family_is_described_before_its_values() {
        let metrics = Metrics::default();
        metrics.end_request("/a", 200, Duration::ZERO);

        let page = page(&metrics);

        let mut known = Vec::new();
        for line in &page {
            match line.strip_prefix("# TYPE ") {
                Some(rest) => known.push(rest.split(' ').next().unwrap().to_owned()),
                None if line.starts_with('#') => {}
                None => {
                    let name = line.split(['{', ' ']).next().unwrap();
                    let base = known.last().unwrap();
                    assert!(name.starts_with(base.as_str()), "{line} under {base}");
                }
            }
        }
        assert!(page.contains(&"tinker_build_info{version=\"1.2\"} 1".to_owned()));
    }
}
