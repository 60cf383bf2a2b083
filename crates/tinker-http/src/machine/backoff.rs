//! How long to wait before the n-th repetition.

use std::time::Duration;

/// Delays that double from `base_delay` to `max_delay`, shortened at random.
#[derive(Debug, Clone, PartialEq)]
pub struct Backoff {
    /// Delay before the first repetition.
    pub base_delay: Duration,
    /// Longest delay.
    pub max_delay: Duration,
    /// Largest part of a delay that is taken off at random, in `[0, 1]`: clients that failed
    /// together should not return together.
    pub jitter: f64,
}

impl Backoff {
    /// The delay after `n_failures` earlier delays: `min(base 2^n, max) (1 - jitter draw)`.
    #[must_use]
    pub fn delay(&self, n_failures: u32, draw: f64) -> Duration {
        let factor = 1_u32.checked_shl(n_failures).unwrap_or(u32::MAX);
        let full = self.base_delay.saturating_mul(factor).min(self.max_delay);
        full.mul_f64(1.0 - self.jitter.clamp(0.0, 1.0) * draw.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(n_failures: u32, draw: f64, expected_ms: u64) {
        let backoff = Backoff {
            base_delay: Duration::from_millis(500),
            max_delay: Duration::from_secs(10),
            jitter: 0.25,
        };
        assert_eq!(
            backoff.delay(n_failures, draw),
            Duration::from_millis(expected_ms),
            "failure {n_failures}, draw {draw}"
        );
    }

    #[test]
    fn doubles_to_the_maximum_within_the_jitter() {
        check(0, 0.0, 500);
        check(0, 1.0, 375);
        check(1, 0.0, 1000);
        check(4, 0.0, 8000);
        check(5, 0.0, 10_000);
        check(5, 1.0, 7500);
        check(31, 0.0, 10_000);
        check(4_000_000, 0.0, 10_000);
    }
}
