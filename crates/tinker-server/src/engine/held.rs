//! Samples that a passing fault keeps from starting, and when they are tried again.

use std::time::{Duration, Instant};

use tinker_types::RequestId;

use super::Worker;
use crate::error::Error;
use crate::scheduler::pause_after;

/// Held samples, all tried again at once. The time is the caller's.
#[derive(Debug, Default)]
pub(super) struct HeldSamples {
    ids: Vec<RequestId>,
    /// Attempts in a row after which some were still held.
    n_attempts: u32,
    wake: Option<Instant>,
}

impl HeldSamples {
    /// Adds a sample. True: it is the first one since the last attempt.
    fn push(&mut self, id: RequestId, now: Instant, first_pause: Duration) -> bool {
        let is_first = self.ids.is_empty();
        self.ids.push(id);
        let pause = pause_after(self.n_attempts, first_pause);
        self.wake.get_or_insert(now + pause);
        is_first
    }

    /// When they are tried again.
    pub(super) const fn next_wake(&self) -> Option<Instant> {
        self.wake
    }

    fn take_due(&mut self, now: Instant) -> Vec<RequestId> {
        if self.wake.is_none_or(|wake| wake > now) {
            return Vec::new();
        }
        self.wake = None;
        self.n_attempts = self.n_attempts.saturating_add(1);
        std::mem::take(&mut self.ids)
    }

    fn reset_if_empty(&mut self) {
        if self.ids.is_empty() {
            *self = Self::default();
        }
    }

    fn remove(&mut self, id: &RequestId) -> bool {
        let before = self.ids.len();
        self.ids.retain(|held| held != id);
        let was_there = self.ids.len() < before;
        self.reset_if_empty();
        was_there
    }
}

impl Worker {
    /// Keeps a logged sample for later.
    pub(super) fn hold_sample(&mut self, id: &RequestId, fault: &Error) {
        self.core.attempts().note_sample_over(id);
        let fault = fault.with_causes();
        let first_pause = self.core.limits.fault_pause;
        let is_first = self
            .held_samples
            .push(id.clone(), Instant::now(), first_pause);
        if is_first {
            tracing::warn!(
                request.id = %id,
                error = fault,
                "samples are held back; they are tried again after a pause"
            );
        }
        if self.core.held_samples().insert(id.clone(), fault).is_none() {
            self.core.futures.nudge(id);
        }
    }

    /// Takes the held samples up again whose pause is over.
    pub(super) fn retry_samples(&mut self, now: Instant) {
        for id in self.held_samples.take_due(now) {
            match self.guarded(|worker| worker.admit(&id)) {
                Some(true) => {}
                Some(false) => {
                    self.core.held_samples().remove(&id);
                }
                None => self.fail_sample(&id),
            }
        }
        self.held_samples.reset_if_empty();
    }

    /// Gives up a held sample; false if it is none.
    pub(super) fn let_go_of_sample(&mut self, id: &RequestId) -> bool {
        let was_held = self.held_samples.remove(id);
        if was_held {
            self.core.held_samples().remove(id);
        }
        was_held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> RequestId {
        text.parse().unwrap()
    }

    #[test]
    fn held_samples_are_due_together_after_growing_pauses() {
        let mut held = HeldSamples::default();
        let (mut now, first) = (Instant::now(), Duration::from_secs(1));

        for expected in [1, 2, 4, 8, 16, 30, 30] {
            assert!(held.push(id("a"), now, first));
            assert!(!held.push(id("b"), now + Duration::from_millis(500), first));
            let pause = Duration::from_secs(expected);
            assert_eq!(held.next_wake(), Some(now + pause));
            assert!(
                held.take_due(now + pause - Duration::from_millis(1))
                    .is_empty()
            );
            now += pause;
            assert_eq!(held.take_due(now), [id("a"), id("b")]);
        }
        held.reset_if_empty();

        held.push(id("c"), now, first);
        assert_eq!(held.next_wake(), Some(now + first));
    }

    #[test]
    fn a_sample_that_is_given_up_is_not_due() {
        let mut held = HeldSamples::default();
        let now = Instant::now();
        held.push(id("a"), now, Duration::ZERO);

        assert!(held.remove(&id("a")));

        assert!(!held.remove(&id("a")));
        assert_eq!(held.next_wake(), None);
        assert!(held.take_due(now).is_empty());
    }
}
