//! Blocks on vectors that multiply pairs of bf16 numbers (AVX512-BF16), for processors that have no matrix
//! unit. They read the same tiles.
//!
//! An output is one chain over the inner dimension, of a pair the odd product first. That is another order
//! than the matrix unit's, so bits differ from it.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_castps_si512, _mm512_dpbf16_ps, _mm512_load_ps,
    _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use super::block::Block;
use super::{SIDE, TILE};

/// Rows whose sums are kept in registers, each for 32 columns.
const ROWS: usize = 8;

/// Computes a block of `columns`, 16 or 32, both factors of one part.
///
/// # Safety
/// As for [`Block::run`], on a machine with the instructions.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn run(block: &Block, rows: usize, columns: usize) {
    for row in (0..rows).step_by(ROWS) {
        let a = block.a.wrapping_add(row / SIDE * block.a_stride);
        let block = Block {
            a: a.wrapping_add(row % SIDE * SIDE),
            c: block.c.wrapping_add(row * block.stride),
            ..*block
        };
        // SAFETY: passed on to the caller.
        unsafe {
            if columns > SIDE {
                of_rows::<2>(&block, ROWS.min(rows - row));
            } else {
                of_rows::<1>(&block, ROWS.min(rows - row));
            }
        }
    }
}

/// Picks the loop for `rows`, a run-time number up to [`ROWS`].
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn of_rows<const C: usize>(block: &Block, rows: usize) {
    macro_rules! pick {
        ($($n:literal)*) => {
            match rows {
                $($n => tiles::<$n, C>(block),)*
                _ => {}
            }
        };
    }
    // SAFETY: passed on to the caller.
    unsafe { pick!(1 2 3 4 5 6 7 8) }
}

/// `R` rows and `C` vectors of sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tiles<const R: usize, const C: usize>(block: &Block) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); C]; R];
        if block.add {
            for (i, row) in sums.iter_mut().enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(block.c.add(i * block.stride + j * SIDE));
                }
            }
        }
        for tile in 0..block.depth {
            block.fetch(tile);
            for pair in 0..SIDE {
                let b = block.b.wrapping_add(tile * TILE + pair * SIDE);
                let a = block.a.wrapping_add(tile * TILE + pair);
                let mut of_b = [_mm512_setzero_ps(); C];
                for (j, value) in of_b.iter_mut().enumerate() {
                    *value = _mm512_load_ps(b.wrapping_add(j * block.b_stride));
                }
                for (i, row) in sums.iter_mut().enumerate() {
                    let x = pairs(_mm512_set1_ps(*a.wrapping_add(i * SIDE)));
                    for (sum, value) in row.iter_mut().zip(of_b) {
                        *sum = _mm512_dpbf16_ps(*sum, x, pairs(value));
                    }
                }
            }
        }
        for (i, row) in sums.iter().enumerate() {
            for (j, sum) in row.iter().enumerate() {
                _mm512_storeu_ps(block.c.add(i * block.stride + j * SIDE), *sum);
            }
        }
    }
}

/// The same 512 bits as pairs of bf16 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(bits: __m512) -> __m512bh {
    let bits: __m512i = _mm512_castps_si512(bits);
    // SAFETY: both are 512 bits, of which any are valid.
    unsafe { std::mem::transmute(bits) }
}
