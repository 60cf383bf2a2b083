//! Linear layers for a few rows, their columns shared among threads.
//!
//! Decoding has dozens of these per token, each of a few microseconds, so base and adapter go through
//! in one parallel call: its first task computes `u = A x` while the others stream the weights, and
//! each adds `B u` to its own columns.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Batch, Forward, Output};
use crate::cpu::elementwise;
use crate::cpu::gemm::{Cols, PANEL, Plan, Product, Rows, Store, matmul};
use crate::cpu::model::Units;
use crate::cpu::pool::{Pool, SharedMut};

/// As [`Batch::forward`], with the same bits.
pub(super) fn forward(batch: &Batch<'_>, pool: &Pool, of: Forward<'_>, outputs: &mut [Output<'_>]) {
    debug_assert!(!batch.trains, "training shares out sequences, not columns");
    let u = SharedMut::new(of.u);
    let x = super::input(outputs, of.x, of.width);
    let mut shared = Vec::with_capacity(outputs.len());
    let mut products = Vec::with_capacity(outputs.len());
    for output in outputs.iter_mut() {
        let right = output.linear.inference();
        let y = SharedMut::new(output.y);
        // SAFETY: `y` is borrowed for this whole call; tasks write different columns of it.
        products.push(unsafe { Product::shared(right, &y, 0, right.n(), Store::Replace) });
        let bias = output.linear.bias.as_deref();
        shared.push(Columns {
            y,
            n: right.n(),
            bias,
        });
    }
    let plan = Plan::new(batch.rows, of.width, x, &mut products);
    let layers = Layers {
        batch,
        of: &of,
        x,
        u,
        outputs: shared,
    };
    let parts = if plan.is_worth_sharing() {
        plan.parts(pool)
    } else {
        1
    };
    let ready = AtomicBool::new(false);
    pool.run(parts + 1, &|task| {
        let Some(part) = task.checked_sub(1) else {
            let _set = SetOnDrop(&ready);
            layers.down();
            return;
        };
        let panels = plan.part(part, parts);
        // SAFETY: parts are different panels, and `y` is borrowed for the whole call.
        unsafe { plan.run_panels(panels.clone()) };
        // Task 0 was taken before this one, so somebody is at it.
        while !ready.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        layers.finish(panels);
    });
}

/// Tells the other tasks to go on, even if this one panics.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// An output, `[rows, n]`, that tasks share by columns.
struct Columns<'a> {
    y: SharedMut<f32>,
    n: usize,
    bias: Option<&'a [f32]>,
}

struct Layers<'a> {
    batch: &'a Batch<'a>,
    of: &'a Forward<'a>,
    /// The input of all rows.
    x: Rows<'a>,
    u: SharedMut<f32>,
    outputs: Vec<Columns<'a>>,
}

impl Layers<'_> {
    /// Where a run's `u` starts.
    fn u_start(&self, rows: &Range<usize>) -> usize {
        rows.start * self.outputs.len() * self.batch.rank
    }

    /// `u = scale * A x` of every run.
    fn down(&self) {
        let width = self.of.width;
        for run in self.batch.runs {
            if let Some(lora) = self.of.site.lora(run.adapter) {
                let n = run.rows.len() * lora.width();
                // SAFETY: the others read `u` only after this task is done.
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
            // SAFETY: the task that calls this has these columns.
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
            let Some(lora) = self.of.site.lora(run.adapter) else {
                continue;
            };
            let (rows, rank) = (run.rows.len(), lora.rank);
            // SAFETY: `u` is complete, and nobody writes to it any more.
            let u = unsafe { self.u.read(self.u_start(&run.rows), rows * lora.width()) };
            let b_t = &lora.b_t(i)[columns.start..];
            let right = Cols::row_major(b_t, rank, columns.len(), lora.b_place(i).stride);
            let start = run.rows.start * output.n + columns.start;
            // SAFETY: the task that calls this has these columns.
            let product = unsafe { Product::shared(right, &output.y, start, output.n, Store::Add) };
            let left = Rows::RowMajor {
                data: &u[lora.column(i)..],
                stride: lora.width(),
            };
            matmul(rows, rank, left, &mut [product]);
        }
    }
}
