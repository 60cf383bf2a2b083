//! The line that says what a served machine is busy with, on a terminal and nowhere else.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use tinker_server::{Observer, Summary};

use crate::human::{count, counted, size};
use crate::ui::Ui;

/// How often the line changes: often enough to see work begin, seldom enough to read it.
const EVERY: Duration = Duration::from_secs(1);

/// Keeps the line up to date for as long as it is polled.
pub(super) async fn show(ui: &Ui, server: Observer) -> Infallible {
    let Some(status) = ui.status() else {
        return std::future::pending().await;
    };
    let mut last = (server.summary(), Instant::now());
    loop {
        tokio::time::sleep(EVERY).await;
        let now = (server.summary(), Instant::now());
        status.set(line(&last.0, &now.0, now.1 - last.1));
        last = now;
    }
}

/// What changed over `elapsed`, and how it is now.
fn line(before: &Summary, now: &Summary, elapsed: Duration) -> String {
    let rate = |before: u64, now: u64| {
        let seconds = elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        (now.saturating_sub(before) as f64 / seconds).round() as u64
    };
    let mut parts = vec![
        counted(now.n_models as u64, "model"),
        counted(now.n_adapters as u64, "adapter"),
    ];
    match (now.n_running, now.n_waiting) {
        (0, 0) => parts.push("idle".to_owned()),
        (running, waiting) => parts.push(format!("{running} running, {waiting} waiting")),
    }
    for (verb, n) in [
        ("trained", rate(before.tokens_trained, now.tokens_trained)),
        ("sampled", rate(before.tokens_sampled, now.tokens_sampled)),
    ] {
        if n > 0 {
            parts.push(format!("{} tokens/s {verb}", count(n)));
        }
    }
    parts.extend(now.memory_bytes.map(size));
    parts.join(" · ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_server_says_little() {
        let now = Summary {
            n_models: 1,
            memory_bytes: Some(3 << 20),
            ..Summary::default()
        };

        let text = line(&now, &now, Duration::from_secs(1));

        assert_eq!(text, "1 model · 0 adapters · idle · 3.0 MB");
    }

    #[test]
    fn rates_are_what_was_added_by_the_time_it_took() {
        let before = Summary {
            tokens_trained: 1_000,
            ..Summary::default()
        };
        let now = Summary {
            n_models: 2,
            n_adapters: 1,
            n_running: 3,
            n_waiting: 40,
            tokens_trained: 6_000,
            tokens_sampled: 7,
            memory_bytes: None,
        };

        let text = line(&before, &now, Duration::from_secs(2));

        let expected = "2 models · 1 adapter · 3 running, 40 waiting · 2,500 tokens/s trained · 4 tokens/s sampled";
        assert_eq!(text, expected);
    }
}
