//! The tile registers: a block of 32 rows and 32 columns of sums, and what feeds it.

use std::arch::asm;
use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

use super::{PARTS, SIDE, TILE};
use crate::cpu::buffer::{LINE, round_up};
use crate::cpu::gemm::PANEL;
use crate::cpu::tile::TileUnit;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

/// Sets up the registers: 0 to 3 sums and 4 to 5 left tiles of `height` rows, 6 to 7 right tiles.
pub(super) unsafe fn configure(height: usize) {
    let mut config = Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes_per_row: [0; 16],
        rows: [0; 16],
    };
    for register in 0..8 {
        config.bytes_per_row[register] = 64;
        config.rows[register] = if register < 6 {
            height as u8
        } else {
            SIDE as u8
        };
    }
    // SAFETY: the caller has the unit, and the configuration is valid.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack)) };
}

/// Gives the registers back, so that the system need not save them.
pub(super) unsafe fn release() {
    // SAFETY: the caller has the unit.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

macro_rules! load {
    ($register:literal, $p:expr, $stride:expr) => {
        asm!(concat!("tileloadd ", $register, ", [{p} + {stride}*1]"),
            p = in(reg) $p, stride = in(reg) $stride, options(nostack))
    };
}

macro_rules! store {
    ($register:literal, $p:expr, $stride:expr) => {
        asm!(concat!("tilestored [{p} + {stride}*1], ", $register),
            p = in(reg) $p, stride = in(reg) $stride, options(nostack))
    };
}

macro_rules! multiply {
    ($sum:literal, $a:literal, $b:literal) => {
        asm!(
            concat!("tdpbf16ps ", $sum, ", ", $a, ", ", $b),
            options(nostack, nomem)
        )
    };
}

macro_rules! zero {
    ($register:literal) => {
        asm!(concat!("tilezero ", $register), options(nostack, nomem))
    };
}

/// Up to 32 rows and 32 columns, and the output of their product.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) unit: TileUnit,
    /// Tiles of inner dimension.
    pub(super) depth: usize,
    pub(super) a: *const f32,
    /// Floats between the groups of rows.
    pub(super) a_stride: usize,
    pub(super) b: *const f32,
    /// Floats between the groups of columns.
    pub(super) b_stride: usize,
    pub(super) c: *mut f32,
    pub(super) stride: usize,
    pub(super) add: bool,
    /// Floats to the tiles to ask memory for meanwhile.
    pub(super) ahead: Option<usize>,
}

/// The parts of both factors that are multiplied, in their order. Neighbours share a part, which is then
/// not loaded again.
pub(super) const fn order(of_a: usize, of_b: usize) -> &'static [(usize, usize)] {
    match (of_a, of_b) {
        (1, 1) => &[(0, 0)],
        (1, _) => &[(0, 2), (0, 1), (0, 0)],
        (_, 1) => &[(2, 0), (1, 0), (0, 0)],
        _ => &[(0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0)],
    }
}

impl Block {
    /// Computes a block with `L` parts of the left and `P` of the right factor, by way of the stack where
    /// the output ends within a tile.
    ///
    /// # Safety
    /// As for [`super::run`], with the registers configured for the rows.
    pub(super) unsafe fn run<const L: usize, const P: usize>(&self, rows: usize, columns: usize) {
        // SAFETY: passed on to the caller.
        unsafe {
            if columns.is_multiple_of(SIDE) {
                return self.run_whole::<L, P>(rows, columns);
            }
            let mut whole = [0.0f32; 4 * TILE];
            if self.add {
                for row in 0..rows {
                    let target = whole[row * PANEL..].as_mut_ptr();
                    self.c
                        .add(row * self.stride)
                        .copy_to_nonoverlapping(target, columns);
                }
            }
            let inside = Self {
                c: whole.as_mut_ptr(),
                stride: PANEL,
                ..*self
            };
            inside.run_whole::<L, P>(rows, round_up(columns, SIDE));
            for row in 0..rows {
                let source = whole[row * PANEL..].as_ptr();
                self.c
                    .add(row * self.stride)
                    .copy_from_nonoverlapping(source, columns);
            }
        }
    }

    unsafe fn run_whole<const L: usize, const P: usize>(&self, rows: usize, columns: usize) {
        // SAFETY: passed on to the caller.
        unsafe {
            match self.unit {
                TileUnit::Amx => {}
                TileUnit::Dots => return super::dots::run(self, rows, columns),
                #[cfg(test)]
                TileUnit::Emulated => return super::emulated::run(self, L, P, rows, columns),
            }
            match (rows > SIDE, columns > SIDE) {
                (true, true) => self.tiles::<2, 2, L, P>(),
                (true, false) => self.tiles::<2, 1, L, P>(),
                (false, true) => self.tiles::<1, 2, L, P>(),
                (false, false) => self.tiles::<1, 1, L, P>(),
            }
        }
    }

    /// Computes `C (+)= A B` of `R` by `C` tiles, `L` parts of `A` and `P` of `B`.
    ///
    /// The compiler never uses tile registers itself, so what one statement leaves in them the next
    /// finds, as long as nothing called in between uses them.
    #[inline(always)]
    unsafe fn tiles<const R: usize, const C: usize, const L: usize, const P: usize>(&self) {
        // SAFETY: passed on to the caller.
        unsafe {
            self.begin::<R, C>();
            for tile in 0..self.depth {
                self.fetch(tile);
                self.step::<R, C, L, P>(tile);
            }
            self.end::<R, C>();
        }
    }

    /// Asks for tile `tile` of the columns ahead.
    #[inline(always)]
    pub(super) fn fetch(&self, tile: usize) {
        let Some(ahead) = self.ahead else { return };
        let b = self.b.wrapping_add(ahead + tile * TILE);
        for line in 0..SIDE {
            prefetch(b.wrapping_add(line * LINE));
            prefetch(b.wrapping_add(self.b_stride + line * LINE));
        }
    }

    /// Zeroes the sums, or loads the output to add to.
    #[inline(always)]
    unsafe fn begin<const R: usize, const C: usize>(&self) {
        let (c, bytes) = (self.c, self.stride * size_of::<f32>());
        let below = c.wrapping_add(SIDE * self.stride);
        // SAFETY: passed on to the caller.
        unsafe {
            if !self.add {
                zero!("tmm0");
                zero!("tmm1");
                zero!("tmm2");
                zero!("tmm3");
                return;
            }
            load!("tmm0", c, bytes);
            if C == 2 {
                load!("tmm1", c.wrapping_add(SIDE), bytes);
            }
            if R == 2 {
                load!("tmm2", below, bytes);
                if C == 2 {
                    load!("tmm3", below.wrapping_add(SIDE), bytes);
                }
            }
        }
    }

    /// Adds the products of one tile of inner dimension, the largest last.
    #[inline(always)]
    unsafe fn step<const R: usize, const C: usize, const L: usize, const P: usize>(
        &self,
        tile: usize,
    ) {
        const ROW_BYTES: usize = 64;
        let order = const { order(L, P) };
        let a = self.a.wrapping_add(tile * L * TILE);
        let b = self.b.wrapping_add(tile * P * TILE);
        let mut loaded = (PARTS, PARTS);
        // SAFETY: passed on to the caller.
        unsafe {
            for &(of_a, of_b) in order {
                if loaded.1 != of_b {
                    load!("tmm6", b.wrapping_add(of_b * TILE), ROW_BYTES);
                    if C == 2 {
                        load!(
                            "tmm7",
                            b.wrapping_add(self.b_stride + of_b * TILE),
                            ROW_BYTES
                        );
                    }
                }
                if loaded.0 != of_a {
                    load!("tmm4", a.wrapping_add(of_a * TILE), ROW_BYTES);
                    if R == 2 {
                        load!(
                            "tmm5",
                            a.wrapping_add(self.a_stride + of_a * TILE),
                            ROW_BYTES
                        );
                    }
                }
                loaded = (of_a, of_b);
                multiply!("tmm0", "tmm4", "tmm6");
                if C == 2 {
                    multiply!("tmm1", "tmm4", "tmm7");
                }
                if R == 2 {
                    multiply!("tmm2", "tmm5", "tmm6");
                    if C == 2 {
                        multiply!("tmm3", "tmm5", "tmm7");
                    }
                }
            }
        }
    }

    /// Stores the sums.
    #[inline(always)]
    unsafe fn end<const R: usize, const C: usize>(&self) {
        let (c, bytes) = (self.c, self.stride * size_of::<f32>());
        let below = c.wrapping_add(SIDE * self.stride);
        // SAFETY: passed on to the caller.
        unsafe {
            store!("tmm0", c, bytes);
            if C == 2 {
                store!("tmm1", c.wrapping_add(SIDE), bytes);
            }
            if R == 2 {
                store!("tmm2", below, bytes);
                if C == 2 {
                    store!("tmm3", below.wrapping_add(SIDE), bytes);
                }
            }
        }
    }
}

/// Starts loading a cache line into the first-level cache; any address will do.
#[inline(always)]
fn prefetch(p: *const f32) {
    // SAFETY: prefetching never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
}

/// Starts loading a cache line into the second-level cache; any address will do.
#[inline(always)]
pub(super) fn prefetch_far(p: *const f32) {
    // SAFETY: prefetching never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
}
