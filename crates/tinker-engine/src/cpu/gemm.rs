//! Matrix products in `f32`, in which every output is one chain of additions over the inner dimension,
//! first to last: of products on vectors, of blocks of 32 on the matrix unit ([`super::amx`]).
//!
//! That makes a result independent of everything but its own row and column and the unit: not of the
//! number of rows, of blocking, of threads, nor of the width of vectors. One-row decoding therefore
//! gives the bits that a whole prompt gives.
//!
//! The right factor is read in panels of 32 columns ([`Cols`]): frozen weights are packed into
//! panels when they are loaded, everything else is row-major, which is the same with other strides.
//! The left factor is interleaved by groups of rows, so that the kernel walks one pointer; a factor
//! that is stored transposed is used as it lies.

mod wide;

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use super::buffer::{Buffer, round_up};
use super::elementwise;
use super::pool::{Pool, SharedMut};
use super::quant::Quantized;
use super::simd::Isa;
use super::tile::{self, Job, Left, TileUnit, Unit, Wide};

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;

/// Rows of the left factor that are interleaved; also the tallest register tile.
pub(crate) const ROWS: usize = 12;

/// Inner dimension of a block: a panel of it is 32 KiB and stays in the first-level cache.
const INNER_BLOCK: usize = 256;

/// Rows of the left factor that are packed at a time; with `INNER_BLOCK` it stays in the second level.
const ROW_BLOCK: usize = 22 * ROWS;

/// Multiply-adds from which on a second thread pays for its wake-up.
const SHARED_WORK: usize = 1 << 16;

/// Up to this many rows, weights are streamed several panels at a time instead of kept in cache.
const NARROW: usize = 6;

/// A `[k, n]` matrix packed for use as the right factor: `[n / 32][k][32]`, zero padded.
#[derive(Debug, Clone)]
pub(crate) struct Panels {
    k: usize,
    n: usize,
    data: Buffer,
}

impl Panels {
    /// Packs row `j` of `rows(j)` (`[k]` values) as column `j`, for `n` columns.
    pub(crate) fn from_columns<E>(
        k: usize,
        n: usize,
        mut column: impl FnMut(usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut data = Buffer::zeros_huge(k * round_up(n, PANEL));
        let mut line = vec![0.0; k];
        for j in 0..n {
            column(j, &mut line)?;
            let panel = &mut data[j / PANEL * k * PANEL..][..k * PANEL];
            for (value, slot) in line
                .iter()
                .zip(panel[j % PANEL..].iter_mut().step_by(PANEL))
            {
                *slot = *value;
            }
        }
        Ok(Self { k, n, data })
    }

    /// The transposed matrix, packed again.
    pub(crate) fn transposed(&self) -> Self {
        let (k, n) = (self.n, self.k);
        let mut data = Buffer::zeros_huge(k * round_up(n, PANEL));
        for (p, source) in self.data.chunks_exact(self.k * PANEL).enumerate() {
            let columns = PANEL.min(self.n - p * PANEL);
            for (row, values) in source.chunks_exact(PANEL).enumerate() {
                let panel = &mut data[row / PANEL * k * PANEL..];
                for (j, value) in values[..columns].iter().enumerate() {
                    panel[(p * PANEL + j) * PANEL + row % PANEL] = *value;
                }
            }
        }
        Self { k, n, data }
    }

    /// Copies column `j` to `out`, `[k]`.
    pub(crate) fn column(&self, j: usize, out: &mut [f32]) {
        let panel = &self.data[j / PANEL * self.k * PANEL..][..self.k * PANEL];
        for (out, row) in out.iter_mut().zip(panel.chunks_exact(PANEL)) {
            *out = row[j % PANEL];
        }
    }

    /// Copies row `t` to `out`, `[n]`.
    pub(crate) fn row(&self, t: usize, out: &mut [f32]) {
        for (out, panel) in out
            .chunks_mut(PANEL)
            .zip(self.data.chunks_exact(self.k * PANEL))
        {
            out.copy_from_slice(&panel[t * PANEL..][..out.len()]);
        }
    }

    /// Number of elements, padding not counted.
    pub(crate) fn len(&self) -> usize {
        self.k * self.n
    }

    /// As a right factor.
    pub(crate) fn cols(&self) -> Cols<'_> {
        Cols::panels(&self.data, self.k, self.n, self.k * PANEL)
    }
}

/// The right factor `B [k, n]` of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cols<'a> {
    data: &'a [f32],
    k: usize,
    n: usize,
    row_stride: usize,
    panel_stride: usize,
    /// Columns that may be read in the last panel: 32 where it is padded.
    readable: usize,
    unit: Unit,
    /// What multiplies tiles.
    tiles: TileUnit,
    /// Quantized weights, and whether the factor is their transpose; then there is no data.
    quantized: Option<(&'a Quantized, bool)>,
}

impl<'a> Cols<'a> {
    /// A row-major `[k, n]` matrix whose rows start `stride` apart.
    pub(crate) fn row_major(data: &'a [f32], k: usize, n: usize, stride: usize) -> Self {
        let readable = n - n.saturating_sub(1) / PANEL * PANEL;
        Self {
            data,
            k,
            n,
            row_stride: stride,
            panel_stride: PANEL,
            readable,
            unit: Unit::Vector,
            tiles: TileUnit::Amx,
            quantized: None,
        }
    }

    /// Panels `[k][32]` that lie `panel_stride` apart.
    pub(crate) fn panels(data: &'a [f32], k: usize, n: usize, panel_stride: usize) -> Self {
        Self {
            data,
            k,
            n,
            row_stride: PANEL,
            panel_stride,
            readable: PANEL,
            unit: Unit::Vector,
            tiles: TileUnit::Amx,
            quantized: None,
        }
    }

    /// Quantized weights `[k, n]`.
    pub(crate) fn quantized(weights: &'a Quantized) -> Self {
        Self {
            quantized: Some((weights, false)),
            ..Self::panels(&[], weights.k(), weights.n(), 0)
        }
    }

    /// The transpose of quantized weights `[n, k]`.
    pub(crate) fn turned_quantized(weights: &'a Quantized) -> Self {
        Self {
            quantized: Some((weights, true)),
            ..Self::panels(&[], weights.n(), weights.k(), 0)
        }
    }

    /// Tiles for the matrix unit, of which 32 columns take `panel_stride` floats.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn tiles(data: &'a [f32], k: usize, n: usize, panel_stride: usize) -> Self {
        Self {
            data,
            k,
            n,
            row_stride: 0,
            panel_stride,
            readable: PANEL,
            unit: Unit::Matrix,
            tiles: TileUnit::Amx,
            quantized: None,
        }
    }

    /// The transpose of tiles `[n, k]`, which take `column_stride` floats for each 16 of the `k`, and
    /// for each of these `panel_stride` for 32 of the `n`.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn turned_tiles(
        data: &'a [f32],
        k: usize,
        n: usize,
        column_stride: usize,
        panel_stride: usize,
    ) -> Self {
        Self {
            data,
            k,
            n,
            row_stride: column_stride,
            panel_stride,
            readable: PANEL,
            unit: Unit::MatrixTurned,
            tiles: TileUnit::Amx,
            quantized: None,
        }
    }

    /// The same factor, for the matrix unit.
    pub(super) fn split(self) -> Self {
        Self {
            unit: Unit::MatrixSplit,
            ..self
        }
    }

    /// The same factor, rounded to bf16 for a unit that multiplies tiles.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn round(self) -> Self {
        Self {
            unit: Unit::MatrixRounded,
            ..self
        }
    }

    /// The same factor, for another unit of those that multiply tiles.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn on(self, tiles: TileUnit) -> Self {
        Self { tiles, ..self }
    }

    /// The numbers as they lie in memory.
    pub(crate) fn data(&self) -> &'a [f32] {
        self.data
    }

    /// Inner dimension.
    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// Columns.
    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// One past the last element that a kernel reads.
    fn end(&self) -> usize {
        if self.quantized.is_some() {
            return 0;
        }
        let last_panel = (self.n - 1) / PANEL;
        match self.unit {
            Unit::Matrix => return (last_panel + 1) * self.panel_stride,
            Unit::MatrixTurned => {
                let groups = self.k.div_ceil(PANEL) * PANEL / 16;
                return (groups - 1) * self.row_stride + (last_panel + 1) * self.panel_stride;
            }
            Unit::Vector | Unit::MatrixSplit | Unit::MatrixRounded => {}
        }
        last_panel * self.panel_stride + (self.k - 1) * self.row_stride + self.readable
    }

    /// Whether a kernel would read beyond the last panel; kernels read 16 columns or 32.
    fn has_tail(&self) -> bool {
        !self.readable.is_multiple_of(16)
    }

    /// Copies the last, partial panel to `[k][32]`; what lies beyond its columns is unspecified.
    fn copy_tail(&self, out: &mut [f32]) {
        let columns = self.n % PANEL;
        let rows = self.data[self.n / PANEL * self.panel_stride..].chunks(self.row_stride);
        for (row, out) in rows.zip(out.chunks_exact_mut(PANEL)) {
            out[..columns].copy_from_slice(&row[..columns]);
        }
    }
}

/// The left factor `A [m, k]` of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rows<'a> {
    /// `A[i, t]` at `i * stride + t`.
    RowMajor { data: &'a [f32], stride: usize },
    /// As `RowMajor`, each element rounded to bf16 as it is read.
    Rounded { data: &'a [f32], stride: usize },
    /// `A[i, t]` at `t * stride + i`.
    Transposed { data: &'a [f32], stride: usize },
}

impl<'a> Rows<'a> {
    /// A row-major matrix of rows of `width`.
    pub(crate) fn row_major(data: &'a [f32], width: usize) -> Self {
        Rows::RowMajor {
            data,
            stride: width,
        }
    }

    /// As [`Rows::row_major`], rounded to bf16.
    pub(crate) fn rounded(data: &'a [f32], width: usize) -> Self {
        Rows::Rounded {
            data,
            stride: width,
        }
    }

    /// A matrix whose transpose has rows of `width`.
    pub(crate) fn transposed(data: &'a [f32], width: usize) -> Self {
        Rows::Transposed {
            data,
            stride: width,
        }
    }

    /// Whether elements are rounded.
    fn is_rounded(&self) -> bool {
        matches!(self, Rows::Rounded { .. })
    }

    /// The rows from `row` on.
    pub(crate) fn skip_rows(self, row: usize) -> Self {
        match self {
            Rows::RowMajor { data, stride } => Rows::RowMajor {
                data: &data[row * stride..],
                stride,
            },
            Rows::Rounded { data, stride } => Rows::Rounded {
                data: &data[row * stride..],
                stride,
            },
            Rows::Transposed { data, stride } => Rows::Transposed {
                data: &data[row..],
                stride,
            },
        }
    }
}

/// Whether both factors of a product of a backward pass that no weights are part of are rounded to bf16,
/// for a unit that multiplies tiles of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rounding(pub(super) Option<TileUnit>);

impl Rounding {
    /// The factors as they are multiplied.
    pub(crate) fn of<'a>(self, left: Rows<'a>, right: Cols<'a>) -> (Rows<'a>, Cols<'a>) {
        match (self.0, left) {
            #[cfg(target_arch = "x86_64")]
            (Some(unit), Rows::RowMajor { data, stride }) => {
                (Rows::Rounded { data, stride }, right.round().on(unit))
            }
            _ => (left, right),
        }
    }

    /// Whether it rounds.
    pub(crate) fn rounds(self) -> bool {
        self.0.is_some()
    }
}

/// Whether a product replaces the output or is added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// `C = A B`.
    Replace,
    /// `C = C + A B`, continuing the chain of each output.
    Add,
}

/// One product of a left factor that several share.
#[derive(Debug)]
pub(crate) struct Product<'a> {
    b: Cols<'a>,
    c: *mut f32,
    len: usize,
    stride: usize,
    store: Store,
    borrow: PhantomData<&'a mut [f32]>,
}

impl<'a> Product<'a> {
    /// `C [m, n]` with rows `stride` apart, from right factor `b`.
    pub(crate) fn new(b: Cols<'a>, c: &'a mut [f32], stride: usize, store: Store) -> Self {
        let (len, c) = (c.len(), c.as_mut_ptr());
        Self {
            b,
            c,
            len,
            stride,
            store,
            borrow: PhantomData,
        }
    }

    /// As [`Product::new`], for the part of a shared output from `start` on.
    ///
    /// # Safety
    /// The output outlives the product, and nobody else touches these columns meanwhile.
    pub(crate) unsafe fn shared(
        b: Cols<'a>,
        c: &SharedMut<f32>,
        start: usize,
        stride: usize,
        store: Store,
    ) -> Self {
        let (c, len) = c.part(start);
        Self {
            b,
            c,
            len,
            stride,
            store,
            borrow: PhantomData,
        }
    }
}

/// Where a thread keeps packed factors between calls, so that a product allocates next to nothing.
#[derive(Debug)]
struct Scratch {
    rows: Buffer,
    tails: Buffer,
    /// Quantized weights, widened.
    wide: Buffer,
    /// Of the matrix unit.
    #[cfg(target_arch = "x86_64")]
    parts: super::amx::Scratch,
}

impl Scratch {
    fn new() -> Self {
        Self {
            rows: Buffer::zeros(ROW_BLOCK * INNER_BLOCK),
            tails: Buffer::zeros(0),
            wide: Buffer::zeros(0),
            #[cfg(target_arch = "x86_64")]
            parts: super::amx::Scratch::new(),
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
}

/// Computes `C (+)= A B` for each product, `A [m, k]`.
///
/// # Panics
/// If a matrix does not fit its slice: a bug in the caller, never bad input.
pub(crate) fn matmul(m: usize, k: usize, a: Rows<'_>, products: &mut [Product<'_>]) {
    matmul_at(Isa::best(), m, k, a, products);
}

fn matmul_at(isa: Isa, m: usize, k: usize, a: Rows<'_>, products: &mut [Product<'_>]) {
    if m == 0 || k == 0 {
        return;
    }
    check_left(m, k, a);
    SCRATCH.with_borrow_mut(|scratch| {
        let jobs = jobs(m, k, a, products, &mut scratch.tails);
        // SAFETY: all that `jobs` and `a` read and write was checked to lie inside its slice.
        unsafe { run(isa, m, k, a, jobs, scratch) };
    });
}

/// As [`matmul`], shared among the threads of `pool`: by rows if there are many, else by columns.
pub(crate) fn matmul_on<'a>(
    pool: &Pool,
    m: usize,
    k: usize,
    a: Rows<'a>,
    products: &mut [Product<'a>],
) {
    let plan = Plan::new(m, k, a, products);
    if pool.threads() == 1 || !plan.is_worth_sharing() {
        return matmul(m, k, a, products);
    }
    if is_tall(m, pool) {
        let groups = m.div_ceil(ROWS);
        let parts = groups.min(pool.threads());
        pool.run(parts, &|part| {
            let rows = groups * part / parts * ROWS..(groups * (part + 1) / parts * ROWS).min(m);
            // SAFETY: parts are different rows.
            unsafe { plan.run_rows(rows) };
        });
    } else {
        let parts = plan.parts(pool);
        pool.run(parts, &|part| {
            // SAFETY: parts are different columns.
            unsafe { plan.run_panels(plan.part(part, parts)) };
        });
    }
}

/// Whether `m` rows are shared out by rows.
pub(crate) fn is_tall(m: usize, pool: &Pool) -> bool {
    m >= 2 * ROWS * pool.threads()
}

/// Products with the same left factor whose panels or rows several threads may take.
pub(crate) struct Plan<'a> {
    m: usize,
    k: usize,
    a: Rows<'a>,
    jobs: Vec<Job>,
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
    fn parts(&self, pool: &Pool) -> usize {
        self.n_panels().min(pool.threads())
    }

    /// The panels of part `part` of `parts`.
    fn part(&self, part: usize, parts: usize) -> Range<usize> {
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
    unsafe fn run_rows(&self, rows: Range<usize>) {
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

    fn panels(&self, wanted: Range<usize>) -> Vec<Job> {
        let mut before = 0;
        let mut jobs = Vec::with_capacity(self.jobs.len());
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

/// Packs what has to be packed and runs the tiles, on vectors or on the matrix unit.
///
/// # Safety
/// As for [`tile::run`], and the machine has the unit of each job; `a` holds `[m, k]`.
unsafe fn run(isa: Isa, m: usize, k: usize, a: Rows<'_>, jobs: Vec<Job>, scratch: &mut Scratch) {
    for (job, wide) in jobs.iter().filter_map(|job| Some((job, job.wide?))) {
        // SAFETY: passed on to the caller.
        unsafe { wide::run(isa, m, k, a, job, wide, scratch) };
    }
    let jobs = jobs.into_iter().filter(|job| job.wide.is_none());
    let (jobs, others): (Vec<Job>, _) = jobs.partition(|job| job.unit == Unit::Vector);
    // SAFETY: passed on to the caller; packing goes through checked slices.
    unsafe {
        if !others.is_empty() {
            run_on_matrix_unit(m, k, a, &others, scratch);
        }
        let packed = &mut scratch.rows;
        match a {
            _ if jobs.is_empty() => {}
            Rows::RowMajor { data, stride } | Rows::Rounded { data, stride } if m <= NARROW => {
                packed.reserve(m * k);
                pack(data, stride, m, k, m, packed);
                if a.is_rounded() {
                    elementwise::round_to_bf16(&mut packed[..m * k]);
                }
                let left = Left {
                    data: packed.as_ptr(),
                    group_stride: 0,
                    step: m,
                };
                tile::run(isa, left, m, k, &jobs);
            }
            Rows::RowMajor { .. } | Rows::Rounded { .. } => {
                packed.reserve(ROW_BLOCK * INNER_BLOCK);
                run_blocks(isa, m, k, a, jobs, packed);
            }
            Rows::Transposed { data, stride } => {
                let left = Left {
                    data: data.as_ptr(),
                    group_stride: ROWS,
                    step: stride,
                };
                tile::run(isa, left, m, k, &jobs);
            }
        }
    }
}

/// # Safety
/// As for [`super::amx::run`].
#[cfg(target_arch = "x86_64")]
unsafe fn run_on_matrix_unit(m: usize, k: usize, a: Rows<'_>, jobs: &[Job], scratch: &mut Scratch) {
    let parts = &mut scratch.parts;
    // SAFETY: passed on to the caller.
    unsafe {
        match a {
            Rows::RowMajor { data, stride } => {
                super::amx::run::<3>(m, k, data, stride, jobs, parts);
            }
            Rows::Rounded { data, stride } => {
                super::amx::run::<1>(m, k, data, stride, jobs, parts);
            }
            Rows::Transposed { .. } => {}
        }
    }
}

/// Nothing asks for the unit where there is none.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn run_on_matrix_unit(_: usize, _: usize, _: Rows<'_>, _: &[Job], _: &mut Scratch) {}

/// Walks `A` in blocks of rows and of the inner dimension, packing each block once for all jobs.
///
/// # Safety
/// As for [`tile::run`].
unsafe fn run_blocks(
    isa: Isa,
    m: usize,
    k: usize,
    a: Rows<'_>,
    mut jobs: Vec<Job>,
    packed: &mut [f32],
) {
    let (data, stride) = match a {
        Rows::RowMajor { data, stride }
        | Rows::Rounded { data, stride }
        | Rows::Transposed { data, stride } => (data, stride),
    };
    let add: Vec<bool> = jobs.iter().map(|job| job.add).collect();
    for row in (0..m).step_by(ROW_BLOCK) {
        let rows = ROW_BLOCK.min(m - row);
        for inner in (0..k).step_by(INNER_BLOCK) {
            let depth = INNER_BLOCK.min(k - inner);
            for group in (0..rows).step_by(ROWS) {
                let source = &data[(row + group) * stride + inner..];
                let target = &mut packed[group * depth..];
                pack(source, stride, ROWS.min(rows - group), depth, ROWS, target);
            }
            if a.is_rounded() {
                elementwise::round_to_bf16(&mut packed[..round_up(rows, ROWS) * depth]);
            }
            let left = Left {
                data: packed.as_ptr(),
                group_stride: ROWS * depth,
                step: ROWS,
            };
            for (job, add) in jobs.iter_mut().zip(&add) {
                job.add = *add || inner > 0;
            }
            // SAFETY: the block lies inside the product that the caller vouches for.
            unsafe { tile::run(isa, left, rows, depth, &jobs) };
            for job in &mut jobs {
                job.b = job.b.wrapping_add(depth * job.row_stride);
            }
        }
        for job in &mut jobs {
            job.b = job.b.wrapping_sub(k * job.row_stride);
            job.c = job.c.wrapping_add(rows * job.stride);
        }
    }
}

/// Interleaves `rows` rows of `depth` values: element `(i, t)` goes to `t * step + i`.
fn pack(data: &[f32], stride: usize, rows: usize, depth: usize, step: usize, out: &mut [f32]) {
    if step == 1 {
        out[..depth].copy_from_slice(&data[..depth]);
        return;
    }
    let quads = if step.is_multiple_of(4) {
        rows / 4 * 4
    } else {
        0
    };
    for i in (0..quads).step_by(4) {
        tile::pack_quad(&data[i * stride..], stride, depth, step, &mut out[i..]);
    }
    for i in quads..rows {
        let row = &data[i * stride..][..depth];
        for (slot, value) in out[i..].iter_mut().step_by(step).zip(row) {
            *slot = *value;
        }
    }
}

fn check_left(m: usize, k: usize, a: Rows<'_>) {
    let (len, end) = match a {
        Rows::RowMajor { data, stride } | Rows::Rounded { data, stride } => {
            (data.len(), (m - 1) * stride + k)
        }
        Rows::Transposed { data, stride } => (data.len(), (k - 1) * stride + m),
    };
    assert!(end <= len, "left factor [{m}, {k}] ends at {end} of {len}");
}

/// Checks the bounds of the products and turns them into what the tiles want.
///
/// A row-major right factor whose last panel is not full would be read past its end, so that panel
/// is copied to `tails` and becomes a job of its own.
fn jobs(
    m: usize,
    k: usize,
    a: Rows<'_>,
    products: &mut [Product<'_>],
    tails: &mut Buffer,
) -> Vec<Job> {
    tails.reserve(products.iter().filter(|p| p.b.has_tail()).count() * k * PANEL);
    let mut tails = tails.chunks_exact_mut(k * PANEL);
    let mut jobs = Vec::with_capacity(products.len() + 1);
    let is_row_major = !matches!(a, Rows::Transposed { .. });
    for product in products.iter_mut().filter(|p| p.b.n > 0) {
        let b = product.b;
        assert!(b.k == k, "inner dimensions {k} and {}", b.k);
        assert!(
            b.unit == Unit::Vector || is_row_major,
            "the matrix unit takes rows only"
        );
        assert!(
            b.end() <= b.data.len(),
            "right factor ends at {} of {}",
            b.end(),
            b.data.len()
        );
        let end = (m - 1) * product.stride + b.n;
        assert!(
            end <= product.len,
            "output ends at {end} of {}",
            product.len
        );
        let full = Job {
            b: b.data.as_ptr(),
            n: if b.has_tail() {
                b.n / PANEL * PANEL
            } else {
                b.n
            },
            row_stride: b.row_stride,
            panel_stride: b.panel_stride,
            c: product.c,
            stride: product.stride,
            add: product.store == Store::Add,
            unit: b.unit,
            tiles: b.tiles,
            wide: b.quantized.map(|(weights, turned)| Wide {
                weights,
                turned,
                first: 0,
            }),
        };
        let tail = if b.has_tail() { tails.next() } else { None };
        if let Some(tail) = tail {
            b.copy_tail(tail);
            let c = full.c.wrapping_add(full.n);
            let n = b.n - full.n;
            jobs.push(Job {
                b: tail.as_ptr(),
                n,
                row_stride: PANEL,
                panel_stride: 0,
                c,
                ..full
            });
        }
        jobs.push(full);
    }
    jobs
}

#[cfg(test)]
mod tests;
