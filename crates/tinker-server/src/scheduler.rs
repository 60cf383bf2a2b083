//! Which training operation runs next: each run strictly in its own order, runs in turn.

use std::collections::{BTreeMap, HashMap, VecDeque};

use tinker_types::TrainingRunId;

/// Operations that wait, held back while an earlier one of their run is missing.
#[derive(Debug)]
pub(crate) struct TrainQueue<T> {
    lanes: HashMap<TrainingRunId, Lane<T>>,
    /// Runs whose next operation is there, longest waiting first.
    ready: VecDeque<TrainingRunId>,
}

#[derive(Debug)]
struct Lane<T> {
    next: u64,
    waiting: BTreeMap<u64, T>,
}

impl<T> Default for TrainQueue<T> {
    fn default() -> Self {
        Self {
            lanes: HashMap::new(),
            ready: VecDeque::new(),
        }
    }
}

impl<T> TrainQueue<T> {
    /// Starts a run at its next operation; a run that is known stays where it is.
    pub(crate) fn open(&mut self, run: &TrainingRunId, next: u64) {
        self.lanes.entry(run.clone()).or_insert_with(|| Lane {
            next,
            waiting: BTreeMap::new(),
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
            self.ready.push_back(run.clone());
        }
    }

    /// Takes the next operation of the run whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<(TrainingRunId, u64, T)> {
        let run = self.ready.pop_front()?;
        let lane = self.lanes.get_mut(&run)?;
        let seq = lane.next;
        let operation = lane.waiting.remove(&seq)?;
        lane.next += 1;
        if lane.waiting.contains_key(&lane.next) {
            self.ready.push_back(run.clone());
        }
        Some((run, seq, operation))
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
    fn what_was_done_is_not_done_again() {
        let mut queue = TrainQueue::default();
        queue.open(&run("a"), 5);
        queue.push(&run("a"), 4, ());
        queue.push(&run("a"), 5, ());
        queue.push(&run("a"), 5, ());

        assert_eq!(drain(&mut queue), [("a".into(), 5)]);
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
