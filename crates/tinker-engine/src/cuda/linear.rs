//! Linear layers with LoRA: frozen weights for all rows, an adapter for each run of rows.

use super::adapter::{Adapter, Lora, Site};
use super::device::Number;
use super::memory::Floats;
use super::model::Linear;
use super::ops::{Job, Ops, Target, Weights};
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

/// The products of one run's adapter: `u = scale * A x`, then `y += u B^T` of each layer.
#[derive(Debug)]
struct Pair {
    rows: usize,
    first: Job,
    second: Vec<Job>,
}

impl Batch<'_> {
    /// Computes `y = W x + b + scale * B A x` of layers that read the same `x`; `u`, `[rows, layers *
    /// rank]`, becomes `scale * A x`, which the backward pass reads. Of a single layer, `y` is added to
    /// `onto`.
    pub(super) fn forward(
        &self,
        ops: &mut Ops,
        site: Site,
        (x, u, onto): (Floats, Floats, Option<Floats>),
        outputs: &[(&Linear, Floats)],
    ) -> Result<()> {
        let pairs = self.runs.iter().filter_map(|run| {
            let lora = run.adapter.and_then(|adapter| adapter.lora(site))?;
            let u = u.range(
                run.rows.start * outputs.len() * self.rank,
                run.rows.len() * lora.width(),
            );
            Some(run.pair(&lora, x, u, outputs))
        });
        let pairs = pairs.collect::<Vec<_>>();
        // What one adapter's rows begin with reads the same as the layers do.
        let along = match &pairs[..] {
            [pair] if pair.rows == self.rows && !self.trains => Some(pair.first),
            _ => None,
        };
        if self.trains {
            self.base_in_training(ops, (x, onto), outputs)?;
        } else {
            let layers = outputs.iter().map(|(linear, y)| Job {
                x,
                x_stride: linear.inner,
                w: linear.weights(),
                into: Target::rows(*y, linear.out).onto(onto),
            });
            let jobs: Vec<Job> = layers.chain(along).collect();
            ops.products(self.rows, &jobs)?;
        }
        for (linear, y) in outputs {
            if let Some(bias) = &linear.bias {
                ops.add_bias(self.rows, bias.floats(), *y)?;
            }
        }
        for pair in &pairs {
            if along.is_none() {
                self.products(ops, pair.rows, &[pair.first])?;
            }
            self.products(ops, pair.rows, &pair.second)?;
        }
        Ok(())
    }

    /// `y = W x`, by the device's own product.
    fn base_in_training(
        &self,
        ops: &mut Ops,
        (x, onto): (Floats, Option<Floats>),
        outputs: &[(&Linear, Floats)],
    ) -> Result<()> {
        let mut parts = None;
        for (linear, y) in outputs {
            let (weights, into) = (linear.weights(), Target::rows(*y, linear.out).onto(onto));
            let sizes = [self.rows, linear.out, linear.inner];
            let right = (weights.address, linear.inner, true);
            if weights.numbers == Number::F32 {
                ops.gemm(sizes, (x, linear.inner, false), right, into)?;
                continue;
            }
            let parts = match parts {
                Some(parts) => parts,
                None => *parts.insert(ops.split(self.rows * linear.inner, x)?),
            };
            ops.gemm_split(sizes, parts, right, into)?;
        }
        Ok(())
    }

    /// Products with weights of floats, by the device's own product in training alone.
    fn products(&self, ops: &mut Ops, rows: usize, jobs: &[Job]) -> Result<()> {
        if !self.trains {
            return ops.products(rows, jobs);
        }
        jobs.iter().try_for_each(|job| {
            let (w, left) = (&job.w, (job.x, job.x_stride, false));
            let right = (w.address, w.stride, !w.turned);
            ops.gemm([rows, w.n, w.inner], left, right, job.into)
        })
    }
}

impl Run<'_> {
    /// The products of its adapter; `x` is of all rows, `u` its own.
    fn pair(&self, lora: &Lora<'_>, x: Floats, u: Floats, outputs: &[(&Linear, Floats)]) -> Pair {
        let (rows, n, inner) = (self.rows.len(), lora.width(), lora.inner());
        let a = Weights {
            address: lora.a().address(),
            numbers: Number::F32,
            n,
            inner,
            stride: inner,
            turned: false,
        };
        let second = outputs.iter().enumerate().map(|(i, (linear, y))| {
            let b = lora.b(i);
            let y = y.range(self.rows.start * linear.out, rows * linear.out);
            Job {
                x: u.from(lora.column(i)),
                x_stride: n,
                w: Weights {
                    address: b.floats.address(),
                    numbers: Number::F32,
                    n: b.out,
                    inner: lora.rank,
                    stride: b.stride,
                    turned: true,
                },
                into: Target::rows(y, linear.out).adding(),
            }
        });
        Pair {
            rows,
            first: Job {
                x: x.from(self.rows.start * inner),
                x_stride: inner,
                w: a,
                into: Target::rows(u, n).scaled(lora.scale),
            },
            second: second.collect(),
        }
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
                let into = Target::rows(dx, linear.inner);
                let into = if i > 0 { into.adding() } else { into };
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
            let into = Target::rows(du.from(column), n).scaled(lora.scale);
            let into = if lora.joins(i) { into.adding() } else { into };
            let left = (*dy, out, false);
            ops.gemm(
                [rows, rank, out],
                left,
                (b.floats.address(), b.stride, true),
                into,
            )?;
            let b = lora.b_of(i, gradient);
            let into = Target::rows(b.floats, b.stride).adding();
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
