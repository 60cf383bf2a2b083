//! Linear layers with LoRA: frozen weights for all rows, an adapter for each run of rows.

use super::adapter::{Adapter, Lora, Site};
use super::device::Number;
use super::memory::Floats;
use super::model::Linear;
use super::ops::{Ops, Target, Weights};
use crate::error::Result;

/// Rows that go through a block together, and whose they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batch<'a> {
    pub(super) rows: usize,
    /// Consecutive runs of rows with the adapter they go through; together all rows.
    pub(super) runs: &'a [Run<'a>],
    /// Padded rank that scratch is laid out for.
    pub(super) rank: usize,
    /// Whether a backward pass follows. If not, results are those of sampling, bit for bit.
    pub(super) trains: bool,
}

/// Consecutive rows of one adapter.
pub(super) type Run<'a> = crate::runs::Run<'a, Adapter>;

/// A row-major matrix of floats that a product reads or writes.
#[derive(Debug, Clone, Copy)]
struct View {
    floats: Floats,
    stride: usize,
}

impl Batch<'_> {
    /// Computes `y = W x + b + scale * B A x` of layers that read the same `x`; `u`, `[rows, layers *
    /// rank]`, becomes `scale * A x`, which the backward pass reads.
    pub(super) fn forward(
        &self,
        ops: &mut Ops,
        site: Site,
        x: Floats,
        u: Floats,
        outputs: &[(&Linear, Floats)],
    ) -> Result<()> {
        self.base(ops, x, outputs)?;
        for run in self.runs {
            let Some(lora) = run.adapter.and_then(|adapter| adapter.lora(site)) else {
                continue;
            };
            let (rows, n, inner) = (run.rows.len(), lora.width(), lora.inner());
            let u = u.range(run.rows.start * outputs.len() * self.rank, rows * n);
            let x = View {
                floats: x.from(run.rows.start * inner),
                stride: inner,
            };
            let a = Weights {
                address: lora.a().address(),
                numbers: Number::F32,
                n,
                inner,
                stride: inner,
                turned: false,
            };
            self.product(ops, rows, x, a, Target::rows(u, n).scaled(lora.scale))?;
            for (i, (linear, y)) in outputs.iter().enumerate() {
                let b = lora.b(i);
                let weights = Weights {
                    address: b.floats.address(),
                    numbers: Number::F32,
                    n: b.out,
                    inner: lora.rank,
                    stride: b.stride,
                    turned: true,
                };
                let left = View {
                    floats: u.from(lora.column(i)),
                    stride: n,
                };
                let y = y.range(run.rows.start * linear.out, rows * linear.out);
                self.product(
                    ops,
                    rows,
                    left,
                    weights,
                    Target::rows(y, linear.out).adding(),
                )?;
            }
        }
        Ok(())
    }

    /// `y = W x + b`.
    fn base(&self, ops: &mut Ops, x: Floats, outputs: &[(&Linear, Floats)]) -> Result<()> {
        let mut parts = None;
        for (linear, y) in outputs {
            let (weights, into) = (linear.weights(), Target::rows(*y, linear.out));
            if self.trains && weights.numbers == Number::Bf16 {
                let parts = match parts {
                    Some(parts) => parts,
                    None => *parts.insert(ops.split(self.rows * linear.inner, x)?),
                };
                let sizes = [self.rows, linear.out, linear.inner];
                ops.gemm_split(sizes, parts, (weights.address, linear.inner, true), into)?;
            } else {
                let x = View {
                    floats: x,
                    stride: linear.inner,
                };
                self.product(ops, self.rows, x, weights, into)?;
            }
            if let Some(bias) = &linear.bias {
                ops.add_bias(self.rows, bias.floats(), *y)?;
            }
        }
        Ok(())
    }

    /// A product with weights of floats, by the device's own product in training alone.
    fn product(&self, ops: &mut Ops, rows: usize, x: View, w: Weights, into: Target) -> Result<()> {
        if self.trains && w.numbers == Number::F32 {
            let sizes = [rows, w.n, w.inner];
            let right = (w.address, w.stride, !w.turned);
            return ops.gemm(sizes, (x.floats, x.stride, false), right, into);
        }
        ops.product(rows, (x.floats, x.stride), w, into)
    }
}

/// What the backward pass of linear layers with the same input reads.
#[derive(Debug)]
pub(super) struct Backward<'a> {
    pub(super) lora: Option<Lora<'a>>,
    /// Input, `[rows, in]`.
    pub(super) x: Floats,
    /// `scale * A x` from the forward pass, `[rows, layers * rank]`.
    pub(super) u: Floats,
    /// Each layer, with the gradient of its output, `[rows, out]`.
    pub(super) layers: &'a [(&'a Linear, Floats)],
}

impl Backward<'_> {
    /// Adds the gradients of `A` and `B` to `gradient` (flat, of the whole adapter) and writes that of
    /// `x` to `dx`, unless nothing below needs it. `du` is scratch, `[rows, layers * rank]`.
    pub(super) fn run(
        &self,
        ops: &mut Ops,
        rows: usize,
        dx: Option<Floats>,
        gradient: Floats,
        du: Floats,
    ) -> Result<()> {
        for (i, (linear, dy)) in self.layers.iter().enumerate() {
            if let Some(dx) = dx {
                let into = Target {
                    adds: i > 0,
                    ..Target::rows(dx, linear.inner)
                };
                let sizes = [rows, linear.inner, linear.out];
                let weights = linear.weights();
                let right = (weights.address, linear.inner, false);
                if weights.numbers == Number::Bf16 {
                    let parts = ops.split(rows * linear.out, *dy)?;
                    ops.gemm_split(sizes, parts, right, into)?;
                } else {
                    ops.gemm(sizes, (*dy, linear.out, false), right, into)?;
                }
            }
        }
        match &self.lora {
            Some(lora) => self.run_lora(ops, lora, rows, dx, gradient, du),
            None => Ok(()),
        }
    }

    /// `du_i = scale * dy_i B_i`, `dB_i^T += u_i^T dy_i`, `dA += du^T x`, `dx += du A`.
    fn run_lora(
        &self,
        ops: &mut Ops,
        lora: &Lora<'_>,
        rows: usize,
        dx: Option<Floats>,
        gradient: Floats,
        du: Floats,
    ) -> Result<()> {
        let (n, rank, inner) = (lora.width(), lora.rank, lora.inner());
        for (i, (linear, dy)) in self.layers.iter().enumerate() {
            let (b, out) = (lora.b(i), linear.out);
            let column = lora.column(i);
            let into = Target {
                floats: du.from(column),
                stride: n,
                scale: lora.scale,
                adds: lora.joins(i),
            };
            let left = (*dy, out, false);
            ops.gemm(
                [rows, rank, out],
                left,
                (b.floats.address(), b.stride, true),
                into,
            )?;
            let b = lora.b_of(i, gradient);
            let into = Target {
                floats: b.floats,
                stride: b.stride,
                scale: 1.0,
                adds: true,
            };
            let left = (self.u.from(column), n, true);
            ops.gemm([rank, out, rows], left, (dy.address(), out, false), into)?;
        }
        let into = Target::rows(lora.a_of(gradient), inner).adding();
        ops.gemm(
            [n, inner, rows],
            (du, n, true),
            (self.x.address(), inner, false),
            into,
        )?;
        if let Some(dx) = dx {
            let into = Target::rows(dx, inner).adding();
            let right = (lora.a().address(), inner, false);
            ops.gemm([rows, inner, n], (du, n, false), right, into)?;
        }
        Ok(())
    }
}
