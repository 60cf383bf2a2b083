//! Products whose parts several threads take.

use std::ops::Range;

use super::{Jobs, PANEL, Product, Rows, SCRATCH, SHARED_WORK, check_left, jobs, run};
use crate::cpu::buffer::Buffer;
use crate::cpu::pool::Pool;
use crate::cpu::simd::Isa;
use crate::cpu::tile::{Job, Unit, Wide};

/// Products with the same left factor whose panels or rows several threads may take.
pub(crate) struct Plan<'a> {
    m: usize,
    k: usize,
    a: Rows<'a>,
    jobs: Jobs,
    /// Keeps the copies that jobs point to.
    _tails: Buffer,
}

// SAFETY: what the pointers of the jobs reach is only touched in parts, by callers who promise that
// these do not overlap.
unsafe impl Sync for Plan<'_> {}
// SAFETY: as above.
unsafe impl Send for Plan<'_> {}

impl<'a> Plan<'a> {
    /// `A [m, k]` times each right factor, `m` and `k` at least 1.
    pub(crate) fn new(m: usize, k: usize, a: Rows<'a>, products: &mut [Product<'a>]) -> Self {
        check_left(m, k, a);
        let mut tails = Buffer::zeros(0);
        let jobs = jobs(m, k, a, products, &mut tails);
        Self {
            m,
            k,
            a,
            jobs,
            _tails: tails,
        }
    }

    /// Whether the work is worth the wake-up of a second thread.
    pub(crate) fn is_worth_sharing(&self) -> bool {
        self.m * self.k * self.n_panels() * PANEL >= SHARED_WORK
    }

    /// Parts to cut the panels into: no more than threads, as each begins with cold weights.
    pub(super) fn parts(&self, pool: &Pool) -> usize {
        self.n_panels().min(pool.threads())
    }

    /// The panels of part `part` of `parts`.
    pub(super) fn part(&self, part: usize, parts: usize) -> Range<usize> {
        let n = self.n_panels();
        n * part / parts..n * (part + 1) / parts
    }

    /// Bytes to read, or to widen, for a panel of the first product.
    pub(crate) fn panel_bytes(&self) -> usize {
        let of_tiles = |job: &Job| job.unit == Unit::Matrix && job.wide.is_none();
        let halved = self.jobs.first().is_some_and(of_tiles);
        self.k * PANEL * if halved { 2 } else { 4 }
    }

    /// Computes all columns of some rows.
    ///
    /// # Safety
    /// No other thread has these rows, and the outputs are still borrowed.
    pub(super) unsafe fn run_rows(&self, rows: Range<usize>) {
        let jobs = self.jobs.iter();
        let skip = |job: &Job| Job {
            c: job.c.wrapping_add(rows.start * job.stride),
            ..*job
        };
        let (jobs, a) = (jobs.map(skip).collect(), self.a.skip_rows(rows.start));
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: bounds were checked for all rows; the rest is up to the caller.
            unsafe { run(Isa::best(), rows.len(), self.k, a, jobs, scratch) };
        });
    }

    /// Computes a range of the panels of all products, counted one product after the other.
    ///
    /// # Safety
    /// No other thread has these panels, and the outputs are still borrowed.
    pub(crate) unsafe fn run_panels(&self, panels: Range<usize>) {
        let jobs = self.panels(panels);
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: bounds were checked for all panels; the rest is up to the caller.
            unsafe { run(Isa::best(), self.m, self.k, self.a, jobs, scratch) };
        });
    }

    /// Panels of all products.
    pub(crate) fn n_panels(&self) -> usize {
        self.jobs.iter().map(|job| job.n.div_ceil(PANEL)).sum()
    }

    fn panels(&self, wanted: Range<usize>) -> Jobs {
        let mut before = 0;
        let mut jobs = Jobs::new();
        for job in &self.jobs {
            let panels = job.n.div_ceil(PANEL);
            let start = wanted.start.saturating_sub(before).min(panels);
            let end = wanted.end.saturating_sub(before).min(panels);
            before += panels;
            if start < end {
                jobs.push(Job {
                    b: job.b.wrapping_add(start * job.panel_stride),
                    n: (end * PANEL).min(job.n) - start * PANEL,
                    c: job.c.wrapping_add(start * PANEL),
                    wide: job.wide.map(|wide| Wide {
                        first: wide.first + start,
                        ..wide
                    }),
                    ..*job
                });
            }
        }
        jobs
    }
}
