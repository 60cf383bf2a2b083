//! Products of matrices: by own kernels, whose rows do not see each other, and by the device's.

use super::{Ops, ROW_THREADS, address, fits, u32_arg, u64_arg};
use crate::cuda::device::{Arg, Gemm, Matrix, Number};
use crate::cuda::memory::Floats;
use crate::error::Result;

/// Inner dimension of a segment of a product, and rows and columns of its blocks, as the kernels have
/// them.
const SEGMENT: usize = 256;
const WIDE: usize = 64;
const NARROW: usize = 8;
const COLUMNS: usize = 64;

/// Rows up to which the segments of a product get blocks of their own.
const FEW_ROWS: usize = 16;

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
    pub(in crate::cuda) adds: bool,
}

impl Target {
    /// Rows of `n`, replaced.
    pub(in crate::cuda) fn rows(floats: Floats, n: usize) -> Self {
        Self {
            floats,
            stride: n,
            scale: 1.0,
            adds: false,
        }
    }

    /// The same, added to.
    pub(in crate::cuda) fn adding(self) -> Self {
        Self { adds: true, ..self }
    }

    pub(in crate::cuda) fn scaled(self, scale: f32) -> Self {
        Self { scale, ..self }
    }
}

/// The floats that rows of `n`, `stride` apart, span.
fn span(rows: usize, n: usize, stride: usize) -> usize {
    rows.checked_sub(1).map_or(0, |rows| rows * stride + n)
}

impl Ops {
    /// `into = scale * x W^T`, rows apart from each other: to bits that do not depend on how many there
    /// are.
    pub(in crate::cuda) fn product(
        &mut self,
        rows: usize,
        (x, x_stride): (Floats, usize),
        w: Weights,
        into: Target,
    ) -> Result<()> {
        let n = w.n;
        fits(&[
            (x, span(rows, w.inner, x_stride)),
            (into.floats, span(rows, n, into.stride)),
        ])?;
        let few = rows <= FEW_ROWS;
        let count = w.inner.div_ceil(SEGMENT);
        let scratch = if few && count > 1 {
            self.segments.reserve(count * rows * n)?;
            self.segments.floats().address()
        } else {
            0
        };
        let kernel = match (few, w.numbers) {
            (true, Number::F32) => "product_narrow_f32",
            (true, Number::Bf16) => "product_narrow_bf16",
            (false, Number::F32) => "product_wide_f32",
            (false, Number::Bf16) => "product_wide_bf16",
        };
        let height = if few { NARROW } else { WIDE };
        let depth = if scratch == 0 { 1 } else { count };
        let adds = u32_arg(usize::from(into.adds))?;
        let args = [
            address(x),
            u64_arg(x_stride),
            Arg::Address(w.address),
            u64_arg(w.stride),
            u32_arg(usize::from(w.turned))?,
            u32_arg(rows)?,
            u32_arg(n)?,
            u32_arg(w.inner)?,
            Arg::F32(into.scale),
            adds,
            address(into.floats),
            u64_arg(into.stride),
            Arg::Address(scratch),
        ];
        let grid = [n.div_ceil(COLUMNS), rows.div_ceil(height), depth];
        self.run(kernel, grid, ROW_THREADS, &args)?;
        if scratch == 0 {
            return Ok(());
        }
        let args = [
            Arg::Address(scratch),
            u32_arg(count)?,
            u32_arg(rows)?,
            u32_arg(n)?,
            Arg::F32(into.scale),
            adds,
            address(into.floats),
            u64_arg(into.stride),
        ];
        self.each("add_segments", rows * n, &args)
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
            let adds = into.adds || part < 2;
            self.gemm_of(Number::Bf16, [m, n, k], a, b, Target { adds, ..into })?;
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
            adds: into.adds,
        };
        // SAFETY: the callers have checked the floats, and weights are as large as they say.
        unsafe { self.device.gemm(&gemm) }
    }
}
