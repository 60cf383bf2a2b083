//! Linear layers with LoRA: frozen weights for all rows, an adapter for each run of rows.

use std::ops::Range;

use super::elementwise;
use super::gemm::{Cols, Product, Rows, Store, matmul, matmul_on};
use super::lora::{Adapter, Lora, Projection};
use super::model::Linear;
use super::pool::Pool;

/// Rows that go through a block together, and whose they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch<'a> {
    /// Number of rows.
    pub(crate) rows: usize,
    /// Consecutive runs of rows with the adapter they go through; together all rows.
    pub(crate) runs: &'a [Run<'a>],
    /// Padded rank that scratch is laid out for.
    pub(crate) rank: usize,
    /// Threads to share the work with; `None` where the caller is itself one of many workers.
    pub(crate) pool: Option<&'a Pool>,
}

/// Consecutive rows of one adapter.
#[derive(Debug, Clone)]
pub(crate) struct Run<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) adapter: Option<&'a Adapter>,
}

/// Which layer of the model a linear is, to find its LoRA module.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Site {
    Block(usize, Projection),
    Head,
}

/// One of several linear layers that read the same input.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    pub(crate) linear: &'a Linear,
    pub(crate) site: Site,
    /// `[rows, out]`.
    pub(crate) y: &'a mut [f32],
    /// `[rows, rank]`: `scale * A x`, which the backward pass reads.
    pub(crate) u: &'a mut [f32],
}

impl Run<'_> {
    fn lora(&self, site: Site) -> Option<Lora<'_>> {
        match site {
            Site::Block(layer, projection) => self.adapter?.lora(layer, projection),
            Site::Head => self.adapter?.head(),
        }
    }
}

impl Batch<'_> {
    fn matmul(&self, m: usize, k: usize, a: Rows<'_>, products: &mut [Product<'_>]) {
        match self.pool {
            Some(pool) => matmul_on(pool, m, k, a, products),
            None => matmul(m, k, a, products),
        }
    }

    /// Computes `y = W x + b + scale * B A x` for each output; `x` is `[rows, width]`.
    pub(crate) fn forward(&self, x: &[f32], width: usize, outputs: &mut [Output<'_>]) {
        match self.runs {
            // With one adapter for all rows, its `A` shares the packing of `x` with the weights.
            [run] => {
                let mut products = Vec::with_capacity(2 * outputs.len());
                for output in outputs.iter_mut() {
                    let right = output.linear.forward.cols();
                    let out = right.n();
                    products.push(Product::new(right, output.y, out, Store::Replace));
                    if let Some(lora) = run.lora(output.site) {
                        let right = Cols::row_major(lora.a_t, width, lora.rank, lora.rank);
                        products.push(Product::new(right, output.u, lora.rank, Store::Replace));
                    }
                }
                self.matmul(self.rows, width, Rows::row_major(x, width), &mut products);
            }
            runs => {
                let mut products: Vec<Product<'_>> = Vec::with_capacity(outputs.len());
                for output in outputs.iter_mut() {
                    let right = output.linear.forward.cols();
                    let out = right.n();
                    products.push(Product::new(right, output.y, out, Store::Replace));
                }
                self.matmul(self.rows, width, Rows::row_major(x, width), &mut products);
                for run in runs {
                    down_project(run, x, width, self.rank, outputs);
                }
            }
        }
        for output in outputs {
            if let Some(bias) = &output.linear.bias {
                elementwise::add_bias(bias, output.y);
            }
            for run in self.runs {
                self.up_project(run, output);
            }
        }
    }

    /// `y += u B^T` for one run.
    fn up_project(&self, run: &Run<'_>, output: &mut Output<'_>) {
        let Some(lora) = run.lora(output.site) else {
            return;
        };
        let rows = run.rows.len();
        let out = lora.b_t.len() / lora.rank;
        let u = &mut output.u[run.rows.start * self.rank..][..rows * lora.rank];
        elementwise::scale(lora.scale, u);
        let y = &mut output.y[run.rows.start * out..][..rows * out];
        let right = Cols::row_major(lora.b_t, lora.rank, out, out);
        let products = &mut [Product::new(right, y, out, Store::Add)];
        self.matmul(rows, lora.rank, Rows::row_major(u, lora.rank), products);
    }
}

/// `u = x A^T` for one run and each output.
fn down_project(run: &Run<'_>, x: &[f32], width: usize, rank: usize, outputs: &mut [Output<'_>]) {
    let rows = run.rows.len();
    let mut products = Vec::with_capacity(outputs.len());
    for output in outputs.iter_mut() {
        if let Some(lora) = run.lora(output.site) {
            let u = &mut output.u[run.rows.start * rank..];
            let right = Cols::row_major(lora.a_t, width, lora.rank, lora.rank);
            products.push(Product::new(right, u, lora.rank, Store::Replace));
        }
    }
    let x = &x[run.rows.start * width..][..rows * width];
    matmul(rows, width, Rows::row_major(x, width), &mut products);
}

/// What the backward pass of one linear layer reads and writes.
#[derive(Debug)]
pub(crate) struct Backward<'a> {
    pub(crate) linear: &'a Linear,
    pub(crate) lora: Option<Lora<'a>>,
    /// Input, `[rows, in]`.
    pub(crate) x: &'a [f32],
    /// `scale * A x` from the forward pass, `[rows, rank]`.
    pub(crate) u: &'a [f32],
    /// Gradient of the output, `[rows, out]`.
    pub(crate) dy: &'a [f32],
}

impl Backward<'_> {
    /// Adds the gradients of `A` and `B` to `gradient` (flat, of the whole adapter) and writes or
    /// adds the gradient of `x` to `dx`, unless nothing below needs it. `du` is scratch.
    pub(crate) fn run(
        &self,
        rows: usize,
        dx: Option<(&mut [f32], Store)>,
        gradient: &mut [f32],
        du: &mut [f32],
    ) {
        let weights = self.linear.backward().cols();
        let (out, inner) = (weights.k(), weights.n());
        let mut products = Vec::with_capacity(2);
        let wants_dx = dx.is_some();
        let (dx, store) = dx.unwrap_or((&mut [], Store::Add));
        if wants_dx {
            products.push(Product::new(weights, &mut *dx, inner, store));
        }
        let Some(lora) = self.lora else {
            return matmul(rows, out, Rows::row_major(self.dy, out), &mut products);
        };
        let rank = lora.rank;
        let du = &mut du[..rows * rank];
        let right = Cols::row_major(lora.b, out, rank, rank);
        products.push(Product::new(right, &mut *du, rank, Store::Replace));
        matmul(rows, out, Rows::row_major(self.dy, out), &mut products);
        elementwise::scale(lora.scale, du);
        let (da, db) = lora.gradients(gradient);
        // dB^T [rank, out] += u^T dy; dA [rank, in] += du^T x
        let right = Cols::row_major(self.dy, rows, out, out);
        let products = &mut [Product::new(right, db, out, Store::Add)];
        matmul(rank, rows, Rows::transposed(self.u, rank), products);
        let right = Cols::row_major(self.x, rows, inner, inner);
        let products = &mut [Product::new(right, da, inner, Store::Add)];
        matmul(rank, rows, Rows::transposed(du, rank), products);
        if wants_dx {
            let right = Cols::row_major(lora.a, rank, inner, inner);
            let products = &mut [Product::new(right, dx, inner, Store::Add)];
            matmul(rows, rank, Rows::row_major(du, rank), products);
        }
    }
}
