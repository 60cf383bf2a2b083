//! Whether and when one call is sent again.
//!
//! Every call of this API may be repeated: it is a read, carries a `seq_id`, or has no further
//! effect the second time. A repetition has the same bytes and the same `seq_id`.

use std::time::{Duration, SystemTime};

use super::Backoff;

/// Longest `Retry-After` that is obeyed in full.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// Pause between two attempts while billing is being settled.
const BILLING_DELAY: Duration = Duration::from_secs(5);

/// What went wrong with one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// An answer with this status.
    Status {
        /// The status code.
        code: u16,
        /// Whether the answer came without a body.
        empty_body: bool,
    },
    /// No connection could be made; nothing was sent.
    Unsent,
    /// The connection broke; the request may have arrived.
    Interrupted,
    /// No answer in time.
    TimedOut,
    /// An answer came that cannot be read.
    Unreadable,
    /// The client itself could not send the request.
    Local,
}

impl Failure {
    /// Whether the server may have done what the request asks for.
    #[must_use]
    pub const fn may_have_arrived(self) -> bool {
        match self {
            Self::Unsent | Self::Local => false,
            Self::Interrupted | Self::TimedOut | Self::Unreadable => true,
            // 408 and 409 are said of requests under way, too; 501 and 505 of nothing that was done.
            Self::Status { code, .. } => !matches!(code, 400..=407 | 410..=499 | 501 | 505),
        }
    }
}

/// What a failure calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The same request would fail again.
    Permanent,
    /// It may pass: repeat with growing delays.
    Transient,
    /// Somebody has to settle a bill: repeat slowly, for long.
    Billing,
    /// The server is not there, perhaps restarting: repeat until it is back.
    Unreachable,
}

/// Sorts a failure. `should_retry` is the server's own word, which wins over the status.
#[must_use]
pub const fn classify(failure: Failure, should_retry: Option<bool>) -> Class {
    let code = match failure {
        // Servers restart; a loopback server is back within seconds.
        Failure::Unsent | Failure::Interrupted => return Class::Unreachable,
        Failure::TimedOut => return Class::Transient,
        Failure::Unreadable | Failure::Local => return Class::Permanent,
        Failure::Status { code, empty_body } => {
            // An edge proxy refuses with an empty 400 what the service itself would explain.
            if code == 400 && empty_body && should_retry.is_none() {
                return Class::Transient;
            }
            code
        }
    };
    match (should_retry, code) {
        (Some(true), _) => Class::Transient,
        (Some(false), _) => Class::Permanent,
        (None, 402) => Class::Billing,
        // 408: the server waited in vain. 409: two requests met. 429: later.
        (None, 408 | 409 | 429) => Class::Transient,
        // What is not implemented stays so.
        (None, 501 | 505) => Class::Permanent,
        (None, 500..) => Class::Transient,
        (None, _) => Class::Permanent,
    }
}

/// How often and how long a call is repeated.
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    /// Most attempts that end in an error answer. Default 40, which the time limit undercuts.
    pub max_attempts: u32,
    /// Delays between attempts. Default 0.5 s doubling to 10 s, up to a quarter off.
    pub backoff: Backoff,
    /// Longest time from the first error answer to the last attempt, outages not counted. Default
    /// 5 minutes, as the official client.
    pub total_timeout: Duration,
    /// How long a server that cannot be reached is waited for. Default 5 minutes.
    pub reconnect_timeout: Duration,
    /// How long billing refusals are waited out. Default 1 hour.
    pub billing_pause: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 40,
            backoff: Backoff {
                base_delay: Duration::from_millis(500),
                max_delay: Duration::from_secs(10),
                jitter: 0.25,
            },
            total_timeout: Duration::from_secs(300),
            reconnect_timeout: Duration::from_secs(300),
            billing_pause: Duration::from_secs(3600),
        }
    }
}

impl RetryPolicy {
    /// One attempt, whatever happens.
    #[must_use]
    pub fn never() -> Self {
        Self {
            max_attempts: 1,
            total_timeout: Duration::ZERO,
            reconnect_timeout: Duration::ZERO,
            billing_pause: Duration::ZERO,
            ..Self::default()
        }
    }
}

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Send again after this time.
    RetryAfter(Duration),
    /// Report the failure.
    GiveUp,
}

/// The failures of one call so far.
#[derive(Debug, Clone)]
pub struct RetryState {
    policy: RetryPolicy,
    n_answers: u32,
    n_lost: u32,
    failing_since: Option<Duration>,
    lost_since: Option<Duration>,
    billing_since: Option<Duration>,
}

impl RetryState {
    /// No failure yet.
    #[must_use]
    pub const fn new(policy: RetryPolicy) -> Self {
        Self {
            policy,
            n_answers: 0,
            n_lost: 0,
            failing_since: None,
            lost_since: None,
            billing_since: None,
        }
    }

    /// Counts a failure that happened at `now` and decides. `retry_after`, the server's wish, wins
    /// over the back-off.
    pub fn on_failure(
        &mut self,
        now: Duration,
        class: Class,
        retry_after: Option<Duration>,
        draw: f64,
    ) -> Decision {
        if class != Class::Unreachable {
            self.end_outage(now);
        }
        match class {
            Class::Permanent => Decision::GiveUp,
            Class::Unreachable => self.on_lost(now, draw),
            Class::Billing => {
                let since = *self.billing_since.get_or_insert(now);
                within(now, BILLING_DELAY, since, self.policy.billing_pause)
            }
            Class::Transient => {
                let delay =
                    retry_after.unwrap_or_else(|| self.policy.backoff.delay(self.n_answers, draw));
                self.n_answers = self.n_answers.saturating_add(1);
                let since = *self.failing_since.get_or_insert(now);
                if self.n_answers >= self.policy.max_attempts {
                    return Decision::GiveUp;
                }
                within(now, delay, since, self.policy.total_timeout)
            }
        }
    }

    /// Stops the clock of an outage, and takes that time off the others: they measure a server
    /// that answers. (To restart them would let a server that comes and goes be asked for ever.)
    fn end_outage(&mut self, now: Duration) {
        let outage = self
            .lost_since
            .take()
            .map(|since| now.saturating_sub(since));
        self.n_lost = 0;
        if let Some(outage) = outage {
            self.failing_since = self.failing_since.map(|since| since + outage);
            self.billing_since = self.billing_since.map(|since| since + outage);
        }
    }

    fn on_lost(&mut self, now: Duration, draw: f64) -> Decision {
        let since = *self.lost_since.get_or_insert(now);
        let delay = self.policy.backoff.delay(self.n_lost, draw);
        self.n_lost = self.n_lost.saturating_add(1);
        within(now, delay, since, self.policy.reconnect_timeout)
    }
}

fn within(now: Duration, delay: Duration, since: Duration, budget: Duration) -> Decision {
    if now.saturating_add(delay) > since.saturating_add(budget) {
        Decision::GiveUp
    } else {
        Decision::RetryAfter(delay)
    }
}

/// Reads `retry-after-ms`, else `retry-after` as seconds or as an HTTP date.
///
/// Nonsense and the past are ignored; more than a minute counts as a minute.
#[must_use]
pub fn parse_retry_after(
    retry_after_ms: Option<&str>,
    retry_after: Option<&str>,
    wall_clock: SystemTime,
) -> Option<Duration> {
    // `min` would turn a NaN into the largest wish.
    let seconds = |value: f64| {
        let capped = (!value.is_nan()).then(|| value.min(1e9))?;
        Duration::try_from_secs_f64(capped).ok()
    };
    let from_ms = retry_after_ms
        .and_then(|text| text.trim().parse::<f64>().ok())
        .and_then(|ms| seconds(ms / 1000.0));
    let asked = from_ms.or_else(|| {
        let text = retry_after?.trim();
        match text.parse::<f64>() {
            Ok(value) => seconds(value),
            Err(_) => httpdate::parse_http_date(text)
                .ok()?
                .duration_since(wall_clock)
                .ok(),
        }
    })?;
    (!asked.is_zero()).then(|| asked.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests;
