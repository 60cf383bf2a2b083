//! Which training operation runs next: sessions in turn, the runs of a session in turn, each run strictly in its
//! own order. So what one session has queued does not hold up another's.

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

/// Things that wait, in the order they came for each session; sessions take turns.
#[derive(Debug)]
struct Turns<T> {
    lanes: HashMap<String, VecDeque<T>>,
    /// Sessions that something waits of, the one whose turn it is first.
    order: VecDeque<String>,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self {
            lanes: HashMap::new(),
            order: VecDeque::new(),
        }
    }
}

impl<T> Turns<T> {
    fn push(&mut self, session: &str, item: T) {
        if let Some(lane) = self.lanes.get_mut(session) {
            lane.push_back(item);
            return;
        }
        self.lanes.insert(session.to_owned(), [item].into());
        self.order.push_back(session.to_owned());
    }

    fn pop(&mut self) -> Option<T> {
        let session = self.order.pop_front()?;
        let lane = self.lanes.get_mut(&session)?;
        let item = lane.pop_front();
        if lane.is_empty() {
            self.lanes.remove(&session);
        } else {
            self.order.push_back(session);
        }
        item
    }

    /// Drops what `keep` is false for.
    fn retain(&mut self, session: &str, keep: impl FnMut(&T) -> bool) {
        let Some(lane) = self.lanes.get_mut(session) else {
            return;
        };
        lane.retain(keep);
        if lane.is_empty() {
            self.lanes.remove(session);
            self.order.retain(|other| other != session);
        }
    }

    fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

/// Operations that wait, held back while an earlier one of their run is missing, or for a while
/// after a fault. The time is the caller's.
#[derive(Debug)]
pub(crate) struct TrainQueue<T> {
    lanes: HashMap<TrainingRunId, Lane<T>>,
    /// Runs whose next operation is there.
    ready: Turns<TrainingRunId>,
    /// Runs whose next operation was put back, and when it is tried again.
    resting: HashMap<TrainingRunId, Instant>,
}

#[derive(Debug)]
struct Lane<T> {
    next: u64,
    waiting: BTreeMap<u64, T>,
    /// The operation that was put back last, and how often.
    put_back: Option<(u64, u32)>,
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
    /// Starts a run at its next operation; a run that is known stays where it is.
    pub(crate) fn open(&mut self, run: &TrainingRunId, next: u64) {
        self.lanes.entry(run.clone()).or_insert_with(|| Lane {
            next,
            waiting: BTreeMap::new(),
            put_back: None,
        });
    }

    /// Adds an operation. Operations of unknown runs start at 0; those already done are dropped.
    pub(crate) fn push(&mut self, run: &TrainingRunId, seq: u64, operation: T) {
        self.open(run, 0);
        let Some(lane) = self.lanes.get_mut(run) else {
            return;
        };
        if seq < lane.next || lane.waiting.contains_key(&seq) {
            return;
        }
        lane.waiting.insert(seq, operation);
        if seq == lane.next {
            self.ready.push(session_of(run.as_str()), run.clone());
        }
    }

    /// Takes the next operation of the run whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<(TrainingRunId, u64, T)> {
        let run = self.ready.pop()?;
        let lane = self.lanes.get_mut(&run)?;
        let seq = lane.next;
        let operation = lane.waiting.remove(&seq)?;
        lane.next += 1;
        if lane.waiting.contains_key(&lane.next) {
            self.ready.push(session_of(run.as_str()), run.clone());
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
        self.open(run, seq);
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
        self.ready
            .retain(session_of(run.as_str()), |ready| ready != run);
        let pause = pause_after(n_before, first);
        self.resting.insert(run.clone(), now + pause);
        pause
    }

    /// Makes the runs ready whose pause is over.
    pub(crate) fn wake(&mut self, now: Instant) {
        let due = self.resting.extract_if(|_, until| *until <= now);
        for (run, _) in due {
            self.ready.push(session_of(run.as_str()), run.clone());
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

    /// Whether a run has operations waiting, ready or held back.
    pub(crate) fn is_waiting(&self, run: &TrainingRunId) -> bool {
        self.lanes
            .get(run)
            .is_some_and(|lane| !lane.waiting.is_empty())
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
        assert!(!queue.has_ready() && queue.is_waiting(&run("a")));
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
    fn what_was_done_is_not_done_again() {
        let mut queue = TrainQueue::default();
        queue.open(&run("a"), 5);
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
        assert!(queue.is_waiting(&run("a")));
        assert_eq!(queue.next_wake(), Some(start + first));
        queue.wake(start + first);
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
