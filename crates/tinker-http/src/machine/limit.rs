//! Budgets: bytes under way, how many samples at once, and a pause that all senders share.

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

/// How a limit adapts.
#[derive(Debug, Clone, PartialEq)]
pub struct AimdPolicy {
    /// Most at once. Default 10,000: five samplers as the official server sizes them.
    pub max: u32,
    /// Fewest at once. Default 4, so that a refused burst does not leave one sample at a time.
    pub min: u32,
    /// Added to the limit for each limit's worth of results. Default 20: from 4 to 2,000 in a
    /// hundred rounds.
    pub increase: f64,
    /// What a refusal leaves of the number in flight, in `(0, 1)`. Default 0.5.
    pub decrease: f64,
    /// Refusals this soon after one that counted are of the same burst. Default 1 s.
    pub cooldown: Duration,
}

impl Default for AimdPolicy {
    fn default() -> Self {
        Self {
            max: 10_000,
            min: 4,
            increase: 20.0,
            decrease: 0.5,
            cooldown: Duration::from_secs(1),
        }
    }
}

/// A concurrency limit that grows while the server keeps up and shrinks when it refuses: additive
/// increase, multiplicative decrease (Chiu and Jain 1989). It begins at its maximum.
#[derive(Debug, Clone)]
pub struct AimdLimit {
    policy: AimdPolicy,
    limit: f64,
    in_flight: u32,
    shrunk_at: Option<Duration>,
    /// The limit that a change was last told of.
    told: u32,
}

impl AimdLimit {
    /// A limit that nothing was refused under yet.
    #[must_use]
    pub fn new(policy: AimdPolicy) -> Self {
        Self {
            limit: f64::from(policy.max),
            told: policy.max,
            policy,
            in_flight: 0,
            shrunk_at: None,
        }
    }

    /// Takes a place if there is one.
    pub fn try_enter(&mut self) -> bool {
        let is_open = self.in_flight < self.limit();
        if is_open {
            self.in_flight += 1;
        }
        is_open
    }

    /// Gives a place back after a result: the limit grows if it was what held others back. The new
    /// one if it has doubled since a change was told, or has reached its maximum.
    pub fn succeed(&mut self) -> Option<u32> {
        if self.in_flight.saturating_mul(2) >= self.limit() {
            let grown = self.limit + self.policy.increase / self.limit.max(1.0);
            self.limit = grown.min(f64::from(self.policy.max));
        }
        self.leave();
        let limit = self.limit();
        let is_news = limit >= self.told.saturating_mul(2) || limit == self.policy.max;
        (is_news && limit != self.told).then(|| self.tell())
    }

    const fn tell(&mut self) -> u32 {
        self.told = self.limit();
        self.told
    }

    /// Gives a place back without having learned anything.
    pub const fn leave(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Notes that the server refused one of those in flight; the new limit unless that counted
    /// already.
    pub fn refuse(&mut self, now: Duration) -> Option<u32> {
        let is_same_burst = self
            .shrunk_at
            .is_some_and(|at| now < at.saturating_add(self.policy.cooldown));
        if is_same_burst {
            return None;
        }
        self.shrunk_at = Some(now);
        let used = self.limit.min(f64::from(self.in_flight));
        self.limit = (used * self.policy.decrease).max(f64::from(self.policy.min));
        Some(self.tell())
    }

    /// Most at once, now.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between min and max, which are u32"
    )]
    pub const fn limit(&self) -> u32 {
        self.limit as u32
    }

    /// Places taken.
    #[must_use]
    pub const fn in_flight(&self) -> u32 {
        self.in_flight
    }
}

/// Notices that nothing has come back for a long time, however long each single wait may take.
#[derive(Debug, Clone, Copy)]
pub struct ProgressWatch {
    patience: Duration,
    last: Duration,
    n_waiting: u64,
}

impl ProgressWatch {
    /// A watch that nothing waits under.
    #[must_use]
    pub const fn new(patience: Duration) -> Self {
        Self {
            patience,
            last: Duration::ZERO,
            n_waiting: 0,
        }
    }

    /// Notes that one more waits; the first after a quiet time starts the clock.
    pub const fn begin(&mut self, now: Duration) {
        if self.n_waiting == 0 {
            self.last = now;
        }
        self.n_waiting += 1;
    }

    /// Notes that one got its result, or a sign of life: the clock starts anew.
    pub const fn advance(&mut self, now: Duration) {
        self.last = now;
    }

    /// Notes that one waits no more.
    pub const fn end(&mut self) {
        self.n_waiting = self.n_waiting.saturating_sub(1);
    }

    /// What is left of the patience; zero if those who wait should give up.
    #[must_use]
    pub const fn remaining(&self, now: Duration) -> Duration {
        self.last.saturating_add(self.patience).saturating_sub(now)
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

    fn limit(max: u32) -> AimdLimit {
        AimdLimit::new(AimdPolicy {
            max,
            ..AimdPolicy::default()
        })
    }

    /// Enters until refused; how many came in.
    fn fill(limit: &mut AimdLimit) -> u32 {
        (0..).take_while(|_| limit.try_enter()).count() as u32
    }

    #[test]
    fn a_limit_halves_once_a_burst_and_never_below_its_least() {
        let mut limit = limit(100);
        assert_eq!(fill(&mut limit), 100);

        // (second, told, limit)
        for (now, told, expected) in [
            (0, Some(50), 50),
            (0, None, 50),
            (1, Some(25), 25),
            (2, Some(12), 12),
            (3, Some(6), 6),
            (4, Some(4), 4),
            (5, Some(4), 4),
        ] {
            assert_eq!(limit.refuse(at(now)), told, "at {now} s");
            assert_eq!(limit.limit(), expected, "at {now} s");
        }
        assert!(!limit.try_enter());
    }

    #[test]
    fn a_limit_shrinks_to_a_part_of_what_was_in_flight() {
        let mut limit = limit(1000);
        for _ in 0..20 {
            assert!(limit.try_enter());
        }

        limit.refuse(at(0));

        assert_eq!(limit.limit(), 10);
    }

    #[test]
    fn a_limit_in_use_grows_by_its_increase_a_round_up_to_its_maximum() {
        let mut limit = limit(100);
        fill(&mut limit);
        limit.refuse(at(0));
        for _ in 0..50 {
            limit.leave();
        }

        for _ in 0..50 {
            limit.succeed();
            assert!(limit.try_enter());
        }
        assert!((65..=70).contains(&limit.limit()), "{limit:?}");
        for _ in 0..500 {
            limit.succeed();
            fill(&mut limit);
        }
        assert_eq!((limit.limit(), limit.in_flight()), (100, 100));
    }

    #[test]
    fn growth_is_told_when_the_limit_has_doubled_and_when_it_is_whole_again() {
        let mut limit = limit(100);
        fill(&mut limit);
        limit.refuse(at(0));
        limit.refuse(at(1));
        assert_eq!(limit.refuse(at(2)), Some(12));
        let mut told = Vec::new();

        for _ in 0..1000 {
            told.extend(limit.succeed());
            fill(&mut limit);
        }

        assert_eq!(told, [24, 48, 96, 100]);
    }

    #[test]
    fn a_limit_that_holds_nobody_back_does_not_grow() {
        let mut limit = limit(100);
        fill(&mut limit);
        limit.refuse(at(0));
        for _ in 0..100 {
            limit.leave();
        }

        assert!(limit.try_enter());
        limit.succeed();

        assert_eq!((limit.limit(), limit.in_flight()), (50, 0));
    }

    #[test]
    fn patience_counts_from_the_last_result_and_only_while_something_waits() {
        let mut watch = ProgressWatch::new(at(10));

        watch.begin(at(1000));
        watch.begin(at(1005));
        assert_eq!(watch.remaining(at(1005)), at(5));
        watch.advance(at(1009));
        watch.end();
        assert_eq!(watch.remaining(at(1018)), at(1));
        assert_eq!(watch.remaining(at(1019)), at(0));
        watch.end();

        watch.begin(at(5000));
        assert_eq!(watch.remaining(at(5000)), at(10));
    }

    proptest! {
        /// Whatever happens, those in flight are at most the maximum, and the limit is in range.
        #[test]
        fn a_limit_stays_in_its_range(events in proptest::collection::vec(0..4_u8, 1..400)) {
            let mut limit = limit(50);
            for (now, event) in (0..).zip(events) {
                match event {
                    0 => { limit.try_enter(); }
                    1 => { limit.succeed(); }
                    2 => limit.leave(),
                    _ => { limit.refuse(at(now)); }
                }
                prop_assert!((4..=50).contains(&limit.limit()));
                prop_assert!(limit.in_flight() <= 50);
            }
        }

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
