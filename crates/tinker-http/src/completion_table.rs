//! Who waits for which sample, and what was told of samples that nobody waits for.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tinker_types::RequestId;
use tokio::sync::oneshot;

use crate::completion_poller::Completed;
use crate::machine::Unheard;

/// Most samples remembered that nobody waits for: many more than are being submitted at once. One
/// that is forgotten too early is asked for by itself, as is every sample that nothing is heard of.
const MOST_REMEMBERED: usize = 16_384;

/// The samples that one poll waits for.
#[derive(Debug)]
pub(crate) struct CompletionTable {
    /// Time after which a sample that nothing is heard of is asked for by itself.
    interval: Duration,
    waiting: HashMap<RequestId, Waiter>,
    /// Told of before the answer to their submission was read here.
    early: Recent<Completed>,
    /// Given up before they were done.
    abandoned: Recent<()>,
}

#[derive(Debug)]
struct Waiter {
    done: oneshot::Sender<Completed>,
    unheard: Unheard,
}

/// What waiting for a sample begins with.
#[derive(Debug)]
pub(crate) enum Entry {
    /// It is done already.
    Done(Completed),
    /// It is not; this tells when.
    Waits(oneshot::Receiver<Completed>),
}

/// What to ask for by itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Overdue {
    /// These, each with the time for its answer.
    Ask(Vec<(RequestId, Duration)>),
    /// Nothing before this time has passed, which is an interval at most.
    In(Duration),
    /// Nothing, since nobody waits.
    Nothing,
}

impl CompletionTable {
    /// A table that nobody waits in.
    pub(crate) fn new(interval: Duration) -> Self {
        Self {
            interval,
            waiting: HashMap::new(),
            early: Recent::default(),
            abandoned: Recent::default(),
        }
    }

    /// How many wait.
    pub(crate) fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Begins to wait for a sample.
    pub(crate) fn wait(&mut self, now: Duration, request_id: &RequestId) -> Entry {
        if let Some(completed) = self.early.take(request_id) {
            return Entry::Done(completed);
        }
        let (done, receiver) = oneshot::channel();
        let unheard = Unheard::begin(now, self.interval);
        let waiter = Waiter { done, unheard };
        self.waiting.insert(request_id.clone(), waiter);
        Entry::Waits(receiver)
    }

    /// Gives a sample up that was waited for.
    pub(crate) fn abandon(&mut self, request_id: &RequestId) {
        if self.waiting.remove(request_id).is_some() {
            self.abandoned.put(request_id.clone(), ());
        }
    }

    /// Takes note that a sample is done; whether it was given up, so that nobody will fetch it.
    #[must_use]
    pub(crate) fn complete(&mut self, request_id: &RequestId, completed: Completed) -> bool {
        if self.abandoned.take(request_id).is_some() {
            return true;
        }
        match self.waiting.remove(request_id) {
            // Whoever waited may have gone in this moment; the result then stays with the server.
            Some(waiter) => drop(waiter.done.send(completed)),
            None => self.early.put(request_id.clone(), completed),
        }
        false
    }

    /// Takes note that asking for a sample by itself left it open.
    pub(crate) fn left_open(&mut self, now: Duration, request_id: &RequestId) {
        if let Some(waiter) = self.waiting.get_mut(request_id) {
            waiter.unheard.asked(now, self.interval);
        }
    }

    /// Takes note that an outcome is there which no poll told of.
    pub(crate) fn found(&mut self, request_id: &RequestId) {
        if let Some(waiter) = self.waiting.remove(request_id) {
            waiter.done.send(Completed::AskSingly).ok();
        }
    }

    /// Has each sample that waits asked for by itself, few at a time.
    pub(crate) fn suspect_all(&mut self, now: Duration) {
        for waiter in self.waiting.values_mut() {
            waiter.unheard.suspect(now);
        }
    }

    /// Has everybody ask for what they wait for.
    pub(crate) fn wake_all(&mut self) {
        for (_, waiter) in self.waiting.drain() {
            waiter.done.send(Completed::AskSingly).ok();
        }
    }

    /// The samples to ask for by themselves, those due first, at most `most` of them.
    pub(crate) fn overdue(&self, now: Duration, most: usize) -> Overdue {
        let Some(next) = self
            .waiting
            .values()
            .map(|waiter| waiter.unheard.due())
            .min()
        else {
            return Overdue::Nothing;
        };
        if next > now {
            // Whoever begins to wait meanwhile is due an interval later, perhaps before all others.
            return Overdue::In((next - now).min(self.interval));
        }
        let mut due: Vec<_> = self
            .waiting
            .iter()
            .filter(|(_, waiter)| waiter.unheard.due() <= now)
            .collect();
        due.sort_unstable_by_key(|(_, waiter)| waiter.unheard.due());
        let ask = |(id, waiter): (&RequestId, &Waiter)| (id.clone(), waiter.unheard.patience());
        Overdue::Ask(due.into_iter().take(most).map(ask).collect())
    }
}

/// The last few entries of a table: when it is full, the oldest one goes.
#[derive(Debug)]
struct Recent<V> {
    /// Each with its number, by which a key that was taken out and came again has one place only.
    entries: HashMap<RequestId, (u64, V)>,
    /// Numbers and keys by age; some were taken out since.
    order: VecDeque<(u64, RequestId)>,
    n_put: u64,
}

impl<V> Default for Recent<V> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            order: VecDeque::new(),
            n_put: 0,
        }
    }
}

impl<V> Recent<V> {
    fn put(&mut self, key: RequestId, value: V) {
        if let Some((_, known)) = self.entries.get_mut(&key) {
            *known = value;
            return;
        }
        self.n_put += 1;
        self.entries.insert(key.clone(), (self.n_put, value));
        self.order.push_back((self.n_put, key));
        while self.entries.len() > MOST_REMEMBERED {
            let Some((number, oldest)) = self.order.pop_front() else {
                return;
            };
            if self.is_there(number, &oldest) {
                self.entries.remove(&oldest);
            }
        }
        if self.order.len() > 2 * MOST_REMEMBERED {
            let mut order = std::mem::take(&mut self.order);
            order.retain(|(number, key)| self.is_there(*number, key));
            self.order = order;
        }
    }

    /// Whether the entry of this number was not taken out.
    fn is_there(&self, number: u64, key: &RequestId) -> bool {
        self.entries.get(key).is_some_and(|(n, _)| *n == number)
    }

    fn take(&mut self, key: &RequestId) -> Option<V> {
        let (_, value) = self.entries.remove(key)?;
        if self.entries.is_empty() {
            self.order.clear();
        }
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(60);
    const DONE: Completed = Completed::Finished { n_bytes: 7 };

    const fn at(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn id(name: &str) -> RequestId {
        name.parse().unwrap()
    }

    fn waits(table: &mut CompletionTable, now: u64, name: &str) -> oneshot::Receiver<Completed> {
        match table.wait(at(now), &id(name)) {
            Entry::Waits(receiver) => receiver,
            Entry::Done(completed) => panic!("{name} is done: {completed:?}"),
        }
    }

    fn ask(names: &[(&str, u64)]) -> Overdue {
        let of = |(name, patience): &(&str, u64)| (id(name), at(*patience));
        Overdue::Ask(names.iter().map(of).collect())
    }

    #[test]
    fn each_is_told_whether_it_waited_before_or_after() {
        let mut table = CompletionTable::new(INTERVAL);
        let mut late = waits(&mut table, 0, "a");

        assert!(!table.complete(&id("a"), DONE));
        assert!(!table.complete(&id("b"), DONE));

        assert_eq!(late.try_recv(), Ok(DONE));
        assert!(matches!(table.wait(at(1), &id("b")), Entry::Done(DONE)));
        assert_eq!(table.n_waiting(), 0);
    }

    #[test]
    fn what_was_given_up_is_for_nobody() {
        let mut table = CompletionTable::new(INTERVAL);
        drop(waits(&mut table, 0, "a"));
        table.abandon(&id("a"));

        assert!(table.complete(&id("a"), DONE));
        // The same again is of a sample that nobody knows.
        assert!(!table.complete(&id("a"), DONE));
    }

    #[test]
    fn what_nothing_is_heard_of_is_asked_for_the_longest_waiting_first() {
        let mut table = CompletionTable::new(INTERVAL);
        assert_eq!(table.overdue(at(0), 2), Overdue::Nothing);
        let _waiting = [("c", 2), ("a", 0), ("b", 1)].map(|(n, now)| waits(&mut table, now, n));

        assert_eq!(table.overdue(at(10), 2), Overdue::In(at(50)));
        assert_eq!(table.overdue(at(62), 2), ask(&[("a", 2), ("b", 2)]));
        table.left_open(at(62), &id("a"));
        table.left_open(at(63), &id("b"));
        assert_eq!(table.overdue(at(63), 2), ask(&[("c", 2)]));
        table.left_open(at(64), &id("c"));
        assert_eq!(table.overdue(at(64), 2), Overdue::In(INTERVAL));
        assert_eq!(table.overdue(at(124), 2), Overdue::In(at(58)));
        assert_eq!(
            table.overdue(at(184), 3),
            ask(&[("a", 4), ("b", 4), ("c", 4)])
        );
    }

    #[test]
    fn one_that_comes_later_is_due_before_one_that_was_asked_for_often() {
        let mut table = CompletionTable::new(INTERVAL);
        let _old = waits(&mut table, 0, "old");
        for _ in 0..4 {
            table.left_open(at(100), &id("old"));
        }
        // What is slept before the table is looked at again, although nothing tells of the new one.
        let Overdue::In(sleep) = table.overdue(at(100), 9) else {
            panic!("the old one is due");
        };
        let _new = waits(&mut table, 101, "new");
        let woken = at(100) + sleep;

        assert!(
            woken <= at(161),
            "the new one is due at 161 s, seen at {woken:?}"
        );
        assert_eq!(table.overdue(at(161), 9), ask(&[("new", 2)]));
        table.left_open(at(161), &id("new"));
        assert_eq!(table.overdue(at(1060), 1), ask(&[("new", 4)]));
    }

    #[test]
    fn suspected_samples_are_asked_for_at_once_and_what_is_found_is_told() {
        let mut table = CompletionTable::new(INTERVAL);
        let mut waiting = waits(&mut table, 0, "a");

        table.suspect_all(at(5));
        assert_eq!(table.overdue(at(5), 9), ask(&[("a", 2)]));
        table.found(&id("a"));

        assert_eq!(waiting.try_recv(), Ok(Completed::AskSingly));
        assert_eq!(table.overdue(at(5), 9), Overdue::Nothing);
    }

    #[test]
    fn what_nobody_asks_for_is_forgotten_in_the_end() {
        let mut table = CompletionTable::new(INTERVAL);

        for n in 0..3 * MOST_REMEMBERED {
            assert!(!table.complete(&id(&format!("r{n}")), DONE));
            drop(waits(&mut table, 0, &format!("g{n}")));
            table.abandon(&id(&format!("g{n}")));
        }

        for recent in [table.early.entries.len(), table.abandoned.entries.len()] {
            assert_eq!(recent, MOST_REMEMBERED);
        }
        assert_eq!(table.early.order.len(), MOST_REMEMBERED);
        let last = id(&format!("r{}", 3 * MOST_REMEMBERED - 1));
        assert!(matches!(table.wait(at(0), &last), Entry::Done(DONE)));
        assert!(matches!(table.wait(at(0), &id("r0")), Entry::Waits(_)));
    }

    #[test]
    fn a_table_in_use_keeps_no_keys_of_what_was_taken() {
        let mut recent = Recent::default();
        recent.put(id("stays"), ());

        for n in 0..5 * MOST_REMEMBERED {
            let key = id(&format!("r{n}"));
            recent.put(key.clone(), ());
            recent.take(&key);
        }

        assert!(recent.order.len() <= 2 * MOST_REMEMBERED);
        assert!(recent.take(&id("stays")).is_some());
    }

    #[test]
    fn what_was_taken_and_comes_again_is_as_young_as_it_is() {
        let mut recent = Recent::default();
        recent.put(id("other"), ());
        recent.put(id("again"), ());
        recent.take(&id("again"));
        for n in 2..MOST_REMEMBERED {
            recent.put(id(&format!("r{n}")), ());
        }
        recent.put(id("again"), ());

        for n in 0..3 {
            recent.put(id(&format!("new{n}")), ());
        }

        assert_eq!(recent.entries.len(), MOST_REMEMBERED);
        let is_there = ["other", "r2", "r3", "r4", "again"].map(|n| recent.take(&id(n)).is_some());
        assert_eq!(is_there, [false, false, false, true, true]);
    }
}
