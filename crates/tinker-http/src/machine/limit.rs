//! Budgets: bytes under way, and a pause that all senders of a client share.

use std::time::Duration;

/// How long after a pause senders stay careful.
const CAUTION: Duration = Duration::from_secs(10);

/// A soft budget of bytes: it may be overdrawn by one item, so that a large one always passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteBudget {
    capacity: u64,
    in_use: u64,
}

impl ByteBudget {
    /// An unused budget.
    #[must_use]
    pub const fn new(capacity: u64) -> Self {
        Self {
            capacity,
            in_use: 0,
        }
    }

    /// Takes `n` bytes unless the budget is overdrawn already.
    pub const fn try_take(&mut self, n: u64) -> bool {
        let open = self.in_use <= self.capacity;
        if open {
            self.in_use = self.in_use.saturating_add(n);
        }
        open
    }

    /// Returns `n` bytes taken before.
    pub const fn give_back(&mut self, n: u64) {
        self.in_use = self.in_use.saturating_sub(n);
    }

    /// Bytes taken and not returned.
    #[must_use]
    pub const fn in_use(&self) -> u64 {
        self.in_use
    }
}

/// A pause the server asked one sender for, kept by all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SharedPause {
    until: Option<Duration>,
}

impl SharedPause {
    /// Pauses for `wait` from `now`; a longer pause under way stays.
    pub fn pause(&mut self, now: Duration, wait: Duration) {
        let until = now.saturating_add(wait);
        self.until = Some(self.until.map_or(until, |earlier| earlier.max(until)));
    }

    /// What is left of the pause.
    #[must_use]
    pub fn remaining(&self, now: Duration) -> Option<Duration> {
        let left = self.until?.checked_sub(now)?;
        (!left.is_zero()).then_some(left)
    }

    /// Whether a pause is under way or ended less than ten seconds ago.
    #[must_use]
    pub fn is_recent(&self, now: Duration) -> bool {
        self.until
            .is_some_and(|until| now < until.saturating_add(CAUTION))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn at(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn one_oversized_item_passes_and_the_next_one_waits() {
        let mut budget = ByteBudget::new(100);

        assert!(budget.try_take(1000));
        assert!(!budget.try_take(1));
        budget.give_back(1000);
        assert!(budget.try_take(1));
    }

    #[test]
    fn the_longer_pause_is_kept() {
        let mut pause = SharedPause::default();
        assert_eq!(pause.remaining(at(0)), None);
        assert!(!pause.is_recent(at(0)));

        pause.pause(at(0), at(5));
        pause.pause(at(1), at(1));

        assert_eq!(pause.remaining(at(1)), Some(at(4)));
        assert_eq!(pause.remaining(at(5)), None);
        assert!(pause.is_recent(at(14)));
        assert!(!pause.is_recent(at(15)));
    }

    proptest! {
        /// A budget is overdrawn by one item at most, and empty when all is returned.
        #[test]
        fn a_budget_is_overdrawn_by_one_item_at_most(
            sizes in proptest::collection::vec(0..5000_u64, 1..100),
            capacity in 0..10_000_u64,
        ) {
            let mut budget = ByteBudget::new(capacity);
            let taken: Vec<u64> = sizes.into_iter().filter(|&n| budget.try_take(n)).collect();
            let all_but_last: u64 = taken.iter().rev().skip(1).sum();

            prop_assert!(all_but_last <= capacity);
            for n in taken {
                budget.give_back(n);
            }
            prop_assert_eq!(budget.in_use(), 0);
        }
    }
}
