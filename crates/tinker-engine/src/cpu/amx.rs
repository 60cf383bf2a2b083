//! Matrix products on the tile registers of newer Intel processors (AMX), to the accuracy of `f32`.
//!
//! The unit multiplies bf16 numbers, sixteen times as many a cycle as vectors multiply `f32`, and adds
//! in `f32`. A 24-bit significand is three of 8 bits, so an activation is the sum of three bf16 numbers
//! (exact but near underflow: the unit takes subnormal numbers for 0); a weight is one where the
//! model file holds bf16, else three as well. Of the nine products of parts the six that reach into
//! 24 bits are added (Henry, Tang and Heinecke 2019), which leaves an error like that of one rounding
//! to `f32`, at two to four times the speed of `f32` vectors.
//!
//! Weights of one part are kept as tiles. Those of three are split when their turn comes, from the
//! panels that vectors read: to read them split would take half as much again from memory, which is
//! what the unit waits for.
//!
//! As with vectors, the sum over the inner dimension has one order, whatever the rows and columns:
//! blocks of 32, and in a block the pairs of parts in the order of [`Block::step`].

mod block;
mod dots;
#[cfg(test)]
mod emulated;
mod parts;
mod tiles;
mod turn;

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use self::block::{Ahead, Block, NextTiles, configure, release};
use self::parts::Strip;
pub(crate) use self::tiles::{Tiles, is_bf16};
use self::turn::Turned;
use super::buffer::{Buffer, round_up};
use super::gemm::PANEL;
use super::simd::Isa;
use super::tile::{Job, TileUnit, Unit};

/// Rows of a left tile, and columns of a right one.
const SIDE: usize = 16;

/// Inner dimension of a tile.
const DEPTH: usize = 32;

/// Floats in the memory of a tile: 16 rows of 64 bytes.
const TILE: usize = 256;

/// Parts of an activation.
const PARTS: usize = 3;

/// Rows that are split into parts at a time.
const ROW_BLOCK: usize = 256;

/// Tiles of inner dimension that they are split for: up to 1 MiB, which stays in the second-level cache.
const fn inner_tiles(parts: usize) -> usize {
    if parts == 1 { 32 } else { 22 }
}

/// Tiles of inner dimension of 32 rows or columns of some parts that stay in the first-level cache,
/// 24 KiB of them, while those of the other factor pass by.
const fn inner_block(parts: usize) -> usize {
    if parts == 1 { 12 } else { 4 }
}

/// Rows from which on the columns stay in the first-level cache, not the rows, where both are one part:
/// then weights are read once for all rows, instead of once for each 32.
const MANY_ROWS: usize = 96;

/// Whether this machine multiplies pairs of bf16 numbers on its vectors.
pub(crate) fn has_dots() -> bool {
    Isa::best() == Isa::Avx512 && is_x86_feature_detected!("avx512bf16")
}

/// Whether this machine has the matrix unit and the system lets this process use it.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const TILE_AND_BF16: u32 = 1 << 24 | 1 << 22;
        let has_leaf = __cpuid(0).eax >= 7;
        has_leaf
            && has_dots()
            && __cpuid_count(7, 0).edx & TILE_AND_BF16 == TILE_AND_BF16
            && is_permitted()
    })
}

/// Asks Linux for the tile registers, which are off until a process wants them.
fn is_permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_PRCTL: i64 = 158;
        const REQUEST_PERMISSION: i64 = 0x1023;
        const TILE_DATA: i64 = 18;
        let outcome: i64;
        // SAFETY: the call changes nothing but which registers the process may use.
        unsafe {
            std::arch::asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => outcome,
                in("rdi") REQUEST_PERMISSION,
                in("rsi") TILE_DATA,
                out("rcx") _,
                out("r11") _,
                options(nostack),
            );
        }
        outcome == 0
    }
    #[cfg(not(target_os = "linux"))]
    false
}

impl TileUnit {
    /// Makes ready for blocks whose groups have `height` rows.
    unsafe fn configure(self, height: usize) {
        if self == Self::Amx {
            // SAFETY: passed on to the caller.
            unsafe { configure(height) };
        }
    }

    unsafe fn release(self) {
        if self == Self::Amx {
            // SAFETY: passed on to the caller.
            unsafe { release() };
        }
    }

    /// Splits up to 16 rows of `k` values into `L` parts, [`parts::split_rows`].
    unsafe fn split_rows<const L: usize>(
        self,
        a: &[f32],
        stride: usize,
        rows: usize,
        k: usize,
        out: &mut [f32],
    ) {
        #[cfg(test)]
        if self == Self::Emulated {
            return emulated::split_rows::<L>(a, stride, rows, k, out);
        }
        // SAFETY: both units are on machines with these instructions.
        unsafe {
            match L {
                1 => parts::round_rows(a, stride, rows, k, out),
                _ => parts::split_rows(a, stride, rows, k, out),
            }
        }
    }

    /// Splits columns into `P` parts, [`Strip::split`].
    unsafe fn split<const P: usize>(self, strip: Strip, depth: usize, out: &mut [f32]) {
        #[cfg(test)]
        if self == Self::Emulated {
            // SAFETY: passed on to the caller.
            return unsafe { emulated::split::<P>(strip, depth, out) };
        }
        // SAFETY: as in `split_rows`.
        unsafe {
            match P {
                1 => strip.round(depth, out),
                _ => strip.split(depth, out),
            }
        }
    }

    /// Rounds 32 rows of 32 columns, [`parts::round_square`].
    unsafe fn round_square(self, square: &[f32; DEPTH * PANEL], out: [&mut [f32; TILE]; 2]) {
        #[cfg(test)]
        if self == Self::Emulated {
            for (group, out) in out.into_iter().enumerate() {
                let strip = Strip {
                    data: square[group * SIDE..].as_ptr(),
                    stride: PANEL,
                    columns: SIDE,
                    first: 0,
                    k: DEPTH,
                };
                // SAFETY: the square has the rows.
                unsafe { emulated::split::<1>(strip, 1, out) };
            }
            return;
        }
        // SAFETY: as in `split_rows`.
        unsafe { parts::round_square(square, out) };
    }

    /// [`Turned::turn`].
    unsafe fn turn(self, turned: Turned, first: usize, depth: usize, out: &mut [f32]) {
        #[cfg(test)]
        if self == Self::Emulated {
            // SAFETY: passed on to the caller.
            return unsafe { emulated::turn(turned, first, depth, out) };
        }
        // SAFETY: as in `split_rows`.
        unsafe { turned.turn(first, depth, out) };
    }
}

/// Floats in the memory of 32 columns of `k` rows as [`Tiles`] has them.
pub(super) fn panel_of_tiles(k: usize) -> usize {
    k.div_ceil(DEPTH) * 2 * TILE
}

/// Rounds 32 columns of `k` rows to bf16, into tiles as [`Tiles`] has them; `rows(from, ..)` gives the rows
/// from a multiple of 32 on, `[rows][32]`.
///
/// # Safety
/// The machine has the unit.
pub(super) unsafe fn panel_to_tiles(
    unit: TileUnit,
    k: usize,
    rows: impl Fn(usize, &mut [f32]),
    out: &mut [f32],
) {
    let mut square = [0.0; DEPTH * PANEL];
    let (low, high) = out.split_at_mut(out.len() / 2);
    let (low, _) = low.as_chunks_mut::<TILE>();
    let (high, _) = high.as_chunks_mut::<TILE>();
    for ((from, low), high) in (0..k).step_by(DEPTH).zip(low).zip(high) {
        let n = DEPTH.min(k - from);
        rows(from, &mut square[..n * PANEL]);
        square[n * PANEL..].fill(0.0);
        // SAFETY: passed on to the caller.
        unsafe { unit.round_square(&square, [low, high]) };
    }
}

/// Where the parts of both factors are kept.
#[derive(Debug)]
pub(super) struct Scratch {
    rows: Buffer,
    columns: Buffer,
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self {
            rows: Buffer::zeros(0),
            columns: Buffer::zeros(0),
        }
    }
}

/// Computes each job, `A [m, k]` row-major with rows `stride` apart, of which `L` parts are taken: 3 are
/// the number, 1 is the number rounded to bf16.
///
/// # Safety
/// The machine has the unit that all jobs name; `a` holds the rows; each job's `b` holds [`Tiles`] or panels
/// of `[k, n]`, and its `c` is valid for writes of `[m, n]` and aliases nothing else.
pub(super) unsafe fn run<const L: usize>(
    m: usize,
    k: usize,
    a: &[f32],
    stride: usize,
    jobs: &[Job],
    scratch: &mut Scratch,
) {
    let Some(unit) = jobs.first().map(|job| job.tiles) else {
        return;
    };
    debug_assert!(
        jobs.iter().all(|job| job.tiles == unit),
        "one unit for all jobs"
    );
    debug_assert!(
        L == 1 || unit != TileUnit::Dots,
        "dots take factors of one part"
    );
    let tiles = k.div_ceil(DEPTH);
    let inner_tiles = const { inner_tiles(L) };
    let room = round_up(ROW_BLOCK.min(m), SIDE) * inner_tiles.min(tiles);
    scratch.rows.reserve(room * DEPTH / 2 * L);
    scratch
        .columns
        .reserve(2 * TILE * inner_block(1).max(inner_block(PARTS) * PARTS));
    for row in (0..m).step_by(ROW_BLOCK) {
        let rows = ROW_BLOCK.min(m - row);
        for first in (0..tiles).step_by(inner_tiles) {
            let depth = inner_tiles.min(tiles - first);
            let columns = first * DEPTH..k.min((first + depth) * DEPTH);
            for (i, group) in (0..rows).step_by(SIDE).enumerate() {
                let source = &a[(row + group) * stride + columns.start..];
                let target = &mut scratch.rows[i * depth * L * TILE..];
                let rows = SIDE.min(rows - group);
                // SAFETY: passed on to the caller; sizes are checked inside.
                unsafe { unit.split_rows::<L>(source, stride, rows, columns.len(), target) };
            }
            let left = Left::<L> {
                unit,
                data: scratch.rows.as_ptr(),
                rows,
                depth,
                first,
                k,
            };
            for job in jobs {
                let c = job.c.wrapping_add(row * job.stride);
                let job = Job {
                    c,
                    add: job.add || first > 0,
                    ..*job
                };
                // SAFETY: passed on to the caller.
                unsafe { left.multiply(&job, &mut scratch.columns) };
            }
        }
    }
}

/// A block of the left factor, in `L` parts.
#[derive(Clone, Copy)]
struct Left<const L: usize> {
    unit: TileUnit,
    data: *const f32,
    rows: usize,
    /// Tiles of inner dimension, and the first of them in the whole factor.
    depth: usize,
    first: usize,
    /// Inner dimension of the whole factor.
    k: usize,
}

impl<const L: usize> Left<L> {
    /// Multiplies with one right factor, two groups of columns at a time.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn multiply(&self, job: &Job, scratch: &mut [f32]) {
        // SAFETY: passed on to the caller.
        unsafe {
            match job.unit {
                Unit::MatrixSplit => self.multiply_split::<PARTS>(job, scratch),
                Unit::MatrixRounded => self.multiply_split::<1>(job, scratch),
                Unit::MatrixTurned => self.multiply_turned(job, scratch),
                Unit::Matrix | Unit::Vector if L == 1 && self.rows >= MANY_ROWS => {
                    self.multiply_strips(job);
                }
                Unit::Matrix | Unit::Vector => self.multiply_tiles(job),
            }
            self.unit.release();
        }
    }

    /// Rows that a configuration of the registers serves: pairs of groups, then what is left.
    fn groups(&self) -> impl Iterator<Item = (usize, usize)> {
        let whole = self.rows / SIDE * SIDE;
        let pairs = (0..whole).step_by(2 * SIDE);
        let rest = (whole < self.rows).then_some((whole, self.rows - whole));
        pairs
            .map(move |row| (row, (2 * SIDE).min(whole - row)))
            .chain(rest)
    }

    /// The product from inner tile `from` on, `depth` of them, for the columns from `column` on.
    fn block(&self, job: &Job, column: usize, from: usize, depth: usize) -> Block {
        Block {
            unit: self.unit,
            depth,
            a: self.data.wrapping_add(from * L * TILE),
            a_stride: self.depth * L * TILE,
            b: std::ptr::null(),
            b_stride: 0,
            c: job.c.wrapping_add(column),
            stride: job.stride,
            add: job.add || from > 0,
            ahead: Ahead::Nothing,
        }
    }

    /// As [`Left::block`], of a factor that is kept as tiles.
    fn block_of_tiles(&self, job: &Job, column: usize, from: usize, depth: usize) -> Block {
        let panel = job.b.wrapping_add(column / PANEL * job.panel_stride);
        Block {
            b: panel.wrapping_add((self.first + from) * TILE),
            b_stride: self.k.div_ceil(DEPTH) * TILE,
            ahead: Ahead::Columns(job.panel_stride),
            ..self.block(job, column, from, depth)
        }
    }

    /// The left parts of 32 rows stay in the first-level cache while all columns pass by.
    unsafe fn multiply_tiles(&self, job: &Job) {
        for (row, rows) in self.groups() {
            // SAFETY: passed on to the caller.
            unsafe { self.unit.configure(rows.min(SIDE)) };
            // Few rows are a small left factor: then tiles pass by in the order they lie in.
            let step = if rows < SIDE {
                self.depth
            } else {
                const { inner_block(L) }
            };
            for from in (0..self.depth).step_by(step) {
                let depth = step.min(self.depth - from);
                for column in (0..job.n).step_by(PANEL) {
                    let block = self.block_of_tiles(job, column, from, depth);
                    let columns = PANEL.min(job.n - column);
                    // SAFETY: passed on to the caller.
                    unsafe { block.at_row(row).run::<L, 1>(rows, columns) };
                }
            }
        }
    }

    /// 32 columns stay in the first-level cache while all rows pass by.
    unsafe fn multiply_strips(&self, job: &Job) {
        // SAFETY: passed on to the caller.
        unsafe { self.unit.configure(self.rows.min(SIDE)) };
        for column in (0..job.n).step_by(PANEL) {
            let step = const { inner_block(1) };
            for from in (0..self.depth).step_by(step) {
                let depth = step.min(self.depth - from);
                let next = if from + depth < self.depth {
                    self.block_of_tiles(job, column, from + depth, 0)
                } else {
                    self.block_of_tiles(job, column + PANEL, 0, 0)
                };
                let next = NextTiles {
                    data: next.b,
                    row: 0,
                    rows: self.rows,
                };
                let block = Block {
                    ahead: Ahead::Strip(next),
                    ..self.block_of_tiles(job, column, from, depth)
                };
                // SAFETY: passed on to the caller.
                unsafe { self.all_rows::<1>(block, PANEL.min(job.n - column)) };
            }
        }
    }

    /// The `P` right parts of 32 columns stay in the first-level cache while all rows pass by.
    unsafe fn multiply_split<const P: usize>(&self, job: &Job, scratch: &mut [f32]) {
        // SAFETY: passed on to the caller.
        unsafe { self.unit.configure(self.rows.min(SIDE)) };
        let step = const { inner_block(P) };
        for column in (0..job.n).step_by(PANEL) {
            let panel = job.b.wrapping_add(column / PANEL * job.panel_stride);
            let columns = PANEL.min(job.n - column);
            for from in (0..self.depth).step_by(step) {
                let depth = step.min(self.depth - from);
                let strip = Strip {
                    data: panel,
                    stride: job.row_stride,
                    columns: round_up(columns, SIDE),
                    first: (self.first + from) * DEPTH,
                    k: self.k,
                };
                // SAFETY: the job's panels hold `k` rows.
                unsafe { self.unit.split::<P>(strip, depth, scratch) };
                let last = from + depth == self.depth;
                let next = if last {
                    panel.wrapping_add(job.panel_stride + self.first * DEPTH * job.row_stride)
                } else {
                    panel.wrapping_add((self.first + from + depth) * DEPTH * job.row_stride)
                };
                let block = Block {
                    b: scratch.as_ptr(),
                    b_stride: depth * P * TILE,
                    ahead: if job.row_stride == PANEL {
                        Ahead::Rows(next, self.rows)
                    } else {
                        Ahead::Nothing
                    },
                    ..self.block(job, column, from, depth)
                };
                // SAFETY: passed on to the caller.
                unsafe { self.all_rows::<P>(block, columns) };
            }
        }
    }

    /// As [`Left::multiply_split`], with columns that are turned instead of split.
    unsafe fn multiply_turned(&self, job: &Job, scratch: &mut [f32]) {
        // SAFETY: passed on to the caller.
        unsafe { self.unit.configure(self.rows.min(SIDE)) };
        let step = const { inner_block(1) };
        for column in (0..job.n).step_by(PANEL) {
            let turned = Turned {
                data: job.b.wrapping_add(column / PANEL * job.panel_stride),
                stride: job.row_stride,
            };
            for from in (0..self.depth).step_by(step) {
                let depth = step.min(self.depth - from);
                // SAFETY: the job's tiles hold `k` rows of the whole factor.
                unsafe { self.unit.turn(turned, self.first + from, depth, scratch) };
                let block = Block {
                    b: scratch.as_ptr(),
                    b_stride: depth * TILE,
                    ..self.block(job, column, from, depth)
                };
                // SAFETY: passed on to the caller.
                unsafe { self.all_rows::<1>(block, PANEL.min(job.n - column)) };
            }
        }
    }

    /// Multiplies all rows with up to 32 columns of `P` parts. The registers are configured for the first
    /// rows, before and after.
    unsafe fn all_rows<const P: usize>(&self, block: Block, columns: usize) {
        for (row, rows) in self.groups() {
            let partial = row > 0 && rows < SIDE;
            // SAFETY: passed on to the caller.
            unsafe {
                if partial {
                    self.unit.configure(rows);
                }
                block.at_row(row).run::<L, P>(rows, columns);
                if partial {
                    self.unit.configure(SIDE);
                }
            }
        }
    }
}
