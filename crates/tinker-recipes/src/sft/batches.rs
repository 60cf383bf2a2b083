//! Which rows are trained when: a pure function of the row count, the batch size and the seed.

use crate::shuffle::permutation;

/// Stream 0 of the seed is the held-out split; epoch `e` is stream `e + 1`.
const FIRST_EPOCH_STREAM: u64 = 1;

/// The order of training.
///
/// Each epoch goes over every row once, in an order of its own; its last batch may be short. If
/// there are fewer rows than a batch holds, every batch is all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPlan {
    n_rows: usize,
    batch_size: usize,
    n_steps: u64,
    seed: u64,
}

/// The next batch to train: what a checkpoint must remember of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Batch in the epoch, from 0.
    pub batch: u64,
}

impl BatchPlan {
    /// A plan over `n_rows` rows, at least 1 each of rows and `batch_size`.
    pub(crate) fn new(
        n_rows: usize,
        batch_size: usize,
        n_epochs: u64,
        max_steps: Option<u64>,
        seed: u64,
    ) -> Self {
        let (n_rows, batch_size) = (n_rows.max(1), batch_size.max(1));
        let mut plan = Self {
            n_rows,
            batch_size,
            n_steps: 0,
            seed,
        };
        let all = n_epochs.saturating_mul(plan.batches_per_epoch());
        plan.n_steps = max_steps.map_or(all, |max| max.min(all));
        plan
    }

    /// Optimizer steps of the whole run.
    pub fn n_steps(&self) -> u64 {
        self.n_steps
    }

    /// Batches that one pass over the data takes, the short last one included.
    pub fn batches_per_epoch(&self) -> u64 {
        self.n_rows.div_ceil(self.batch_size) as u64
    }

    /// Where `step` is in the data.
    pub fn cursor(&self, step: u64) -> Cursor {
        let per_epoch = self.batches_per_epoch();
        Cursor {
            epoch: step / per_epoch,
            batch: step % per_epoch,
        }
    }

    /// The step at `cursor`.
    pub fn step(&self, cursor: Cursor) -> u64 {
        cursor
            .epoch
            .saturating_mul(self.batches_per_epoch())
            .saturating_add(cursor.batch)
    }

    /// The rows of `step`, as indices into the training rows.
    pub(crate) fn rows(&self, step: u64) -> Vec<usize> {
        let cursor = self.cursor(step);
        let order = permutation(self.n_rows, self.seed, FIRST_EPOCH_STREAM + cursor.epoch);
        let start = (cursor.batch as usize).saturating_mul(self.batch_size);
        order
            .into_iter()
            .skip(start)
            .take(self.batch_size)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_trains_every_row_once_and_keeps_the_tail() {
        let plan = BatchPlan::new(10, 4, 2, None, 7);
        assert_eq!((plan.batches_per_epoch(), plan.n_steps()), (3, 6));

        for epoch in 0..2 {
            let batches: Vec<_> = (0..3).map(|batch| plan.rows(epoch * 3 + batch)).collect();
            assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
            let mut rows = batches.concat();
            rows.sort_unstable();
            assert_eq!(rows, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(plan.rows(0), plan.rows(3));
    }

    #[test]
    fn fewer_rows_than_a_batch_still_train() {
        let plan = BatchPlan::new(3, 128, 2, None, 0);

        assert_eq!(plan.n_steps(), 2);
        assert_eq!(plan.rows(1).len(), 3);
    }

    #[test]
    fn max_steps_shortens_and_never_lengthens() {
        assert_eq!(BatchPlan::new(10, 4, 2, Some(4), 0).n_steps(), 4);
        assert_eq!(BatchPlan::new(10, 4, 2, Some(99), 0).n_steps(), 6);
    }

    #[test]
    fn cursor_and_step_are_inverse() {
        let plan = BatchPlan::new(10, 4, 2, None, 0);

        for step in 0..=plan.n_steps() {
            assert_eq!(plan.step(plan.cursor(step)), step);
        }
        assert_eq!(plan.cursor(4), Cursor { epoch: 1, batch: 1 });
    }
}
