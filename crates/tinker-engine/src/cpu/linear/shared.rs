//! Linear layers for a few rows, their columns shared among threads.
//!
//! Decoding has dozens of these per token, each of a few microseconds, so base and adapter go through
//! in one step: its first part also computes `u = A x` while the others stream the weights, and each
//! adds `B u` to its own columns.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use smallvec::SmallVec;

use super::{Batch, Forward, Output, Site};
use crate::cpu::elementwise;
use crate::cpu::gemm::{Cols, PANEL, Plan, Product, Products, Rows, Store, matmul};
use crate::cpu::model::Units;
use crate::cpu::pool::{Pool, SharedMut};
use crate::cpu::steps::{Step, wait_until};

/// As [`Batch::forward`], with the same bits.
pub(super) fn forward(batch: &Batch<'_>, pool: &Pool, of: Forward<'_>, outputs: &mut [Output<'_>]) {
    let outputs = outputs.iter_mut().map(|output| Output {
        linear: output.linear,
        y: &mut *output.y,
    });
    let layers = Layers::new(batch, of, outputs);
    let parts = if layers.is_worth_sharing() {
        pool.threads()
    } else {
        1
    };
    // SAFETY: a pool runs each of its tasks once, and begins them in their order.
    pool.run(parts, &|part| unsafe { layers.run(part, parts) });
}

/// The share of part `part` in `n` panels of so many bytes, where the first part has `before` bytes to read
/// besides.
fn split(n: usize, bytes: usize, before: usize, part: usize, parts: usize) -> Range<usize> {
    let all = before + n * bytes;
    let start = |part: usize| {
        let share = (all * part / parts).saturating_sub(before);
        ((share + bytes / 2) / bytes).min(n)
    };
    let first = if part == 0 { 0 } else { start(part) };
    first..if part + 1 == parts {
        n
    } else {
        start(part + 1)
    }
}

/// Tells the other parts to go on, even if this one panics.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// An output, `[rows, n]`, that parts share by columns.
struct Columns<'a> {
    y: SharedMut<f32>,
    n: usize,
    bias: Option<&'a [f32]>,
}

/// Linear layers whose columns threads share.
pub(crate) struct Layers<'a> {
    batch: &'a Batch<'a>,
    site: Site,
    width: usize,
    /// The input of all rows.
    x: Rows<'a>,
    u: SharedMut<f32>,
    /// Whether `u` is complete.
    ready: AtomicBool,
    outputs: SmallVec<[Columns<'a>; 4]>,
    plan: Plan<'a>,
}

impl Step for Layers<'_> {
    unsafe fn run(&self, part: usize, parts: usize) {
        if part == 0 {
            let _set = SetOnDrop(&self.ready);
            self.down();
        }
        let panels = self.panels(part, parts);
        if panels.is_empty() {
            return;
        }
        // SAFETY: parts are different panels, and the outputs are borrowed for as long as this lives.
        unsafe { self.plan.run_panels(panels.clone()) };
        // Part 0 was drawn before this one, so somebody is at it or will be, also if another part fails.
        wait_until(|| self.ready.load(Ordering::Acquire));
        self.finish(panels);
    }
}

impl<'a> Layers<'a> {
    /// Layers of a batch that no backward pass follows.
    pub(crate) fn new(
        batch: &'a Batch<'a>,
        of: Forward<'a>,
        outputs: impl IntoIterator<Item = Output<'a>>,
    ) -> Self {
        debug_assert!(!batch.trains, "training shares out sequences, not columns");
        let u = SharedMut::new(of.u);
        let mut x = Rows::row_major(of.x, of.width);
        let (mut shared, mut products) = (SmallVec::new(), Products::new());
        for output in outputs {
            // The same for all layers, as one input is split or rounded for all.
            x = output.linear.rows(of.x, of.width);
            let right = output.linear.inference();
            let y = SharedMut::new(output.y);
            // SAFETY: `y` is borrowed for as long as this lives; parts write different columns of it.
            products.push(unsafe { Product::shared(right, &y, 0, right.n(), Store::Replace) });
            let bias = output.linear.bias.as_deref();
            shared.push(Columns {
                y,
                n: right.n(),
                bias,
            });
        }
        Self {
            batch,
            site: of.site,
            width: of.width,
            x,
            u,
            ready: AtomicBool::new(false),
            outputs: shared,
            plan: Plan::new(batch.rows, of.width, x, &mut products),
        }
    }

    /// Whether the work is worth the wake-up of a second thread.
    pub(crate) fn is_worth_sharing(&self) -> bool {
        self.plan.is_worth_sharing()
    }

    /// The panels of a part: those of the first are fewer by what it reads for `u`.
    fn panels(&self, part: usize, parts: usize) -> Range<usize> {
        let loras = self.batch.runs.iter();
        let loras = loras.filter_map(|run| self.site.lora(run.adapter));
        let (down, up) = loras.fold((0, 0), |(down, up), lora| {
            (down + lora.width() * self.width, up + lora.rank * PANEL)
        });
        let [down, up] = [down, up].map(|floats| floats * size_of::<f32>());
        split(
            self.plan.n_panels(),
            self.plan.panel_bytes() + up,
            down,
            part,
            parts,
        )
    }

    /// Where a run's `u` starts.
    fn u_start(&self, rows: &Range<usize>) -> usize {
        rows.start * self.outputs.len() * self.batch.rank
    }

    /// `u = scale * A x` of every run.
    fn down(&self) {
        let width = self.width;
        for run in self.batch.runs {
            if let Some(lora) = self.site.lora(run.adapter) {
                let n = run.rows.len() * lora.width();
                // SAFETY: the others read `u` only after this is done.
                let u = unsafe { self.u.slice(self.u_start(&run.rows), n) };
                let x = self.x.skip_rows(run.rows.start);
                matmul(
                    run.rows.len(),
                    width,
                    x,
                    &mut [lora.down_product(Units::Vectors, width, &mut *u)],
                );
                elementwise::scale(lora.scale, u);
            }
        }
    }

    /// Adds bias and `B u` to the columns of some panels, counted as [`Plan`] counts them.
    fn finish(&self, panels: Range<usize>) {
        let mut before = 0;
        for (i, output) in self.outputs.iter().enumerate() {
            let n_panels = output.n.div_ceil(PANEL);
            let start = panels.start.saturating_sub(before).min(n_panels) * PANEL;
            let end = panels.end.saturating_sub(before) * PANEL;
            before += n_panels;
            let columns = start..end.min(output.n);
            if !columns.is_empty() {
                self.add_bias(output, &columns);
                self.up(i, output, columns);
            }
        }
    }

    fn add_bias(&self, output: &Columns<'_>, columns: &Range<usize>) {
        let Some(bias) = output.bias else { return };
        for row in 0..self.batch.rows {
            // SAFETY: the part that calls this has these columns.
            let y = unsafe {
                output
                    .y
                    .slice(row * output.n + columns.start, columns.len())
            };
            elementwise::add(&bias[columns.clone()], y);
        }
    }

    /// `y += u B^T` in some columns of layer `i`.
    fn up(&self, i: usize, output: &Columns<'_>, columns: Range<usize>) {
        for run in self.batch.runs {
            let Some(lora) = self.site.lora(run.adapter) else {
                continue;
            };
            let (rows, rank) = (run.rows.len(), lora.rank);
            // SAFETY: `u` is complete, and nobody writes to it any more.
            let u = unsafe { self.u.read(self.u_start(&run.rows), rows * lora.width()) };
            let b_t = &lora.b_t(i)[columns.start..];
            let right = Cols::row_major(b_t, rank, columns.len(), lora.b_place(i).stride);
            let start = run.rows.start * output.n + columns.start;
            // SAFETY: the part that calls this has these columns.
            let product = unsafe { Product::shared(right, &output.y, start, output.n, Store::Add) };
            let left = Rows::RowMajor {
                data: &u[lora.column(i)..],
                stride: lora.width(),
            };
            matmul(rows, rank, left, &mut [product]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_panels_once_and_read_about_as_much() {
        for n in [0, 1, 7, 22, 1000] {
            for before in [0, 30, 100, 5000] {
                for parts in 1..=9 {
                    let shares: Vec<_> =
                        (0..parts).map(|p| split(n, 10, before, p, parts)).collect();

                    let covered: Vec<usize> = shares.iter().cloned().flatten().collect();
                    assert_eq!(covered, (0..n).collect::<Vec<_>>());
                    let most = (before + 10 * n).div_ceil(parts).max(before) + 10;
                    assert!(before + 10 * shares[0].len() <= most);
                    assert!(shares[1..].iter().all(|share| 10 * share.len() <= most));
                }
            }
        }
    }
}
