//! Attention of new rows to the caches of their sequences.

use super::Cache;
use crate::arch::Arch;
use crate::cpu::attention::{self, Heads, KeysValues};
use crate::cpu::block::Activations;
use crate::cpu::pool::{Pool, SharedMut};
use crate::cpu::steps::Step;

/// Rows of an attention task.
const TASK_ROWS: usize = 48;

/// Multiply-adds from which on sharing them among threads pays.
const SHARED_WORK: usize = 1 << 14;

/// A sequence that rows are appended to.
#[derive(Debug)]
pub(super) struct History<'a> {
    /// Tokens before the new ones.
    pub(super) len: usize,
    /// New ones.
    pub(super) rows: usize,
    /// Keys and values of each layer.
    pub(super) layers: &'a mut [Cache],
}

/// Rows of one sequence.
#[derive(Debug)]
struct Task<'a> {
    /// First of the rows, and how many.
    row: usize,
    n: usize,
    /// Position of the first.
    first: usize,
    cache: &'a Cache,
}

/// Attention in one layer, whose tasks and heads threads share.
#[derive(Debug)]
pub(super) struct Attention<'a> {
    heads: Heads,
    tasks: Vec<Task<'a>>,
    /// Multiply-adds.
    work: usize,
    q: &'a [f32],
    out: SharedMut<f32>,
}

impl<'a> Attention<'a> {
    /// Appends the new keys and values of each sequence to its cache, to attend to it.
    pub(super) fn new(
        arch: &Arch,
        layer: usize,
        histories: &'a mut [History<'_>],
        acts: &'a mut Activations,
    ) -> Self {
        let heads = Heads::of_layer(arch, layer);
        let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
        let mut tasks = Vec::with_capacity(histories.len());
        let (mut work, mut row) = (0, 0);
        for history in histories {
            let (len, rows) = (history.len, history.rows);
            let cache = &mut history.layers[layer];
            let new = row * kv_width..(row + rows) * kv_width;
            heads.pack_keys(&acts.k[new.clone()], len, &mut cache.keys);
            cache.values[len * kv_width..][..rows * kv_width].copy_from_slice(&acts.v[new]);
            for start in (0..rows).step_by(TASK_ROWS) {
                let n = TASK_ROWS.min(rows - start);
                tasks.push(Task {
                    row: row + start,
                    n,
                    first: len + start,
                    cache: &*cache,
                });
                work += n * heads.reach(len + start, n) * q_width;
            }
            row += rows;
        }
        Self {
            heads,
            tasks,
            work,
            q: &acts.q,
            out: SharedMut::new(&mut acts.attended),
        }
    }

    pub(super) fn is_worth_sharing(&self) -> bool {
        self.work >= SHARED_WORK
    }

    /// Attends with the threads of `pool`.
    pub(super) fn run_on(&self, pool: &Pool) {
        // SAFETY: each task is taken once.
        let attend = |i: usize| unsafe { self.attend(i) };
        if self.is_worth_sharing() {
            pool.run(self.n_tasks(), &attend);
        } else {
            (0..self.n_tasks()).for_each(attend);
        }
    }

    fn n_tasks(&self) -> usize {
        self.tasks.len() * self.heads.n_kv
    }

    /// The heads of one key head, of the rows of one task.
    ///
    /// # Safety
    /// Nobody else is at these.
    unsafe fn attend(&self, i: usize) {
        let heads = &self.heads;
        let task = &self.tasks[i / heads.n_kv];
        let kv = KeysValues {
            keys: &task.cache.keys,
            values: &task.cache.values,
        };
        let mut log = [0.0; TASK_ROWS];
        let (start, kv_head) = (task.row * heads.q_width(), i % heads.n_kv);
        let group = heads.n / heads.n_kv;
        for head in kv_head * group..(kv_head + 1) * group {
            let (q, out, log) = (&self.q[start..], (&self.out, start), &mut log[..task.n]);
            // SAFETY: tasks write different rows or heads of the output, which outlives them.
            unsafe { attention::forward(heads, head, task.first, q, kv, out, log) };
        }
    }
}

impl Step for Attention<'_> {
    unsafe fn run(&self, part: usize, parts: usize) {
        // In turns: the heads of a long sequence are not one thread's alone.
        for i in (part..self.n_tasks()).step_by(parts) {
            // SAFETY: no other part has this task.
            unsafe { self.attend(i) };
        }
    }
}
