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

mod factors;
mod plan;
mod wide;

use std::cell::RefCell;
use std::marker::PhantomData;

pub(crate) use self::factors::{Cols, Panels, Rounding, Rows};
pub(crate) use self::plan::Plan;
use smallvec::SmallVec;

use super::buffer::{Buffer, round_up};
use super::elementwise;
use super::pool::{Pool, SharedMut};
use super::simd::Isa;
use super::tile::{self, Job, Left, Unit, Wide};

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

/// Products with one left factor: the layers of a group, and what an adapter adds to them.
pub(crate) type Products<'a> = SmallVec<[Product<'a>; 4]>;

/// What the tiles are to do of them.
type Jobs = SmallVec<[Job; 4]>;

/// Where a thread keeps packed factors between calls, so that a product allocates nothing.
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

/// Packs what has to be packed and runs the tiles, on vectors or on the matrix unit.
///
/// # Safety
/// As for [`tile::run`], and the machine has the unit of each job; `a` holds `[m, k]`.
unsafe fn run(isa: Isa, m: usize, k: usize, a: Rows<'_>, jobs: Jobs, scratch: &mut Scratch) {
    for (job, wide) in jobs.iter().filter_map(|job| Some((job, job.wide?))) {
        // SAFETY: passed on to the caller.
        unsafe { wide::run(isa, m, k, a, job, wide, scratch) };
    }
    let jobs = jobs.into_iter().filter(|job| job.wide.is_none());
    let (jobs, others): (Jobs, _) = jobs.partition(|job| job.unit == Unit::Vector);
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
    mut jobs: Jobs,
    packed: &mut [f32],
) {
    let (data, stride) = match a {
        Rows::RowMajor { data, stride }
        | Rows::Rounded { data, stride }
        | Rows::Transposed { data, stride } => (data, stride),
    };
    let add: SmallVec<[bool; 4]> = jobs.iter().map(|job| job.add).collect();
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
fn jobs(m: usize, k: usize, a: Rows<'_>, products: &mut [Product<'_>], tails: &mut Buffer) -> Jobs {
    tails.reserve(products.iter().filter(|p| p.b.has_tail()).count() * k * PANEL);
    let mut tails = tails.chunks_exact_mut(k * PANEL);
    let mut jobs = Jobs::new();
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
        if full.n > 0 {
            jobs.push(full);
        }
    }
    jobs
}

#[cfg(test)]
mod tests;
