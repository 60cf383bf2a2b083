//! Linear layers with LoRA: frozen weights for all rows, an adapter for each run of rows.

mod shared;

use std::ops::Range;

pub(crate) use self::shared::Layers;
use super::elementwise;
use super::gemm::{Cols, Product, Products, Rounding, Rows, Store, is_tall, matmul, matmul_on};
use super::lora::{Adapter, Group, Lora};
use super::model::{Linear, Units};
use super::pool::Pool;
use super::tile;

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
    /// Whether a backward pass follows. If not, results are those of sampling, bit for bit.
    pub(crate) trains: bool,
}

/// Consecutive rows of one adapter.
pub(crate) type Run<'a> = crate::runs::Run<'a, Adapter>;

/// Which layers of the model these are, to find their LoRA modules.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Site {
    Block(usize, Group),
    /// Of one of a block's experts.
    Expert(usize, usize, Group),
    Head,
    /// Layers that have no modules.
    Frozen,
}

/// Linear layers that read the same input.
#[derive(Debug)]
pub(crate) struct Forward<'a> {
    pub(crate) site: Site,
    /// Input, `[rows, width]`.
    pub(crate) x: &'a [f32],
    pub(crate) width: usize,
    /// `[rows, layers * rank]`: `scale * A x` of all layers, which the backward pass reads.
    pub(crate) u: &'a mut [f32],
}

/// One of the layers and its output, `[rows, out]`.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    pub(crate) linear: &'a Linear,
    pub(crate) y: &'a mut [f32],
}

impl Site {
    fn lora<'a>(self, adapter: Option<&'a Adapter>) -> Option<Lora<'a>> {
        match self {
            Self::Block(layer, group) => adapter?.group(layer, group),
            Self::Expert(layer, expert, group) => adapter?.expert(layer, expert, group),
            Self::Head => adapter?.head(),
            Self::Frozen => None,
        }
    }
}

impl Batch<'_> {
    fn matmul<'a>(&self, m: usize, k: usize, a: Rows<'a>, products: &mut [Product<'a>]) {
        match self.pool {
            Some(pool) => matmul_on(pool, m, k, a, products),
            None => matmul(m, k, a, products),
        }
    }

    fn weights<'l>(&self, linear: &'l Linear) -> Cols<'l> {
        if self.trains {
            linear.training()
        } else {
            linear.inference()
        }
    }

    /// Which units compute with the adapter of these layers.
    fn units(&self, outputs: &[Output<'_>]) -> Units {
        match outputs {
            [output, ..] if self.trains => output.linear.units,
            _ => Units::Vectors,
        }
    }

    /// Computes `y = W x + b + scale * B A x` of each layer.
    pub(crate) fn forward(&self, mut of: Forward<'_>, outputs: &mut [Output<'_>]) {
        if let Some(pool) = self.pool
            && !is_tall(self.rows, pool)
        {
            return shared::forward(self, pool, of, outputs);
        }
        self.base(&mut of, outputs);
        let units = self.units(outputs);
        for run in self.runs {
            if let Some(lora) = of.site.lora(run.adapter) {
                let u = &mut of.u[run.rows.start * outputs.len() * self.rank..];
                let u = &mut u[..run.rows.len() * lora.width()];
                if self.runs.len() > 1 {
                    let x = &of.x[run.rows.start * of.width..];
                    let x = input(outputs, x, of.width);
                    let down = lora.down_product(units, of.width, &mut *u);
                    self.matmul(run.rows.len(), of.width, x, &mut [down]);
                }
                elementwise::scale(lora.scale, u);
                self.up(&run.rows, &lora, u, outputs);
            }
        }
    }

    /// Computes `u = scale * A x` alone, with the bits of [`Batch::forward`] into `linear`.
    pub(crate) fn adapter_input(&self, of: Forward<'_>, linear: &Linear) {
        let units = if self.trains {
            linear.units
        } else {
            Units::Vectors
        };
        for run in self.runs {
            if let Some(lora) = of.site.lora(run.adapter) {
                let u = &mut of.u[run.rows.start * self.rank..];
                let u = &mut u[..run.rows.len() * lora.width()];
                let x = linear.rows(&of.x[run.rows.start * of.width..], of.width);
                let down = lora.down_product(units, of.width, &mut *u);
                self.matmul(run.rows.len(), of.width, x, &mut [down]);
                elementwise::scale(lora.scale, u);
            }
        }
    }

    /// `y = W x + b`, and with one adapter for all rows also `u = A x`, which shares the packing of `x`.
    fn base(&self, of: &mut Forward<'_>, outputs: &mut [Output<'_>]) {
        let mut products = Products::new();
        let units = self.units(outputs);
        let x = input(outputs, of.x, of.width);
        for output in outputs.iter_mut() {
            let right = self.weights(output.linear);
            products.push(Product::new(right, output.y, right.n(), Store::Replace));
        }
        if let [run] = self.runs
            && let Some(lora) = of.site.lora(run.adapter)
        {
            products.push(lora.down_product(units, of.width, &mut *of.u));
        }
        self.matmul(self.rows, of.width, x, &mut products);
        drop(products);
        for output in outputs {
            if let Some(bias) = &output.linear.bias {
                elementwise::add_bias(bias, output.y);
            }
        }
    }

    /// `y += u B^T` of each layer, for some rows.
    fn up(&self, rows: &Range<usize>, lora: &Lora<'_>, u: &[f32], outputs: &mut [Output<'_>]) {
        let units = self.units(outputs);
        for (i, output) in outputs.iter_mut().enumerate() {
            let place = lora.b_place(i);
            let out = place.out;
            let y = &mut output.y[rows.start * out..];
            let right = Cols::row_major(lora.b_t(i), lora.rank, out, place.stride);
            let right = units.on(right);
            let left = Rows::RowMajor {
                data: &u[lora.column(i)..],
                stride: lora.width(),
            };
            let product = Product::new(right, y, out, Store::Add);
            self.matmul(rows.len(), lora.rank, left, &mut [product]);
        }
    }
}

/// The input of layers, `[rows, width]`, as left factor.
fn input<'a>(outputs: &[Output<'_>], x: &'a [f32], width: usize) -> Rows<'a> {
    match outputs {
        [output, ..] => output.linear.rows(x, width),
        [] => Rows::row_major(x, width),
    }
}

impl Lora<'_> {
    /// `u = x A^T`, `u [rows, layers * rank]`.
    fn down_product<'c>(&self, units: Units, width: usize, u: &'c mut [f32]) -> Product<'c>
    where
        Self: 'c,
    {
        let n = self.width();
        let right = units.on(Cols::row_major(self.a_t, width, n, n));
        Product::new(right, u, n, Store::Replace)
    }
}

/// The transpose of `[rows, n]` as left factor. Vectors read it as it lies; units that round take rows.
struct Turned<'a> {
    data: &'a [f32],
    n: usize,
    turned: Option<Vec<f32>>,
}

impl<'a> Turned<'a> {
    fn new(data: &'a [f32], n: usize, rounding: Rounding) -> Self {
        let turned = rounding.rounds().then(|| tile::transposed(data, n));
        Self { data, n, turned }
    }

    /// Its rows from `first` on.
    fn rows(&self, first: usize) -> Rows<'_> {
        match &self.turned {
            Some(turned) => {
                let rows = self.data.len() / self.n;
                Rows::row_major(&turned[first * rows..], rows)
            }
            None => Rows::transposed(&self.data[first..], self.n),
        }
    }
}

/// What the backward pass of linear layers with the same input reads.
#[derive(Debug)]
pub(crate) struct Backward<'a> {
    pub(crate) lora: Option<Lora<'a>>,
    /// Input, `[rows, in]`.
    pub(crate) x: &'a [f32],
    /// `scale * A x` from the forward pass, `[rows, layers * rank]`.
    pub(crate) u: &'a [f32],
    /// Each layer, with the gradient of its output, `[rows, out]`.
    pub(crate) layers: &'a [(&'a Linear, &'a [f32])],
}

impl Backward<'_> {
    fn units(&self) -> Units {
        self.layers
            .first()
            .map_or(Units::Vectors, |(linear, _)| linear.units)
    }

    fn rounding(&self) -> Rounding {
        let first = self.layers.first();
        first.map_or(Rounding(None), |(linear, _)| linear.rounding())
    }

    /// Adds the gradients of `A` and `B` to `gradient` (flat, of the whole adapter) and writes that of
    /// `x` to `dx`, unless nothing below needs it. `du` is scratch, `[rows, layers * rank]`.
    pub(crate) fn run(
        &self,
        rows: usize,
        mut dx: Option<&mut [f32]>,
        gradient: &mut [f32],
        du: &mut [f32],
    ) {
        for (i, (linear, dy)) in self.layers.iter().enumerate() {
            let weights = linear.backward();
            let out = weights.k();
            let mut products = Products::new();
            if let Some(dx) = &mut dx {
                let store = if i == 0 { Store::Replace } else { Store::Add };
                products.push(Product::new(weights, dx, weights.n(), store));
            }
            if let Some(lora) = &self.lora {
                let right = linear
                    .units
                    .on(Cols::row_major(lora.b(i), out, lora.rank, lora.rank));
                let du = &mut du[lora.column(i)..];
                let store = if lora.joins(i) {
                    Store::Add
                } else {
                    Store::Replace
                };
                products.push(Product::new(right, du, lora.width(), store));
            }
            matmul(rows, out, linear.rows(dy, out), &mut products);
        }
        if let Some(lora) = &self.lora {
            let du = &mut du[..rows * lora.width()];
            elementwise::scale(lora.scale, du);
            self.run_lora(lora, rows, dx, gradient, du);
        }
    }

    /// `dB_i^T += u_i^T dy_i`, `dA += du^T x`, `dx += du A`.
    fn run_lora(
        &self,
        lora: &Lora<'_>,
        rows: usize,
        dx: Option<&mut [f32]>,
        gradient: &mut [f32],
        du: &[f32],
    ) {
        let (n, rank) = (lora.width(), lora.rank);
        let inner = lora.a.len() / n;
        let rounding = self.rounding();
        let u = Turned::new(&self.u[..rows * n], n, rounding);
        for (i, (_, dy)) in self.layers.iter().enumerate() {
            let place = lora.b_place(i);
            let right = Cols::row_major(dy, rows, place.out, place.out);
            let (left, right) = rounding.of(u.rows(lora.column(i)), right);
            let product = Product::new(right, place.of(gradient), place.stride, Store::Add);
            matmul(rank, rows, left, &mut [product]);
        }
        let du_t = Turned::new(du, n, rounding);
        let right = Cols::row_major(self.x, rows, inner, inner);
        let (left, right) = rounding.of(du_t.rows(0), right);
        let product = Product::new(right, lora.a_gradient(gradient), inner, Store::Add);
        matmul(n, rows, left, &mut [product]);
        if let Some(dx) = dx {
            let right = self.units().on(Cols::row_major(lora.a, n, inner, inner));
            let product = Product::new(right, dx, inner, Store::Add);
            matmul(rows, n, Rows::row_major(du, n), &mut [product]);
        }
    }
}
