//! Which training operation runs next: keys in turn, the sessions of a key in turn, the runs of a session in turn,
//! each run strictly in its own order. So what one user or one session has queued does not hold up another's.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use tinker_types::TrainingRunId;

use crate::pending::session_of;

/// Longest pause between two attempts at an operation that a passing fault holds back.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// The pause after a fault that had `n_before` others in a row before it: `first`, and twice as long
/// with each, up to [`MAX_PAUSE`].
pub(crate) fn pause_after(n_before: u32, first: Duration) -> Duration {
    let factor = 1_u32.checked_shl(n_before).unwrap_or(u32::MAX);
    first.saturating_mul(factor).min(MAX_PAUSE)
}

/// Something that waits in order.
pub(crate) trait Line: Default {
    type Item;

    fn take(&mut self) -> Option<Self::Item>;
    fn is_empty(&self) -> bool;
    /// Drops what `keep` is false for.
    fn keep(&mut self, keep: &mut dyn FnMut(&Self::Item) -> bool);
}

impl<T> Line for VecDeque<T> {
    type Item = T;

    fn take(&mut self) -> Option<T> {
        self.pop_front()
    }

    fn is_empty(&self) -> bool {
        Self::is_empty(self)
    }

    fn keep(&mut self, keep: &mut dyn FnMut(&T) -> bool) {
        self.retain(keep);
    }
}

/// Named lines of which something waits; they take turns.
#[derive(Debug)]
pub(crate) struct Turns<L> {
    lines: HashMap<String, L>,
    /// The line whose turn it is first.
    order: VecDeque<String>,
}

impl<L> Default for Turns<L> {
    fn default() -> Self {
        Self {
            lines: HashMap::new(),
            order: VecDeque::new(),
        }
    }
}

impl<L: Line> Turns<L> {
    /// The line of a name, to which something is to be added.
    pub(crate) fn line(&mut self, name: &str) -> &mut L {
        if !self.lines.contains_key(name) {
            self.order.push_back(name.to_owned());
        }
        self.lines.entry(name.to_owned()).or_default()
    }
}

impl<L: Line> Line for Turns<L> {
    type Item = L::Item;

    fn take(&mut self) -> Option<L::Item> {
        let name = self.order.pop_front()?;
        let line = self.lines.get_mut(&name)?;
        let item = line.take();
        if line.is_empty() {
            self.lines.remove(&name);
        } else {
            self.order.push_back(name);
        }
        item
    }

    fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    fn keep(&mut self, keep: &mut dyn FnMut(&L::Item) -> bool) {
        self.lines.values_mut().for_each(|line| line.keep(keep));
        self.lines.retain(|_, line| !line.is_empty());
        let lines = &self.lines;
        self.order.retain(|name| lines.contains_key(name));
    }
}

/// The runs of a session, the sessions of a key, the keys.
type Ready = Turns<Turns<VecDeque<TrainingRunId>>>;

/// Operations that wait, held back while an earlier one of their run is missing, or for a while
/// after a fault. The time is the caller's.
#[derive(Debug)]
pub(crate) struct TrainQueue<T> {
    lanes: HashMap<TrainingRunId, Lane<T>>,
    /// Runs whose next operation is there.
    ready: Ready,
    /// Runs whose next operation was put back, and when it is tried again.
    resting: HashMap<TrainingRunId, Instant>,
}

#[derive(Debug)]
struct Lane<T> {
    /// The key it belongs to; the data directory's own is without a name.
    owner: String,
    next: u64,
    waiting: BTreeMap<u64, T>,
    /// The operation that was put back last, and how often.
    put_back: Option<(u64, u32)>,
    /// Since when a missing operation is waited for while the client is there.
    patient_since: Option<Instant>,
}

impl<T> Lane<T> {
    /// Whether something waits for an operation that has not arrived.
    fn is_stuck(&self) -> bool {
        !self.waiting.is_empty() && !self.waiting.contains_key(&self.next)
    }
}

impl<T> Default for TrainQueue<T> {
    fn default() -> Self {
        Self {
            lanes: HashMap::new(),
            ready: Turns::default(),
            resting: HashMap::new(),
        }
    }
}

impl<T> TrainQueue<T> {
    /// Starts a run of a key at its next operation; a run that is known stays where it is.
    pub(crate) fn open(&mut self, run: &TrainingRunId, owner: &str, next: u64) {
        self.lanes.entry(run.clone()).or_insert_with(|| Lane {
            owner: owner.to_owned(),
            next,
            waiting: BTreeMap::new(),
            put_back: None,
            patient_since: None,
        });
    }

    /// Gives a run whose next operation is there its turn.
    fn make_ready(&mut self, run: &TrainingRunId) {
        if let Some(lane) = self.lanes.get(run) {
            let of_key = self.ready.line(&lane.owner);
            let of_session = of_key.line(session_of(run.as_str()));
            of_session.push_back(run.clone());
        }
    }

    /// Adds an operation. Operations of unknown runs start at 0; those already done are dropped.
    pub(crate) fn push(&mut self, run: &TrainingRunId, seq: u64, operation: T) {
        self.open(run, "", 0);
        let Some(lane) = self.lanes.get_mut(run) else {
            return;
        };
        if seq < lane.next || lane.waiting.contains_key(&seq) {
            return;
        }
        lane.waiting.insert(seq, operation);
        lane.patient_since = None;
        if seq == lane.next {
            self.make_ready(run);
        }
    }

    /// Takes the next operation of the run whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<(TrainingRunId, u64, T)> {
        let run = self.ready.take()?;
        let lane = self.lanes.get_mut(&run)?;
        let seq = lane.next;
        let operation = lane.waiting.remove(&seq)?;
        lane.next += 1;
        if lane.waiting.contains_key(&lane.next) {
            self.make_ready(&run);
        }
        Some((run, seq, operation))
    }

    /// Puts back the operation that was taken last from its run. Nothing of the run is ready until
    /// the pause returned has passed and [`Self::wake`] is called; see [`pause_after`].
    pub(crate) fn put_back(
        &mut self,
        run: &TrainingRunId,
        seq: u64,
        operation: T,
        now: Instant,
        first: Duration,
    ) -> Duration {
        self.open(run, "", seq);
        let Some(lane) = self.lanes.get_mut(run) else {
            return Duration::ZERO;
        };
        lane.next = seq;
        lane.waiting.insert(seq, operation);
        let n_before = lane
            .put_back
            .filter(|(last, _)| *last == seq)
            .map_or(0, |(_, n)| n);
        lane.put_back = Some((seq, n_before.saturating_add(1)));
        self.ready.keep(&mut |ready| ready != run);
        let pause = pause_after(n_before, first);
        self.resting.insert(run.clone(), now + pause);
        pause
    }

    /// Makes the runs ready whose pause is over.
    pub(crate) fn wake(&mut self, now: Instant) {
        let due = self.resting.extract_if(|_, until| *until <= now);
        let due: Vec<TrainingRunId> = due.map(|(run, _)| run).collect();
        for run in due {
            self.make_ready(&run);
        }
    }

    /// Ends the pause of a run, if it rests.
    pub(crate) fn rouse(&mut self, run: &TrainingRunId) {
        if self.resting.remove(run).is_some() {
            self.make_ready(run);
        }
    }

    /// When the next pause is over, if a run rests.
    pub(crate) fn next_wake(&self) -> Option<Instant> {
        self.resting.values().min().copied()
    }

    /// Whether an operation can run now.
    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether a run has an operation that can run now or after a pause.
    pub(crate) fn has_work(&self, run: &TrainingRunId) -> bool {
        let lane = self.lanes.get(run);
        lane.is_some_and(|lane| !lane.waiting.is_empty() && !lane.is_stuck())
    }

    /// The runs whose operations waited longer than `patience` for one that did not arrive. The time
    /// counts while `is_there` says that somebody could still send it, and from the last arrival.
    pub(crate) fn out_of_patience(
        &mut self,
        now: Instant,
        patience: Duration,
        is_there: impl Fn(&TrainingRunId) -> bool,
    ) -> Vec<TrainingRunId> {
        let mut over = Vec::new();
        for (run, lane) in self.lanes.iter_mut().filter(|(_, lane)| lane.is_stuck()) {
            if !is_there(run) {
                lane.patient_since = None;
                continue;
            }
            let since = *lane.patient_since.get_or_insert(now);
            if now.saturating_duration_since(since) >= patience {
                over.push(run.clone());
            }
        }
        over
    }

    /// The next number of a run behind which something waits, and whether its operation is missing.
    pub(crate) fn next_number(&self, run: &TrainingRunId) -> Option<(u64, bool)> {
        let lane = self.lanes.get(run)?;
        let is_missing = !lane.waiting.contains_key(&lane.next);
        (!lane.waiting.is_empty()).then_some((lane.next, is_missing))
    }

    /// Passes over the next number of a run that [`Self::out_of_patience`] named; its operation, if it is
    /// there.
    pub(crate) fn pass_over(&mut self, run: &TrainingRunId) -> Option<T> {
        let lane = self.lanes.get_mut(run)?;
        let operation = lane.waiting.remove(&lane.next);
        lane.next += 1;
        operation
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(name: &str) -> TrainingRunId {
        name.parse().unwrap()
    }

    fn drain(queue: &mut TrainQueue<()>) -> Vec<(String, u64)> {
        std::iter::from_fn(|| queue.pop())
            .map(|(run, seq, ())| (run.to_string(), seq))
            .collect()
    }

    #[test]
    fn holds_a_gap_until_it_is_filled() {
        let mut queue = TrainQueue::default();
        queue.push(&run("a"), 0, ());
        queue.push(&run("a"), 2, ());

        assert_eq!(drain(&mut queue), [("a".into(), 0)]);
        assert!(!queue.has_ready() && !queue.has_work(&run("a")));
        queue.push(&run("a"), 1, ());
        assert_eq!(drain(&mut queue), [("a".into(), 1), ("a".into(), 2)]);
    }

    #[test]
    fn runs_take_turns() {
        let mut queue = TrainQueue::default();
        for seq in 0..3 {
            queue.push(&run("a"), seq, ());
        }
        for seq in 0..2 {
            queue.push(&run("b"), seq, ());
        }

        let order = drain(&mut queue);

        let names: String = order.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, "ababa");
    }

    #[test]
    fn sessions_take_turns_however_many_runs_they_have() {
        let mut queue = TrainQueue::default();
        for seq in 0..2 {
            for name in ["a:train:0", "a:train:1", "a:train:2", "b:train:0"] {
                queue.push(&run(name), seq, ());
            }
        }

        let order = drain(&mut queue);

        let names: Vec<&str> = order.iter().map(|(name, _)| &name[..1]).collect();
        assert_eq!(names.concat(), "ababaaaa");
        let of_a: Vec<&str> = order
            .iter()
            .filter_map(|(name, _)| name.strip_prefix("a:train:"))
            .collect();
        assert_eq!(of_a.concat(), "012012");
    }

    #[test]
    fn keys_take_turns_however_many_sessions_they_have() {
        let mut queue = TrainQueue::default();
        for (owner, session) in [("ann", "a"), ("ann", "b"), ("ann", "c"), ("ben", "d")] {
            let run = run(&format!("{session}:train:0"));
            queue.open(&run, owner, 0);
            for seq in 0..3 {
                queue.push(&run, seq, ());
            }
        }

        let order = drain(&mut queue);

        let names: Vec<&str> = order.iter().map(|(name, _)| &name[..1]).collect();
        assert_eq!(names.concat(), "adbdcdabcabc");
    }

    #[test]
    fn patience_with_a_gap_counts_from_the_last_arrival_and_while_somebody_is_there() {
        let (mut queue, start) = (TrainQueue::default(), Instant::now());
        let at = |s| start + Duration::from_secs(s);
        let over = |queue: &mut TrainQueue<()>, s, is_there| {
            let patience = Duration::from_secs(60);
            !queue
                .out_of_patience(at(s), patience, |_| is_there)
                .is_empty()
        };
        queue.push(&run("a"), 1, ());

        assert!(!over(&mut queue, 0, true) && !over(&mut queue, 59, true));
        queue.push(&run("a"), 3, ());
        assert!(!over(&mut queue, 60, true), "another operation arrived");
        assert!(!over(&mut queue, 120, false), "the client went away");
        assert!(!over(&mut queue, 500, true) && !over(&mut queue, 559, true));
        assert!(over(&mut queue, 560, true));

        let mut passed = Vec::new();
        while let Some((seq, is_missing)) = queue.next_number(&run("a")) {
            assert_eq!(queue.pass_over(&run("a")).is_none(), is_missing);
            passed.push((seq, is_missing));
        }
        assert_eq!(passed, [(0, true), (1, false), (2, true), (3, false)]);
        queue.push(&run("a"), 4, ());
        assert_eq!(drain(&mut queue), [("a".into(), 4)]);
    }

    #[test]
    fn what_was_done_is_not_done_again() {
        let mut queue = TrainQueue::default();
        queue.open(&run("a"), "", 5);
        queue.push(&run("a"), 4, ());
        queue.push(&run("a"), 5, ());
        queue.push(&run("a"), 5, ());

        assert_eq!(drain(&mut queue), [("a".into(), 5)]);
    }

    #[test]
    fn what_was_put_back_comes_again_first_and_after_a_pause() {
        let mut queue = TrainQueue::default();
        let start = Instant::now();
        let first = Duration::from_secs(1);
        for seq in 0..2 {
            queue.push(&run("a"), seq, ());
        }
        queue.push(&run("b"), 0, ());
        queue.pop();

        assert_eq!(queue.put_back(&run("a"), 0, (), start, first), first);
        queue.push(&run("a"), 0, ());
        queue.push(&run("a"), 2, ());

        queue.wake(start + Duration::from_millis(999));
        assert_eq!(drain(&mut queue), [("b".into(), 0)]);
        assert!(queue.has_work(&run("a")));
        assert_eq!(queue.next_wake(), Some(start + first));
        queue.rouse(&run("a"));
        queue.rouse(&run("a"));
        let expected: Vec<_> = (0..3).map(|seq| ("a".to_owned(), seq)).collect();
        assert_eq!(drain(&mut queue), expected);
        assert_eq!(queue.next_wake(), None);
    }

    #[test]
    fn pauses_double_up_to_a_limit_and_start_anew_with_the_next_operation() {
        let mut queue = TrainQueue::default();
        let (mut now, first) = (Instant::now(), Duration::from_secs(1));
        queue.push(&run("a"), 0, ());
        queue.push(&run("a"), 1, ());

        let mut pauses = Vec::new();
        for _ in 0..40 {
            let (a, seq, ()) = queue.pop().unwrap();
            let pause = queue.put_back(&a, seq, (), now, first);
            pauses.push(pause.as_secs());
            now += pause;
            queue.wake(now);
        }

        assert_eq!(pauses[..7], [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(pauses[39], 30);
        queue.pop();
        let (a, seq, ()) = queue.pop().unwrap();
        assert_eq!(queue.put_back(&a, seq, (), now, first), first);
    }

    proptest! {
        #[test]
        fn any_order_of_arrival_runs_in_order(seqs in Just((0..12_u64).collect::<Vec<_>>()).prop_shuffle(), taken in 0_usize..12) {
            let mut queue = TrainQueue::default();
            let mut seen = Vec::new();
            for (i, &seq) in seqs.iter().enumerate() {
                queue.push(&run("a"), seq, ());
                if i == taken {
                    seen.extend(drain(&mut queue));
                }
            }
            seen.extend(drain(&mut queue));

            let order: Vec<u64> = seen.into_iter().map(|(_, seq)| seq).collect();
            prop_assert_eq!(order, (0..12).collect::<Vec<_>>());
        }
    }
}
