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

use smallvec::SmallVec;

use self::block::{Block, configure, release};
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

/// Rows whose parts stay in the first-level cache while columns pass by.
const ROWS: usize = 2 * SIDE;

/// Most tiles of inner dimension of these rows: 24 or 48 KiB. With fewer, outputs would be read and written
/// again more often, which costs more than parts that come from the second-level cache.
const fn inner_tiles(parts: usize) -> usize {
    if parts == 1 { 12 } else { 8 }
}

/// As [`inner_tiles`], for fewer rows than a tile has: then weights pass by once, in the order they lie in.
const fn inner_tiles_of_few(parts: usize) -> usize {
    if parts == 1 { 32 } else { 22 }
}

/// Floats of the tiles of columns that stay in the second-level cache until all rows were multiplied with
/// them: 1 MiB, or half of it. A row is read and rounded again for each so many columns; one of three parts
/// has three times as much to do in between. In unit tests small products take several turns, too.
const fn columns(parts: usize) -> usize {
    match parts {
        _ if cfg!(test) => 1 << 14,
        1 => 1 << 18,
        _ => 1 << 17,
    }
}

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
/// So many columns as stay in the second-level cache are made tiles of, where they are none yet. Then 32
/// rows at a time are split into the first-level cache and multiplied with all of these columns (Goto and
/// van de Geijn 2008, with the factors in each other's place).
///
/// # Safety
/// The machine has the unit that all jobs name; `a` holds the rows; each job's `b` holds [`Tiles`] or panels
/// of `[k, n]`, and its `c` is valid for writes of `[m, n]` and aliases nothing else. No dimension is 0.
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
        jobs.iter().all(|job| job.tiles == unit && job.n > 0) && k > 0,
        "one unit for all jobs, and no dimension is 0"
    );
    debug_assert!(
        L == 1 || unit != TileUnit::Dots,
        "dots take factors of one part"
    );
    let tiles = k.div_ceil(DEPTH);
    let most = if m < SIDE {
        const { inner_tiles_of_few(L) }
    } else {
        const { inner_tiles(L) }
    };
    let depth = tiles.div_ceil(tiles.div_ceil(most));
    let cached = if m > ROWS { const { columns(L) } } else { 0 };
    scratch.rows.reserve(2 * depth * L * TILE);
    scratch
        .columns
        .reserve(cached.max(2 * depth * PARTS * TILE));
    for first in (0..tiles).step_by(depth) {
        let stretch = Stretch {
            unit,
            first,
            depth: depth.min(tiles - first),
            k,
        };
        let mut rest = Rest {
            jobs,
            column: 0,
            stretch,
            cached,
        };
        let mut held = None;
        loop {
            // SAFETY: passed on to the caller.
            let pieces = unsafe { rest.next(&mut scratch.columns) };
            if pieces.is_empty() {
                break;
            }
            for row in (0..m).step_by(ROWS) {
                let rows = ROWS.min(m - row);
                let a = &a[row * stride + first * DEPTH..];
                // SAFETY: passed on to the caller; sizes are checked inside.
                unsafe {
                    if held != Some(row) {
                        held = Some(row);
                        stretch.split_rows::<L>(a, stride, rows, &mut scratch.rows);
                    }
                    stretch.multiply::<L>(&scratch.rows, row, rows, &pieces);
                }
            }
        }
        // SAFETY: passed on to the caller.
        unsafe { unit.release() };
    }
}

/// A stretch of the inner dimension, and what multiplies it.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    unit: TileUnit,
    /// Its first tile, and how many it has.
    first: usize,
    depth: usize,
    /// All of the inner dimension, in numbers.
    k: usize,
}

impl Stretch {
    /// Splits up to 32 rows, which begin at the stretch: `[rows / 16][depth][parts]`.
    ///
    /// # Safety
    /// The machine has the unit.
    unsafe fn split_rows<const L: usize>(
        &self,
        a: &[f32],
        stride: usize,
        rows: usize,
        out: &mut [f32],
    ) {
        let k = (self.k - self.first * DEPTH).min(self.depth * DEPTH);
        for (i, group) in (0..rows).step_by(SIDE).enumerate() {
            let (a, rows) = (&a[group * stride..], SIDE.min(rows - group));
            let out = &mut out[i * self.depth * L * TILE..];
            // SAFETY: passed on to the caller; sizes are checked inside.
            unsafe { self.unit.split_rows::<L>(a, stride, rows, k, out) };
        }
    }

    /// Multiplies up to 32 rows, from `row` on, whose parts `a` has.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn multiply<const L: usize>(
        &self,
        a: &[f32],
        row: usize,
        rows: usize,
        pieces: &[Piece<'_>],
    ) {
        // The registers take groups of 16 rows, or what is left.
        let whole = rows / SIDE * SIDE;
        let groups = [(0, whole), (whole, rows - whole)];
        for (from, rows) in groups.into_iter().filter(|(_, rows)| *rows > 0) {
            let a = &a[from / SIDE * self.depth * L * TILE..];
            // SAFETY: passed on to the caller.
            unsafe {
                self.unit.configure(rows.min(SIDE));
                for piece in pieces {
                    piece.multiply::<L>(self, a, row + from, rows);
                }
            }
        }
    }

    /// Floats of the tiles of 32 columns.
    fn panel(&self, job: &Job) -> usize {
        self.depth * parts_of(job) * 2 * TILE
    }

    /// Columns `from..to` of a factor that is tiles.
    fn piece<'a>(&self, job: &'a Job, from: usize, to: usize) -> Piece<'a> {
        let panel = job.b.wrapping_add(from / PANEL * job.panel_stride);
        Piece {
            job,
            from,
            to,
            b: panel.wrapping_add(self.first * TILE),
            b_stride: self.k.div_ceil(DEPTH) * TILE,
            panel_stride: job.panel_stride,
            ahead: Some(job.panel_stride),
        }
    }

    /// Columns `from..to` of a factor that is none yet, of which tiles are made in `room`, a panel after the
    /// other: `[columns / 16][depth][parts]`.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn make_piece<'a>(
        &self,
        job: &'a Job,
        from: usize,
        to: usize,
        room: &mut [f32],
    ) -> Piece<'a> {
        let panel = self.panel(job);
        for (column, out) in (from..to).step_by(PANEL).zip(room.chunks_exact_mut(panel)) {
            let source = job.b.wrapping_add(column / PANEL * job.panel_stride);
            let strip = Strip {
                data: source,
                stride: job.row_stride,
                columns: round_up(PANEL.min(to - column), SIDE),
                first: self.first * DEPTH,
                k: self.k,
            };
            let turned = Turned {
                data: source,
                stride: job.row_stride,
            };
            // SAFETY: passed on to the caller: the factor has `k` rows.
            unsafe {
                match job.unit {
                    Unit::MatrixSplit => self.unit.split::<PARTS>(strip, self.depth, out),
                    Unit::MatrixRounded => self.unit.split::<1>(strip, self.depth, out),
                    Unit::MatrixTurned => self.unit.turn(turned, self.first, self.depth, out),
                    Unit::Matrix | Unit::Vector => {}
                }
            }
        }
        Piece {
            job,
            from,
            to,
            b: room.as_ptr(),
            b_stride: panel / 2,
            panel_stride: panel,
            ahead: None,
        }
    }
}

/// Parts of a job's factor.
fn parts_of(job: &Job) -> usize {
    if job.unit == Unit::MatrixSplit {
        PARTS
    } else {
        1
    }
}

/// Columns of a job whose tiles of a stretch are there.
#[derive(Debug, Clone, Copy)]
struct Piece<'a> {
    job: &'a Job,
    from: usize,
    to: usize,
    /// Tiles of the first 16 columns.
    b: *const f32,
    /// Floats to those of the next 16, and of the next 32.
    b_stride: usize,
    panel_stride: usize,
    /// Floats to those to ask memory for meanwhile.
    ahead: Option<usize>,
}

impl Piece<'_> {
    /// Multiplies rows from `row` on, whose parts `a` has.
    ///
    /// # Safety
    /// As for [`run`], with the registers configured for the rows.
    unsafe fn multiply<const L: usize>(
        &self,
        stretch: &Stretch,
        a: &[f32],
        row: usize,
        rows: usize,
    ) {
        let Stretch {
            unit, first, depth, ..
        } = *stretch;
        let stride = self.job.stride;
        let c = self.job.c.wrapping_add(row * stride);
        for (i, column) in (self.from..self.to).step_by(PANEL).enumerate() {
            let block = Block {
                unit,
                depth,
                a: a.as_ptr(),
                a_stride: depth * L * TILE,
                b: self.b.wrapping_add(i * self.panel_stride),
                b_stride: self.b_stride,
                c: c.wrapping_add(column),
                stride,
                add: self.job.add || first > 0,
                // Later rows find them in the cache.
                ahead: self.ahead.filter(|_| row == 0),
            };
            let columns = PANEL.min(self.to - column);
            // SAFETY: passed on to the caller.
            unsafe {
                match parts_of(self.job) {
                    PARTS => block.run::<L, PARTS>(rows, columns),
                    _ => block.run::<L, 1>(rows, columns),
                }
            }
        }
    }
}

/// What is still to be multiplied of a stretch.
struct Rest<'a> {
    jobs: &'a [Job],
    /// Column of the first of these.
    column: usize,
    stretch: Stretch,
    /// Floats of tiles that stay in the cache until other rows need them; 0 if none will.
    cached: usize,
}

impl<'a> Rest<'a> {
    /// The next columns, as many as are cached together, or none if all are done. Tiles that are made of
    /// them are in `scratch`.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn next(&mut self, mut scratch: &mut [f32]) -> SmallVec<[Piece<'a>; 4]> {
        let mut pieces = SmallVec::new();
        let mut used = 0;
        while let [job, others @ ..] = self.jobs {
            let panel = self.stretch.panel(job);
            let are_tiles = matches!(job.unit, Unit::Matrix | Unit::Vector);
            let left = (job.n - self.column).div_ceil(PANEL);
            let panels = if are_tiles && self.cached == 0 {
                left
            } else {
                let room = self.cached.saturating_sub(used) / panel;
                room.max(usize::from(used == 0)).min(left)
            };
            if panels == 0 {
                break;
            }
            let (from, to) = (self.column, job.n.min(self.column + panels * PANEL));
            pieces.push(if are_tiles {
                self.stretch.piece(job, from, to)
            } else {
                let (room, free) = scratch.split_at_mut(panels * panel);
                scratch = free;
                // SAFETY: passed on to the caller.
                unsafe { self.stretch.make_piece(job, from, to, room) }
            });
            used += panels * panel;
            (self.jobs, self.column) = if to == job.n {
                (others, 0)
            } else {
                (self.jobs, to)
            };
        }
        pieces
    }
}
