//! When to ask for a sample by itself although one poll waits for all.
//!
//! A server that was started again may pass the place in its list that this client had read up to,
//! before the client asks anew: what it tells then leaves out what was done in between, and nothing
//! shows it. So a sample of which nothing was heard for a while is asked for by itself, again and
//! again, more and more rarely and with more and more time for the answer.

use std::time::Duration;

/// Time for the answer to the first such question. A server that has an outcome answers at once;
/// others hold the question, which is then given up.
const FIRST_PATIENCE: Duration = Duration::from_secs(2);
/// Most time for an answer: servers hold a question for less.
const MOST_PATIENCE: Duration = Duration::from_secs(45);
/// The interval doubles this many times.
const MOST_DOUBLINGS: u32 = 4;

/// One sample of which nothing was heard yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unheard {
    due: Duration,
    n_asks: u32,
}

impl Unheard {
    /// A sample that is waited for from `now` on.
    #[must_use]
    pub const fn begin(now: Duration, interval: Duration) -> Self {
        Self {
            due: now.saturating_add(interval),
            n_asks: 0,
        }
    }

    /// When it is to be asked for.
    #[must_use]
    pub const fn due(&self) -> Duration {
        self.due
    }

    /// Time for the answer to the next question.
    #[must_use]
    pub fn patience(&self) -> Duration {
        (FIRST_PATIENCE * 2_u32.pow(self.doublings())).min(MOST_PATIENCE)
    }

    /// Notes that the server may have told of it in vain: it is asked for now.
    pub fn suspect(&mut self, now: Duration) {
        self.due = self.due.min(now);
    }

    /// Notes that the answer, or its absence, left it open.
    pub fn asked(&mut self, now: Duration, interval: Duration) {
        self.n_asks = self.n_asks.saturating_add(1);
        self.due = now.saturating_add(interval * 2_u32.pow(self.doublings()));
    }

    fn doublings(&self) -> u32 {
        self.n_asks.min(MOST_DOUBLINGS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn questions_become_rarer_and_more_patient() {
        let interval = secs(60);
        let mut sample = Unheard::begin(secs(0), interval);
        let mut asked = Vec::new();

        for _ in 0..7 {
            let now = sample.due();
            asked.push((now.as_secs(), sample.patience().as_secs()));
            sample.asked(now, interval);
        }

        assert_eq!(
            asked,
            [
                (60, 2),
                (180, 4),
                (420, 8),
                (900, 16),
                (1860, 32),
                (2820, 32),
                (3780, 32)
            ]
        );
    }

    #[test]
    fn a_suspicion_only_makes_a_question_earlier() {
        let mut sample = Unheard::begin(secs(10), secs(60));

        sample.suspect(secs(20));
        assert_eq!(sample.due(), secs(20));
        sample.suspect(secs(30));
        assert_eq!(sample.due(), secs(20));
    }
}
