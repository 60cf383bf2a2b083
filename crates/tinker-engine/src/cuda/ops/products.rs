//! Products of matrices: by own kernels, whose rows do not see each other, and by the device's.

use super::{Ops, ROW_THREADS, address, fits, u32_arg, u64_arg};
use crate::cuda::device::{Arg, Gemm, Matrix, Number};
use crate::cuda::memory::{Buffer, Floats};
use crate::error::Result;

/// Inner dimension of a segment of a product, and rows and columns of blocks, as the kernels have them.
const SEGMENT: usize = 256;
const WIDE: usize = 64;
const WIDE_COLUMNS: usize = 64;
const NARROW: usize = 8;
const NARROW_COLUMNS: usize = 32;

/// Rows up to which products go through the narrow kernel.
const FEW_ROWS: usize = 64;

/// Products of one launch of it.
const AT_ONCE: usize = 4;

/// Blocks from which on a GPU has enough to do without more for the segments of a product.
const MANY_BLOCKS: usize = 1024;

/// A right factor: `[n, inner]` in memory, or `[inner, n]` if it is turned.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct Weights {
    pub(in crate::cuda) address: u64,
    pub(in crate::cuda) numbers: Number,
    pub(in crate::cuda) n: usize,
    pub(in crate::cuda) inner: usize,
    /// Distance of rows in memory.
    pub(in crate::cuda) stride: usize,
    pub(in crate::cuda) turned: bool,
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct Target {
    pub(in crate::cuda) floats: Floats,
    pub(in crate::cuda) stride: usize,
    pub(in crate::cuda) scale: f32,
    /// What it is added to, laid out as the result; may be what is there.
    pub(in crate::cuda) onto: Option<Floats>,
}

impl Target {
    /// Rows of `n`, replaced.
    pub(in crate::cuda) fn rows(floats: Floats, n: usize) -> Self {
        Self {
            floats,
            stride: n,
            scale: 1.0,
            onto: None,
        }
    }

    /// The same, added to.
    pub(in crate::cuda) fn adding(self) -> Self {
        self.onto(Some(self.floats))
    }

    /// The same, as a sum with something else.
    pub(in crate::cuda) fn onto(self, onto: Option<Floats>) -> Self {
        Self { onto, ..self }
    }

    fn onto_arg(&self) -> Arg {
        Arg::Address(self.onto.map_or(0, Floats::address))
    }

    pub(in crate::cuda) fn scaled(self, scale: f32) -> Self {
        Self { scale, ..self }
    }
}

/// The floats that rows of `n`, `stride` apart, span.
fn span(rows: usize, n: usize, stride: usize) -> usize {
    rows.checked_sub(1).map_or(0, |rows| rows * stride + n)
}

/// A product `into = scale * x W^T`.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct Job {
    pub(in crate::cuda) x: Floats,
    /// Distance of rows of `x`.
    pub(in crate::cuda) x_stride: usize,
    pub(in crate::cuda) w: Weights,
    pub(in crate::cuda) into: Target,
}

impl Job {
    /// As the narrow kernel takes it.
    fn args(&self) -> Result<[Arg; 11]> {
        let is_bf16 = usize::from(self.w.numbers == Number::Bf16);
        Ok([
            address(self.x),
            u64_arg(self.x_stride),
            Arg::Address(self.w.address),
            u64_arg(self.w.stride),
            u32_arg(is_bf16 + 2 * usize::from(self.w.turned))?,
            u32_arg(self.w.n)?,
            u32_arg(self.w.inner)?,
            Arg::F32(self.into.scale),
            self.into.onto_arg(),
            address(self.into.floats),
            u64_arg(self.into.stride),
        ])
    }

    /// No product.
    const NONE: [Arg; 11] = [
        Arg::Address(0),
        Arg::U64(0),
        Arg::Address(0),
        Arg::U64(0),
        Arg::U32(0),
        Arg::U32(0),
        Arg::U32(0),
        Arg::F32(0.0),
        Arg::Address(0),
        Arg::Address(0),
        Arg::U64(0),
    ];
}

impl Ops {
    /// Products of `rows` rows that do not read each other's results, rows apart from each other: to bits
    /// that do not depend on how many rows there are.
    pub(in crate::cuda) fn products(&mut self, rows: usize, jobs: &[Job]) -> Result<()> {
        for Job {
            x,
            x_stride,
            w,
            into,
        } in jobs
        {
            let n = span(rows, w.n, into.stride);
            fits(&[
                (*x, span(rows, w.inner, *x_stride)),
                (into.floats, n),
                (into.onto.unwrap_or(into.floats), n),
            ])?;
        }
        if rows > FEW_ROWS {
            return jobs.iter().try_for_each(|job| self.product(rows, job));
        }
        let mut parts = jobs.chunks(AT_ONCE);
        parts.try_for_each(|jobs| self.few_products(rows, jobs))
    }

    /// Up to [`AT_ONCE`] products of few rows.
    fn few_products(&mut self, rows: usize, jobs: &[Job]) -> Result<()> {
        let tiles = jobs.iter().map(|job| job.w.n.div_ceil(NARROW_COLUMNS));
        let (tiles, height) = (tiles.sum::<usize>(), rows.div_ceil(NARROW));
        let segments = jobs.iter().map(|job| job.w.inner.div_ceil(SEGMENT));
        let segments = segments.max().unwrap_or(1);
        let mut args = vec![u32_arg(rows)?];
        let depth = if segments > 1 && tiles * height < MANY_BLOCKS {
            self.segments
                .reserve(segments * rows * tiles * NARROW_COLUMNS)?;
            if self.counters.len() < tiles * height {
                self.counters = Buffer::zeros(&self.device, MANY_BLOCKS)?;
            }
            args.extend([&self.segments, &self.counters].map(|buffer| address(buffer.floats())));
            segments
        } else {
            args.extend([Arg::Address(0); 2]);
            1
        };
        for job in jobs {
            args.extend(job.args()?);
        }
        for _ in jobs.len()..AT_ONCE {
            args.extend(Job::NONE);
        }
        let grid = [tiles, height, depth];
        self.run("products_narrow", grid, ROW_THREADS, &args)
    }

    /// A product of many rows.
    fn product(&mut self, rows: usize, job: &Job) -> Result<()> {
        let (w, into) = (&job.w, &job.into);
        let kernel = match w.numbers {
            Number::F32 => "product_wide_f32",
            Number::Bf16 => "product_wide_bf16",
        };
        let args = [
            address(job.x),
            u64_arg(job.x_stride),
            Arg::Address(w.address),
            u64_arg(w.stride),
            u32_arg(usize::from(w.turned))?,
            u32_arg(rows)?,
            u32_arg(w.n)?,
            u32_arg(w.inner)?,
            Arg::F32(into.scale),
            into.onto_arg(),
            address(into.floats),
            u64_arg(into.stride),
        ];
        let grid = [w.n.div_ceil(WIDE_COLUMNS), rows.div_ceil(WIDE), 1];
        self.run(kernel, grid, ROW_THREADS, &args)
    }

    /// Splits `n` floats for products with bf16 weights; returns where the parts lie, `[3, n]`.
    pub(in crate::cuda) fn split(&mut self, n: usize, x: Floats) -> Result<u64> {
        fits(&[(x, n)])?;
        let parts = self.parts.room(3 * n * Number::Bf16.bytes())?;
        let args = [address(x), u64_arg(n), Arg::Address(parts)];
        self.each("split", n, &args)?;
        Ok(parts)
    }

    /// `into = scale * A B` by the device's own product, `A` of floats.
    pub(in crate::cuda) fn gemm(
        &self,
        [m, n, k]: [usize; 3],
        (a, a_stride, a_turned): (Floats, usize, bool),
        b: (u64, usize, bool),
        into: Target,
    ) -> Result<()> {
        let a_span = if a_turned {
            span(k, m, a_stride)
        } else {
            span(m, k, a_stride)
        };
        fits(&[(a, a_span), (into.floats, span(m, n, into.stride))])?;
        self.gemm_of(
            Number::F32,
            [m, n, k],
            (a.address(), a_stride, a_turned),
            b,
            into,
        )
    }

    /// `into = scale * A B`, `A` of bf16 parts of `len` numbers as [`Ops::split`] leaves them.
    pub(in crate::cuda) fn gemm_split(
        &self,
        [m, n, k]: [usize; 3],
        parts: u64,
        b: (u64, usize, bool),
        into: Target,
    ) -> Result<()> {
        fits(&[(into.floats, span(m, n, into.stride))])?;
        let bytes = (m * k * Number::Bf16.bytes()) as u64;
        // The smallest parts first, so that the large ones do not hide them.
        for part in (0..3).rev() {
            let a = (parts + part * bytes, k, false);
            let into = if part < 2 { into.adding() } else { into };
            self.gemm_of(Number::Bf16, [m, n, k], a, b, into)?;
        }
        Ok(())
    }

    fn gemm_of(
        &self,
        numbers: Number,
        [m, n, k]: [usize; 3],
        a: (u64, usize, bool),
        b: (u64, usize, bool),
        into: Target,
    ) -> Result<()> {
        let matrix = |(address, stride, turned)| Matrix {
            address,
            stride,
            turned,
        };
        let len = span(m, n, into.stride);
        if let Some(onto) = into.onto
            && onto.address() != into.floats.address()
        {
            into.floats
                .range(0, len)
                .copy_from(&self.device, onto.range(0, len))?;
        }
        let gemm = Gemm {
            m,
            n,
            k,
            a: matrix(a),
            b: matrix(b),
            numbers,
            c: into.floats.address(),
            c_stride: into.stride,
            scale: into.scale,
            adds: into.onto.is_some(),
        };
        // SAFETY: the callers have checked the floats, and weights are as large as they say.
        unsafe { self.device.gemm(&gemm) }
    }
}
