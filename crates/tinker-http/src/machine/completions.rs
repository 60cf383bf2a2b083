//! The life of one `retrieve_futures` loop: a single long poll for all samples of a sampler.
//!
//! It holds the poll while somebody waits, returns at once when it only reports what was fetched,
//! and rests when there is nothing to wait for or to report.

use std::collections::BTreeSet;
use std::time::Duration;

use tinker_types::RequestId;

use super::PollPolicy;

/// Pause between two polls while billing is being settled.
const BILLING_DELAY: Duration = Duration::from_secs(5);
/// Least time between two polls that brought something, so that many completions share one answer.
const GATHER: Duration = Duration::from_millis(10);

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompletionEvent {
    /// The loop begins, a wait is over, or there is something new to wait for or to report.
    Look,
    /// An answer came.
    Answered {
        /// Where it says to go on.
        cursor: u64,
        /// How many completions it brought.
        n_completions: usize,
    },
    /// Another status.
    Status {
        /// The status code.
        code: u16,
        /// How long the server asked to wait.
        retry_after: Option<Duration>,
    },
    /// The answer was not understood.
    Unusable,
    /// No connection.
    ConnectionLost,
    /// The poll was held for longer than this client waits.
    TimedOut,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CompletionStep {
    /// Poll.
    Poll {
        /// The cursor to send.
        prev_cursor: u64,
        /// Whether the server may hold the poll.
        hold: bool,
        /// What was fetched since, in order.
        fetched: Vec<RequestId>,
    },
    /// Wait.
    Wait(Duration),
    /// Wait until there is something to wait for or to report.
    Rest,
    /// Stop: those who wait must ask one by one.
    Finish,
}

/// Whether an answer may leave out samples that are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missed {
    /// It does not.
    Nothing,
    /// The server was away or failing before. If it was started again, with an empty list that has
    /// grown beyond the cursor of this client by now, then the answer lacks what came before.
    Perhaps,
    /// The list is shorter than before: the server has forgotten it.
    Surely,
}

/// The state of one loop.
#[derive(Debug, Clone)]
pub struct CompletionPoll {
    policy: PollPolicy,
    cursor: u64,
    /// The cursor that the server was last told.
    told_cursor: u64,
    fetched: BTreeSet<RequestId>,
    in_poll: Vec<RequestId>,
    sent_at: Option<Duration>,
    /// The server was away or failing since the last answer.
    was_away: bool,
    n_bad_requests: u32,
    n_troubles: u32,
    trouble_since: Option<Duration>,
    billing_since: Option<Duration>,
}

impl CompletionPoll {
    /// A loop that has not begun.
    #[must_use]
    pub const fn new(policy: PollPolicy) -> Self {
        Self {
            policy,
            cursor: 0,
            told_cursor: 0,
            fetched: BTreeSet::new(),
            in_poll: Vec::new(),
            sent_at: None,
            was_away: false,
            n_bad_requests: 0,
            n_troubles: 0,
            trouble_since: None,
            billing_since: None,
        }
    }

    /// Notes that a result was fetched: it is reported until a poll succeeds.
    pub fn fetched(&mut self, request_id: RequestId) {
        self.fetched.insert(request_id);
    }

    /// Whether an answer with this cursor may leave something out. To be asked before the answer is
    /// taken note of.
    #[must_use]
    pub const fn missed(&self, cursor: u64) -> Missed {
        if cursor < self.cursor {
            Missed::Surely
        } else if self.was_away {
            Missed::Perhaps
        } else {
            Missed::Nothing
        }
    }

    /// Takes note of an event at `now`, with so many waiting, and says what to do.
    pub fn on(
        &mut self,
        now: Duration,
        n_waiting: usize,
        event: CompletionEvent,
        draw: f64,
    ) -> CompletionStep {
        match event {
            CompletionEvent::Look => self.look(now, n_waiting),
            CompletionEvent::Answered {
                cursor,
                n_completions,
            } => {
                self.calm_down();
                for id in std::mem::take(&mut self.in_poll) {
                    self.fetched.remove(&id);
                }
                self.told_cursor = self.cursor.min(cursor);
                self.cursor = cursor;
                let interval = if n_completions == 0 {
                    self.policy.min_interval
                } else {
                    GATHER
                };
                self.look_after(interval, now, n_waiting)
            }
            CompletionEvent::TimedOut => self.look_after(self.policy.min_interval, now, n_waiting),
            CompletionEvent::Unusable => CompletionStep::Finish,
            CompletionEvent::ConnectionLost => {
                self.was_away = true;
                self.on_trouble(now, None, draw)
            }
            CompletionEvent::Status { code, retry_after } => {
                self.on_status(now, code, retry_after, draw)
            }
        }
    }

    fn on_status(
        &mut self,
        now: Duration,
        code: u16,
        retry_after: Option<Duration>,
        draw: f64,
    ) -> CompletionStep {
        match code {
            402 => {
                let since = *self.billing_since.get_or_insert(now);
                if now + BILLING_DELAY > since.saturating_add(self.policy.billing_pause) {
                    return CompletionStep::Finish;
                }
                CompletionStep::Wait(BILLING_DELAY)
            }
            // Proxies say that, too.
            400 if self.n_bad_requests < self.policy.max_bad_requests => {
                self.n_bad_requests += 1;
                CompletionStep::Wait(self.next_delay(retry_after, draw))
            }
            501 | 505 => CompletionStep::Finish,
            408 | 409 | 429 => self.on_trouble(now, retry_after, draw),
            500.. => {
                self.was_away = true;
                self.on_trouble(now, retry_after, draw)
            }
            _ => CompletionStep::Finish,
        }
    }

    fn on_trouble(
        &mut self,
        now: Duration,
        retry_after: Option<Duration>,
        draw: f64,
    ) -> CompletionStep {
        let since = *self.trouble_since.get_or_insert(now);
        let delay = self.next_delay(retry_after, draw);
        if now + delay > since + self.policy.outage_timeout {
            return CompletionStep::Finish;
        }
        CompletionStep::Wait(delay)
    }

    fn next_delay(&mut self, retry_after: Option<Duration>, draw: f64) -> Duration {
        let delay = self.policy.backoff.delay(self.n_troubles, draw);
        self.n_troubles = self.n_troubles.saturating_add(1);
        retry_after.unwrap_or(delay)
    }

    fn look_after(
        &mut self,
        interval: Duration,
        now: Duration,
        n_waiting: usize,
    ) -> CompletionStep {
        let earliest = self.sent_at.map_or(now, |at| at + interval);
        match earliest.checked_sub(now) {
            Some(rest) if !rest.is_zero() => CompletionStep::Wait(rest),
            _ => self.look(now, n_waiting),
        }
    }

    fn look(&mut self, now: Duration, n_waiting: usize) -> CompletionStep {
        let has_news = !self.fetched.is_empty() || self.told_cursor != self.cursor;
        if n_waiting == 0 && !has_news {
            return CompletionStep::Rest;
        }
        self.sent_at = Some(now);
        self.in_poll = self.fetched.iter().cloned().collect();
        CompletionStep::Poll {
            prev_cursor: self.cursor,
            hold: n_waiting > 0,
            fetched: self.in_poll.clone(),
        }
    }

    const fn calm_down(&mut self) {
        self.was_away = false;
        self.n_bad_requests = 0;
        self.n_troubles = 0;
        self.trouble_since = None;
        self.billing_since = None;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::CompletionEvent::{ConnectionLost, Look, TimedOut};
    use super::CompletionStep::{Finish, Rest};
    use super::*;

    const fn answered(cursor: u64, n_completions: usize) -> CompletionEvent {
        CompletionEvent::Answered {
            cursor,
            n_completions,
        }
    }

    const fn status(code: u16) -> CompletionEvent {
        CompletionEvent::Status {
            code,
            retry_after: None,
        }
    }

    const fn wait(ms: u64) -> CompletionStep {
        CompletionStep::Wait(Duration::from_millis(ms))
    }

    fn poll(prev_cursor: u64, hold: bool, fetched: &[&str]) -> CompletionStep {
        CompletionStep::Poll {
            prev_cursor,
            hold,
            fetched: fetched.iter().map(|id| id.parse().unwrap()).collect(),
        }
    }

    fn new() -> CompletionPoll {
        CompletionPoll::new(PollPolicy::default())
    }

    /// Feeds `(now in ms, waiting, event)` and compares the steps, without jitter.
    fn check(poll: &mut CompletionPoll, steps: &[(u64, usize, CompletionEvent, CompletionStep)]) {
        for (now, n_waiting, event, expected) in steps {
            let step = poll.on(Duration::from_millis(*now), *n_waiting, *event, 0.0);
            assert_eq!(step, *expected, "at {now} ms after {event:?}");
        }
    }

    #[test]
    fn polls_while_somebody_waits_then_tells_the_cursor_and_rests() {
        check(
            &mut new(),
            &[
                (0, 0, Look, Rest),
                (5, 2, Look, poll(0, true, &[])),
                (900, 1, answered(3, 1), poll(3, true, &[])),
                (950, 0, answered(4, 1), poll(4, false, &[])),
                (1100, 0, answered(4, 0), Rest),
            ],
        );
    }

    #[test]
    fn what_was_fetched_is_reported_until_a_poll_succeeds() {
        let mut machine = new();
        machine.fetched("b".parse().unwrap());
        machine.fetched("a".parse().unwrap());
        check(
            &mut machine,
            &[
                (0, 0, Look, poll(0, false, &["a", "b"])),
                (10, 0, ConnectionLost, wait(1000)),
            ],
        );
        machine.fetched("c".parse().unwrap());
        check(
            &mut machine,
            &[(1010, 0, Look, poll(0, false, &["a", "b", "c"]))],
        );
        machine.fetched("d".parse().unwrap());
        check(
            &mut machine,
            &[
                (1200, 0, answered(0, 0), poll(0, false, &["d"])),
                (1400, 0, answered(0, 0), Rest),
            ],
        );
    }

    #[test]
    fn a_server_that_answers_at_once_is_not_hammered() {
        check(
            &mut new(),
            &[
                (0, 1, Look, poll(0, true, &[])),
                (1, 1, answered(0, 0), wait(99)),
                (100, 1, Look, poll(0, true, &[])),
                (101, 1, answered(7, 3), wait(9)),
                (110, 1, Look, poll(7, true, &[])),
            ],
        );
    }

    #[test]
    fn trouble_backs_off_until_an_answer_and_ends_with_the_outage() {
        check(
            &mut new(),
            &[
                (0, 1, Look, poll(0, true, &[])),
                (10, 1, status(503), wait(1000)),
                (1010, 1, Look, poll(0, true, &[])),
                (1020, 1, status(429), wait(2000)),
                (3020, 1, Look, poll(0, true, &[])),
                (48_020, 1, TimedOut, poll(0, true, &[])),
                (48_030, 1, answered(1, 0), wait(90)),
                (48_120, 1, Look, poll(1, true, &[])),
                (48_130, 1, ConnectionLost, wait(1000)),
                (1_848_130, 1, ConnectionLost, Finish),
            ],
        );
    }

    #[test]
    fn refusals_end_it_and_bad_requests_after_three() {
        check(
            &mut new(),
            &[
                (0, 1, Look, poll(0, true, &[])),
                (1, 1, status(402), wait(5000)),
                (5001, 1, Look, poll(0, true, &[])),
                (5002, 1, status(400), wait(1000)),
                (6002, 1, status(400), wait(2000)),
                (8002, 1, status(400), wait(4000)),
                (12_002, 1, status(400), Finish),
            ],
        );
        check(&mut new(), &[(0, 1, status(404), Finish)]);
        check(&mut new(), &[(0, 1, CompletionEvent::Unusable, Finish)]);
        check(&mut new(), &[(0, 1, status(402), wait(5000))]);
    }

    #[test]
    fn a_cursor_that_went_back_is_a_server_that_forgot() {
        let mut machine = new();
        check(&mut machine, &[(0, 1, Look, poll(0, true, &[]))]);
        assert_eq!(machine.missed(9), Missed::Nothing);
        check(&mut machine, &[(50, 1, answered(9, 2), poll(9, true, &[]))]);

        assert_eq!(machine.missed(0), Missed::Surely);

        check(
            &mut machine,
            &[(900, 1, answered(0, 0), poll(0, true, &[]))],
        );
    }

    #[test]
    fn a_server_that_was_away_may_have_left_something_out_of_its_next_answer_only() {
        for (event, missed) in [
            (ConnectionLost, Missed::Perhaps),
            (status(502), Missed::Perhaps),
            (status(429), Missed::Nothing),
            (TimedOut, Missed::Nothing),
        ] {
            let mut machine = new();
            let first = [
                (0, 1, Look, poll(0, true, &[])),
                (900, 1, answered(5, 2), poll(5, true, &[])),
            ];
            check(&mut machine, &first);

            machine.on(Duration::from_secs(1), 1, event, 0.0);
            assert_eq!(machine.missed(5), missed, "{event:?}");
            assert_eq!(machine.missed(20), missed, "{event:?}");
            machine.on(Duration::from_secs(2), 1, answered(20, 3), 0.0);
            assert_eq!(machine.missed(20), Missed::Nothing, "{event:?}");
        }
    }

    proptest! {
        /// Nothing fetched is ever lost: it is reported by a poll that succeeds.
        #[test]
        fn every_fetched_result_is_reported(
            events in proptest::collection::vec((0..5_u8, 0..3_usize), 1..200),
        ) {
            let mut machine = new();
            let mut open: BTreeSet<RequestId> = BTreeSet::new();
            let mut sent = Vec::new();
            for (i, (event, n_waiting)) in (0_u64..).zip(events) {
                let now = Duration::from_secs(i);
                let event = match event {
                    0 => {
                        let id: RequestId = format!("r{i}").parse().unwrap();
                        open.insert(id.clone());
                        machine.fetched(id);
                        continue;
                    }
                    1 => {
                        for id in sent.drain(..) {
                            open.remove(&id);
                        }
                        answered(i, 1)
                    }
                    2 => ConnectionLost,
                    3 => TimedOut,
                    _ => Look,
                };
                if let CompletionStep::Poll { fetched, .. } = machine.on(now, n_waiting, event, 0.5) {
                    sent = fetched;
                }
                let mut known = machine.fetched.clone();
                known.extend(sent.iter().cloned());
                prop_assert!(open.is_subset(&known));
            }
        }
    }
}
