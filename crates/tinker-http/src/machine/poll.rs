//! The life of one `retrieve_future` loop.
//!
//! `408` and `try_again` mean "not yet" and are asked again, at a floor of one ask per
//! `min_interval` for servers that answer at once. Only sampling sends an expired request again.

use std::time::Duration;

use tinker_types::{QueueState, TryAgain};

use super::Backoff;

/// Pause between two asks while billing is being settled.
const BILLING_DELAY: Duration = Duration::from_secs(5);

/// How a future is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct PollPolicy {
    /// Least time between two asks that are answered "not yet". Default 100 ms: the official
    /// client asks at once, which spins on servers that do not hold the request.
    pub min_interval: Duration,
    /// Delays after 429, 5xx and lost connections. Default 1 s doubling to 30 s; 5xx waits too,
    /// unlike the official client.
    pub backoff: Backoff,
    /// How long a server that is away or failing is waited for. Default 30 minutes.
    pub outage_timeout: Duration,
    /// How long billing refusals are waited out. Default 1 hour.
    pub billing_pause: Duration,
    /// Most empty 400 answers in a row that are asked again. Default 3: proxies inject them.
    pub max_bad_requests: u32,
    /// How long the samples of a sampler wait while none of them gets a result. Default 2 hours, as
    /// the official client's; servers may turn it off. There is no deadline beside this.
    pub progress_timeout: Duration,
    /// Where one poll waits for all samples: time after which a sample that it tells nothing of is
    /// asked for by itself, at first; the time grows to 16 times this. Default 60 s: most samples
    /// are done by then, and a lost word of one delays it by no more.
    pub unheard_interval: Duration,
}

impl Default for PollPolicy {
    fn default() -> Self {
        Self {
            min_interval: Duration::from_millis(100),
            backoff: Backoff {
                base_delay: Duration::from_secs(1),
                max_delay: Duration::from_secs(30),
                jitter: 0.25,
            },
            outage_timeout: Duration::from_secs(1800),
            billing_pause: Duration::from_secs(3600),
            max_bad_requests: 3,
            progress_timeout: Duration::from_secs(7200),
            unheard_interval: Duration::from_secs(60),
        }
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PollEvent {
    /// The loop begins.
    Started,
    /// The wait is over.
    Elapsed,
    /// The bytes are reserved.
    Reserved,
    /// "Not yet".
    TryAgain,
    /// "Ready, and this many bytes".
    MetadataOnly(u64),
    /// The result came.
    Done,
    /// The operation failed.
    Failed,
    /// Another status.
    Status {
        /// The status code.
        code: u16,
        /// Whether the answer came without a body.
        empty_body: bool,
        /// How long the server asked to wait.
        retry_after: Option<Duration>,
    },
    /// No connection.
    ConnectionLost,
    /// The request was held for longer than this client waits.
    TimedOut,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PollStep {
    /// Ask.
    Send {
        /// Whether the server may announce the size first.
        allow_metadata_only: bool,
    },
    /// Wait.
    Wait(Duration),
    /// Reserve bytes for the result.
    ReserveBytes(u64),
    /// Stop.
    Finish(PollEnd),
}

/// How the loop ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PollEnd {
    /// With a result.
    Done,
    /// With the operation's failure.
    Failed,
    /// The server no longer knows the future.
    Expired,
    /// Billing was not settled in time.
    BillingTimedOut,
    /// The server was away or failing for too long.
    ServerLost,
    /// The server refused to answer.
    Refused,
    /// The size was announced twice.
    AnnouncedTwice,
}

/// The state of one loop.
#[derive(Debug, Clone)]
pub struct FuturePoll {
    policy: PollPolicy,
    allow_metadata_only: bool,
    sent_at: Duration,
    n_bad_requests: u32,
    n_troubles: u32,
    trouble_since: Option<Duration>,
    billing_since: Option<Duration>,
}

impl FuturePoll {
    /// A loop that has not begun.
    #[must_use]
    pub const fn new(policy: PollPolicy) -> Self {
        Self {
            policy,
            allow_metadata_only: true,
            sent_at: Duration::ZERO,
            n_bad_requests: 0,
            n_troubles: 0,
            trouble_since: None,
            billing_since: None,
        }
    }

    /// Takes note of an event at `now` and says what to do.
    pub fn on(&mut self, now: Duration, event: PollEvent, draw: f64) -> PollStep {
        match event {
            PollEvent::Started | PollEvent::Elapsed | PollEvent::Reserved => self.send(now),
            PollEvent::Done => PollStep::Finish(PollEnd::Done),
            PollEvent::Failed => PollStep::Finish(PollEnd::Failed),
            PollEvent::TryAgain => {
                self.calm_down();
                self.at_least_every(self.policy.min_interval, now)
            }
            PollEvent::MetadataOnly(_) if !self.allow_metadata_only => {
                PollStep::Finish(PollEnd::AnnouncedTwice)
            }
            PollEvent::MetadataOnly(n_bytes) => {
                self.calm_down();
                self.allow_metadata_only = false;
                PollStep::ReserveBytes(n_bytes)
            }
            PollEvent::ConnectionLost => self.on_trouble(now, None, draw),
            // Some servers hold a poll for minutes: that is "not yet", too.
            PollEvent::TimedOut => self.at_least_every(self.policy.min_interval, now),
            PollEvent::Status {
                code,
                empty_body,
                retry_after,
            } => self.on_status(now, code, empty_body, retry_after, draw),
        }
    }

    fn on_status(
        &mut self,
        now: Duration,
        code: u16,
        empty_body: bool,
        retry_after: Option<Duration>,
        draw: f64,
    ) -> PollStep {
        match code {
            410 => PollStep::Finish(PollEnd::Expired),
            402 => {
                let since = *self.billing_since.get_or_insert(now);
                if now + BILLING_DELAY > since.saturating_add(self.policy.billing_pause) {
                    return PollStep::Finish(PollEnd::BillingTimedOut);
                }
                PollStep::Wait(BILLING_DELAY)
            }
            400 if empty_body && self.n_bad_requests < self.policy.max_bad_requests => {
                self.n_bad_requests += 1;
                self.at_least_every(self.policy.min_interval, now)
            }
            // A throttled client is being served; it may be throttled for as long as it takes.
            429 => {
                self.trouble_since = None;
                PollStep::Wait(self.next_delay(retry_after, draw))
            }
            500.. => self.on_trouble(now, retry_after, draw),
            _ => PollStep::Finish(PollEnd::Refused),
        }
    }

    fn on_trouble(&mut self, now: Duration, retry_after: Option<Duration>, draw: f64) -> PollStep {
        let since = *self.trouble_since.get_or_insert(now);
        let delay = self.next_delay(retry_after, draw);
        if now + delay > since + self.policy.outage_timeout {
            return PollStep::Finish(PollEnd::ServerLost);
        }
        PollStep::Wait(delay)
    }

    fn next_delay(&mut self, retry_after: Option<Duration>, draw: f64) -> Duration {
        let delay = self.policy.backoff.delay(self.n_troubles, draw);
        self.n_troubles = self.n_troubles.saturating_add(1);
        retry_after.unwrap_or(delay)
    }

    fn calm_down(&mut self) {
        self.n_bad_requests = 0;
        self.n_troubles = 0;
        self.trouble_since = None;
        self.billing_since = None;
    }

    fn at_least_every(&mut self, interval: Duration, now: Duration) -> PollStep {
        match (self.sent_at + interval).checked_sub(now) {
            Some(rest) if !rest.is_zero() => PollStep::Wait(rest),
            _ => self.send(now),
        }
    }

    const fn send(&mut self, now: Duration) -> PollStep {
        self.sent_at = now;
        PollStep::Send {
            allow_metadata_only: self.allow_metadata_only,
        }
    }
}

/// Notices when the queue that a future waits in changes its state or reason.
#[derive(Debug, Clone, Default)]
pub struct QueueWatch {
    last: Option<(QueueState, Option<String>)>,
}

impl QueueWatch {
    /// The state and reason, if they differ from the last ones; spelling in any case.
    pub fn observe(&mut self, answer: &TryAgain) -> Option<(QueueState, Option<String>)> {
        let state = answer.queue_state.as_ref()?;
        let state = QueueState::from(state.as_str().trim().to_ascii_lowercase().as_str());
        let seen = (state, answer.queue_state_reason.clone());
        if self.last.as_ref() == Some(&seen) {
            return None;
        }
        self.last = Some(seen.clone());
        Some(seen)
    }
}

/// Time-outs in a row that mean more than a long hold.
const SILENT_POLLS: u32 = 2;

/// Notices when a server leaves polls of one future unanswered, and when it answers again.
#[derive(Debug, Clone, Default)]
pub struct SilenceWatch {
    since: Option<Duration>,
    n_timeouts: u32,
}

/// What a [`SilenceWatch`] noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SilenceNews {
    /// Two polls in a row were not answered; the first was sent this long ago.
    Silent(Duration),
    /// It answers, this long after the first poll that it did not answer was sent.
    Answers(Duration),
}

impl SilenceWatch {
    /// Takes note of what became of a poll that was sent at `sent_at`.
    pub fn observe(
        &mut self,
        sent_at: Duration,
        now: Duration,
        event: PollEvent,
    ) -> Option<SilenceNews> {
        let since = *self.since.get_or_insert(sent_at);
        let silence = now.saturating_sub(since);
        match event {
            PollEvent::TimedOut => {
                self.n_timeouts = self.n_timeouts.saturating_add(1);
                (self.n_timeouts == SILENT_POLLS).then_some(SilenceNews::Silent(silence))
            }
            // No answer either; told as the loss of the server.
            PollEvent::ConnectionLost => None,
            _ => {
                let was_silent = self.n_timeouts >= SILENT_POLLS;
                *self = Self::default();
                was_silent.then_some(SilenceNews::Answers(silence))
            }
        }
    }
}

#[cfg(test)]
mod tests;
