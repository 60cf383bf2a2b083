//! The inner loops of the matrix product: register tiles, written once over a vector type.

use super::buffer::LINE;
use super::gemm::{PANEL, ROWS};
use super::quant::Quantized;
use super::simd::Isa;
#[cfg(target_arch = "aarch64")]
use arm::pack_4x4;
#[cfg(target_arch = "x86_64")]
use x86::pack_4x4;

/// A packed or transposed left factor: group `g` of 12 rows starts at `g * group_stride`, and its
/// element `(i, t)` lies at `t * step + i`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Left {
    pub(super) data: *const f32,
    pub(super) group_stride: usize,
    pub(super) step: usize,
}

/// One right factor and output; bounds were checked by whoever made it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    pub(super) b: *const f32,
    pub(super) n: usize,
    pub(super) row_stride: usize,
    pub(super) panel_stride: usize,
    pub(super) c: *mut f32,
    pub(super) stride: usize,
    pub(super) add: bool,
    pub(super) unit: Unit,
    /// What multiplies tiles, where `unit` says that something does.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "no other architecture has them")
    )]
    pub(super) tiles: TileUnit,
    /// Where `b` comes from, if it is still to be widened.
    pub(super) wide: Option<Wide>,
}

/// Panels of quantized weights, or of their transpose, from one of them on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wide {
    pub(super) weights: *const Quantized,
    pub(super) turned: bool,
    pub(super) first: usize,
}

/// What multiplies tiles of bf16 numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "no other architecture has them")
)]
pub(crate) enum TileUnit {
    /// The matrix unit (AMX).
    Amx,
    /// Vectors that multiply pairs of bf16 numbers (AVX512-BF16); for factors of one part alone.
    Dots,
    /// Plain Rust, to the bits of the matrix unit.
    #[cfg(test)]
    Emulated,
}

/// What computes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "no other architecture has the unit")
)]
pub(crate) enum Unit {
    /// Vectors, on panels.
    Vector,
    /// The matrix unit, on tiles of bf16.
    Matrix,
    /// The matrix unit, on tiles of bf16 of the transposed factor.
    MatrixTurned,
    /// The matrix unit, on panels of `f32` that are split as they are read.
    MatrixSplit,
    /// The matrix unit, on panels of `f32` that are rounded to bf16 as they are read.
    MatrixRounded,
}

/// Multiplies `m` rows of `left` with each job.
///
/// # Safety
/// The machine has `isa`; `left` holds `[m, k]`; each job's `b` holds `[k, n]` with whole panels
/// readable, and its `c` is valid for writes of `[m, n]` and aliases nothing else.
pub(super) unsafe fn run(isa: Isa, left: Left, m: usize, k: usize, jobs: &[Job]) {
    for job in jobs {
        // SAFETY: passed on to the caller.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => x86::run_avx512(left, m, k, job),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => x86::run_avx2(left, m, k, job),
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => arm::run_neon(left, m, k, job),
                Isa::Baseline => run_job::<Portable, 4, 8, 4, 4, 2, 2>(left, m, k, job),
            }
        }
    }
}

/// A vector register and its instructions.
///
/// # Safety
/// The machine has the instructions, and pointers are valid for [`Vector::LANES`] floats
/// (one, for `splat`).
trait Vector: Copy {
    /// Floats in a register.
    const LANES: usize;
    /// Rows of the tallest tile; divides [`ROWS`].
    const TILE_ROWS: usize;

    unsafe fn zero() -> Self;
    unsafe fn splat(p: *const f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// `self * b + c`.
    unsafe fn madd(self, b: Self, c: Self) -> Self;
}

/// Computes one job. `C` is the width of a tile in vectors; `S1`, `S2`, .. the widths of tiles of
/// 1, 2, .. rows, which stream their weights and need that many sums under way to hide latency.
#[inline(always)]
unsafe fn run_job<
    V: Vector,
    const C: usize,
    const S1: usize,
    const S2: usize,
    const S3: usize,
    const S4: usize,
    const S5: usize,
>(
    left: Left,
    m: usize,
    k: usize,
    job: &Job,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut done = 0;
        match m {
            1 => {
                stream::<V, 1, S1>(left, k, job, &mut done);
                stream::<V, 1, 8>(left, k, job, &mut done);
                stream::<V, 1, 4>(left, k, job, &mut done);
            }
            2 => stream::<V, 2, S2>(left, k, job, &mut done),
            3 => stream::<V, 3, S3>(left, k, job, &mut done),
            4 => stream::<V, 4, S4>(left, k, job, &mut done),
            5 => stream::<V, 5, S5>(left, k, job, &mut done),
            6 => stream::<V, 6, S5>(left, k, job, &mut done),
            _ => {}
        }
        let width = C * V::LANES;
        let tiles = m.div_ceil(ROWS);
        for column in (done..job.n).step_by(width) {
            let columns = width.min(job.n - column);
            for row in (0..m).step_by(V::TILE_ROWS) {
                let rows = V::TILE_ROWS.min(m - row);
                let a = left.data.add(row / ROWS * left.group_stride + row % ROWS);
                let at = At {
                    a,
                    step: left.step,
                    row,
                    column,
                };
                if columns == width {
                    let ahead = job.ahead(k, at, tiles, column + width);
                    let c = job.c_at(row, column);
                    tile_of_rows::<V, C>(rows, k, job, at, ahead, c, job.stride);
                } else {
                    partial_tile::<V, C>(rows, columns, k, job, at);
                }
            }
        }
    }
}

/// Inner steps between two requests to memory.
const UNROLL: usize = 4;

/// Memory to ask for while a tile is computed, so that it is there when its turn comes.
///
/// Weights are read once per product and outputs are cold, so without this the first tile of every
/// panel waits for memory and every tile's stores do.
#[derive(Clone, Copy)]
struct Ahead {
    weights: *const f32,
    lines: usize,
    output: *const f32,
    stride: usize,
}

impl Ahead {
    const NOTHING: Self = Self {
        weights: std::ptr::null(),
        lines: 0,
        output: std::ptr::null(),
        stride: 0,
    };

    #[inline(always)]
    fn fetch(&self, i: usize) {
        if i < self.lines {
            fetch(self.weights.wrapping_add(i * LINE));
        }
        if i < 2 * ROWS && self.stride > 0 {
            fetch(self.output.wrapping_add(i / 2 * self.stride + i % 2 * LINE));
        }
    }
}

/// Where a tile is: its rows of the left factor, and its place in the output.
#[derive(Clone, Copy)]
struct At {
    a: *const f32,
    step: usize,
    row: usize,
    column: usize,
}

impl Job {
    /// Output element `(row, column)`.
    #[inline(always)]
    unsafe fn c_at(&self, row: usize, column: usize) -> *mut f32 {
        // SAFETY: the caller stays inside the output.
        unsafe { self.c.add(row * self.stride + column) }
    }

    /// What tile `row` of `rows` of the panel before `column` should fetch: its share of the panel at
    /// `column`, and the output that the next tile writes.
    #[inline(always)]
    fn ahead(&self, k: usize, at: At, tiles: usize, column: usize) -> Ahead {
        let tile = at.row / ROWS;
        let (start, end) = (k * tile / tiles * 2, k * (tile + 1) / tiles * 2);
        let is_panel = self.row_stride == PANEL && column.is_multiple_of(PANEL) && column < self.n;
        let panel = self.b.wrapping_add(column / PANEL * self.panel_stride);
        Ahead {
            weights: panel.wrapping_add(start * LINE),
            lines: if is_panel { end - start } else { 0 },
            output: self
                .c
                .wrapping_add((at.row + ROWS) * self.stride + at.column),
            stride: self.stride,
        }
    }

    /// First row of the right factor at `column`, a multiple of the vector width.
    #[inline(always)]
    unsafe fn b_at(&self, column: usize) -> *const f32 {
        // SAFETY: the caller stays inside the panels.
        unsafe {
            self.b
                .add(column / PANEL * self.panel_stride + column % PANEL)
        }
    }
}

/// Starts loading the cache line of `p` into the second-level cache; any address will do.
#[inline(always)]
fn fetch(p: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching never faults, and SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch never faults, and changes neither memory nor flags.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = p;
}

/// Computes as many whole tiles of `R` rows and `S` vectors as fit after the columns `done`.
#[inline(always)]
unsafe fn stream<V: Vector, const R: usize, const S: usize>(
    left: Left,
    k: usize,
    job: &Job,
    done: &mut usize,
) {
    let width = S * V::LANES;
    while *done + width <= job.n {
        // SAFETY: passed on to the caller; the tile is inside the output.
        unsafe {
            let at = At {
                a: left.data,
                step: left.step,
                row: 0,
                column: *done,
            };
            tile::<V, R, S>(k, job, at, Ahead::NOTHING, job.c_at(0, *done), job.stride);
        }
        *done += width;
    }
}

/// Computes a tile that is wider than what is left of the output, by way of the stack.
#[inline(always)]
unsafe fn partial_tile<V: Vector, const C: usize>(
    rows: usize,
    columns: usize,
    k: usize,
    job: &Job,
    at: At,
) {
    let mut whole = [0.0f32; ROWS * PANEL];
    let width = C * V::LANES;
    // SAFETY: passed on to the caller; only `columns` of each output row are touched.
    unsafe {
        if job.add {
            for i in 0..rows {
                let source = job.c_at(at.row + i, at.column);
                std::ptr::copy_nonoverlapping(source, whole[i * width..].as_mut_ptr(), columns);
            }
        }
        tile_of_rows::<V, C>(rows, k, job, at, Ahead::NOTHING, whole.as_mut_ptr(), width);
        for i in 0..rows {
            let target = job.c_at(at.row + i, at.column);
            std::ptr::copy_nonoverlapping(whole[i * width..].as_ptr(), target, columns);
        }
    }
}

/// Picks the tile for `rows`, a run-time number up to [`Vector::TILE_ROWS`].
#[inline(always)]
unsafe fn tile_of_rows<V: Vector, const C: usize>(
    rows: usize,
    k: usize,
    job: &Job,
    at: At,
    ahead: Ahead,
    c: *mut f32,
    stride: usize,
) {
    macro_rules! pick {
        ($($n:literal)*) => {
            match rows {
                $($n => tile::<V, $n, C>(k, job, at, ahead, c, stride),)*
                _ => {}
            }
        };
    }
    // SAFETY: passed on to the caller.
    unsafe { pick!(1 2 3 4 5 6 7 8 9 10 11 12) }
}

/// The register tile: `R` rows and `C` vectors of sums, one multiply-add each per inner step.
#[inline(always)]
unsafe fn tile<V: Vector, const R: usize, const C: usize>(
    k: usize,
    job: &Job,
    at: At,
    ahead: Ahead,
    c: *mut f32,
    stride: usize,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut sums = [[V::zero(); C]; R];
        if job.add {
            for (i, row) in sums.iter_mut().enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    *sum = V::load(c.add(i * stride + j * V::LANES));
                }
            }
        }
        let mut a = at.a;
        let mut b = job.b_at(at.column);
        for i in 0..k / UNROLL {
            // One or two requests among many multiply-adds: in a burst they would stall the tile.
            ahead.fetch(i);
            for _ in 0..UNROLL {
                step(&mut sums, a, b, job.panel_stride);
                a = a.wrapping_add(at.step);
                b = b.wrapping_add(job.row_stride);
            }
        }
        for _ in 0..k % UNROLL {
            step(&mut sums, a, b, job.panel_stride);
            a = a.wrapping_add(at.step);
            b = b.wrapping_add(job.row_stride);
        }
        for (i, row) in sums.iter().enumerate() {
            for (j, sum) in row.iter().enumerate() {
                sum.store(c.add(i * stride + j * V::LANES));
            }
        }
    }
}

/// One inner step of a tile. Not a closure: those do not inherit the instruction set.
#[inline(always)]
unsafe fn step<V: Vector, const R: usize, const C: usize>(
    sums: &mut [[V; C]; R],
    a: *const f32,
    b: *const f32,
    panel_stride: usize,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut row_of_b = [V::zero(); C];
        for (j, value) in row_of_b.iter_mut().enumerate() {
            let lane = j * V::LANES;
            *value = V::load(b.add(lane / PANEL * panel_stride + lane % PANEL));
        }
        for (i, row) in sums.iter_mut().enumerate() {
            let x = V::splat(a.add(i));
            for (sum, value) in row.iter_mut().zip(row_of_b) {
                *sum = x.madd(value, *sum);
            }
        }
    }
}

/// Four floats in whatever registers the architecture has.
#[derive(Clone, Copy)]
struct Portable([f32; 4]);

impl Vector for Portable {
    const LANES: usize = 4;
    const TILE_ROWS: usize = 3;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 4])
    }

    #[inline(always)]
    unsafe fn splat(p: *const f32) -> Self {
        // SAFETY: passed on to the caller.
        Self([unsafe { *p }; 4])
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: passed on to the caller; the type is an array of floats, which needs no alignment of its own.
        Self(unsafe { p.cast::<[f32; 4]>().read() })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as in `load`.
        unsafe { p.cast::<[f32; 4]>().write(self.0) }
    }

    #[inline(always)]
    unsafe fn madd(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| {
            super::simd::madd::<{ super::simd::BASELINE_FMA }>(self.0[i], b.0[i], c.0[i])
        }))
    }
}

/// Interleaves four rows of `depth` values, `stride` apart: `(i, t)` goes to `t * step + i`.
pub(super) fn pack_quad(data: &[f32], stride: usize, depth: usize, step: usize, out: &mut [f32]) {
    assert!(3 * stride + depth <= data.len() && (depth - 1) * step + 4 <= out.len());
    let done = depth / 4 * 4;
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    for t in (0..done).step_by(4) {
        // SAFETY: the assertion covers rows 0 to 3 up to `depth`, and four floats at each step.
        unsafe {
            pack_4x4(
                data.as_ptr().add(t),
                stride,
                out.as_mut_ptr().add(t * step),
                step,
            )
        };
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let done = done - done;
    for t in done..depth {
        for i in 0..4 {
            out[t * step + i] = data[i * stride + t];
        }
    }
}

/// The transpose of `data [rows, n]`.
pub(super) fn transposed(data: &[f32], n: usize) -> Vec<f32> {
    let rows = data.len() / n;
    let mut out = vec![0.0; data.len()];
    let quads = rows / 4 * 4;
    for row in (0..quads).step_by(4) {
        pack_quad(&data[row * n..], n, n, rows, &mut out[row..]);
    }
    for row in quads..rows {
        for t in 0..n {
            out[t * rows + row] = data[row * n + t];
        }
    }
    out
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The x86-64 vector types, and the tiles compiled for them.

    use std::arch::x86_64::{
        __m256, __m512, _MM_TRANSPOSE4_PS, _mm_loadu_ps, _mm_storeu_ps, _mm256_broadcast_ss,
        _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{Job, Left, PANEL, Vector, run_job};

    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
    pub(super) unsafe fn run_avx512(left: Left, m: usize, k: usize, job: &Job) {
        // SAFETY: passed on to the caller.
        unsafe {
            let rest = job.n % PANEL;
            let whole = if rest <= 16 { job.n - rest } else { job.n };
            run_job::<__m512, 2, 16, 8, 8, 6, 4>(left, m, k, &Job { n: whole, ..*job });
            if whole < job.n {
                // Half a panel: a whole tile would be half wasted.
                let (b, c) = (job.b_at(whole), job.c_at(0, whole));
                let half = Job {
                    b,
                    c,
                    n: job.n - whole,
                    ..*job
                };
                run_job::<__m512, 1, 4, 1, 1, 1, 1>(left, m, k, &half);
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn run_avx2(left: Left, m: usize, k: usize, job: &Job) {
        // SAFETY: passed on to the caller.
        unsafe { run_job::<__m256, 2, 8, 4, 4, 2, 2>(left, m, k, job) }
    }

    /// # Safety
    /// Four rows of four floats at `data`, and four floats at each of four steps of `out`.
    #[inline]
    pub(super) unsafe fn pack_4x4(data: *const f32, stride: usize, out: *mut f32, step: usize) {
        // SAFETY: passed on to the caller; SSE is part of x86-64.
        unsafe {
            // Not `array::from_fn`: its closure is not always inlined.
            let mut rows = [
                _mm_loadu_ps(data),
                _mm_loadu_ps(data.add(stride)),
                _mm_loadu_ps(data.add(2 * stride)),
                _mm_loadu_ps(data.add(3 * stride)),
            ];
            let [a, b, c, d] = &mut rows;
            _MM_TRANSPOSE4_PS(a, b, c, d);
            for (t, row) in rows.into_iter().enumerate() {
                _mm_storeu_ps(out.add(t * step), row);
            }
        }
    }

    macro_rules! vector {
        ($ty:ident, $lanes:literal, $rows:literal, $zero:ident, $load:ident, $store:ident, $madd:ident, $splat:expr) => {
            // SAFETY: (all) the caller has the instructions and valid pointers.
            impl Vector for $ty {
                const LANES: usize = $lanes;
                const TILE_ROWS: usize = $rows;

                #[inline(always)]
                unsafe fn zero() -> Self {
                    // SAFETY: see above.
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn splat(p: *const f32) -> Self {
                    // SAFETY: see above.
                    unsafe { $splat(p) }
                }
                #[inline(always)]
                unsafe fn load(p: *const f32) -> Self {
                    // SAFETY: see above.
                    unsafe { $load(p) }
                }
                #[inline(always)]
                unsafe fn store(self, p: *mut f32) {
                    // SAFETY: see above.
                    unsafe { $store(p, self) }
                }
                #[inline(always)]
                unsafe fn madd(self, b: Self, c: Self) -> Self {
                    // SAFETY: see above.
                    unsafe { $madd(self, b, c) }
                }
            }
        };
    }

    vector!(
        __m512,
        16,
        12,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        |p: *const f32| _mm512_set1_ps(*p)
    );
    vector!(
        __m256,
        8,
        6,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        |p: *const f32| _mm256_broadcast_ss(&*p)
    );
}

#[cfg(target_arch = "aarch64")]
mod arm {
    //! The vector type of 64-bit ARM, and the tiles for it.

    use std::arch::aarch64::{
        float32x4_t, vdupq_n_f32, vfmaq_f32, vld1q_dup_f32, vld1q_f32, vreinterpretq_f32_f64,
        vreinterpretq_f64_f32, vst1q_f32, vtrn1q_f32, vtrn1q_f64, vtrn2q_f32, vtrn2q_f64,
    };

    use super::{Job, Left, Vector, run_job};

    pub(super) unsafe fn run_neon(left: Left, m: usize, k: usize, job: &Job) {
        // SAFETY: passed on to the caller.
        unsafe { run_job::<float32x4_t, 4, 16, 8, 8, 4, 4>(left, m, k, job) }
    }

    /// # Safety
    /// Four rows of four floats at `data`, and four floats at each of four steps of `out`.
    #[inline]
    pub(super) unsafe fn pack_4x4(data: *const f32, stride: usize, out: *mut f32, step: usize) {
        // SAFETY: passed on to the caller; every 64-bit ARM has NEON.
        unsafe {
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| vld1q_f32(data.add(i * stride)));
            let pairs = [
                (vtrn1q_f32(a, b), vtrn1q_f32(c, d)),
                (vtrn2q_f32(a, b), vtrn2q_f32(c, d)),
            ];
            for (t, (ab, cd)) in pairs.into_iter().enumerate() {
                let (ab, cd) = (vreinterpretq_f64_f32(ab), vreinterpretq_f64_f32(cd));
                let (first, second) = (vtrn1q_f64(ab, cd), vtrn2q_f64(ab, cd));
                vst1q_f32(out.add(t * step), vreinterpretq_f32_f64(first));
                vst1q_f32(out.add((t + 2) * step), vreinterpretq_f32_f64(second));
            }
        }
    }

    // 32 registers: 16 sums, 4 vectors of the right factor, and what is loaded ahead of its use. Six rows
    // would need 29 and are spilled.
    // SAFETY: (all) every 64-bit ARM has NEON, and the caller has valid pointers.
    impl Vector for float32x4_t {
        const LANES: usize = 4;
        const TILE_ROWS: usize = 4;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: see above.
            unsafe { vdupq_n_f32(0.0) }
        }
        #[inline(always)]
        unsafe fn splat(p: *const f32) -> Self {
            // SAFETY: see above.
            unsafe { vld1q_dup_f32(p) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: see above.
            unsafe { vld1q_f32(p) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: see above.
            unsafe { vst1q_f32(p, self) }
        }
        #[inline(always)]
        unsafe fn madd(self, b: Self, c: Self) -> Self {
            // SAFETY: see above.
            unsafe { vfmaq_f32(c, self, b) }
        }
    }
}
