//! Tiles of a transposed matrix, made from those of the matrix when their turn comes.
//!
//! The backward pass multiplies with the transpose of every weight. To keep it as well would take as much
//! memory as the weights; what turning it costs instead is in `docs/benchmarks.md` (held once or twice).

use std::arch::x86_64::{
    __m512i, _mm512_load_si512, _mm512_loadu_si512, _mm512_shuffle_epi8, _mm512_shuffle_i64x2,
    _mm512_store_si512, _mm512_unpackhi_epi64, _mm512_unpacklo_epi64,
};

use super::block::prefetch_far;
use super::{SIDE, TILE};
use crate::cpu::buffer::LINE;

/// Columns of a matrix whose transpose is held in tiles: 32 of them, which are rows of the tiles.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turned {
    /// The tile of the first 16 rows.
    pub(super) data: *const f32,
    /// Floats to the tile of the next 16 rows.
    pub(super) stride: usize,
}

impl Turned {
    /// Turns `depth` tiles of inner dimension from tile `first` on: `[columns / 16][depth]` tiles.
    ///
    /// # Safety
    /// The tiles are there, 64 bytes aligned, and the machine has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn turn(&self, first: usize, depth: usize, out: &mut [f32]) {
        assert!(2 * depth * TILE <= out.len());
        for tile in 0..depth {
            for half in 0..2 {
                let source = self
                    .data
                    .wrapping_add((2 * (first + tile) + half) * self.stride);
                let low = out[tile * TILE + half * TILE / 2..].as_mut_ptr();
                let high = out[(depth + tile) * TILE + half * TILE / 2..].as_mut_ptr();
                // SAFETY: the caller vouches for the source, and each target is half a tile inside `out`.
                unsafe {
                    turn_rows(source, low);
                    turn_rows(source.wrapping_add(TILE / 2), high);
                }
                // The next columns lie behind.
                for line in 0..SIDE {
                    prefetch_far(source.wrapping_add(TILE + line * LINE));
                }
            }
        }
    }
}

/// Turns eight rows `[8 pairs][16][2]` into half a tile `[8 pairs][16][2]`: row `p` holds the values
/// `(2p, j)` and `(2p + 1, j)`, row `q` of the result `(2q, i)` and `(2q + 1, i)` transposed.
///
/// # Safety
/// Eight rows of 16 floats can be read and written; the target is 64 bytes aligned.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn turn_rows(source: *const f32, target: *mut f32) {
    const ORDER: [u8; 64] = {
        // Of each four numbers the inner two change places.
        let mut order = [0; 64];
        let mut i = 0;
        while i < 64 {
            let word = match i / 2 % 4 {
                1 => 2,
                2 => 1,
                other => other,
            };
            order[i] = (i / 8 % 2 * 8 + word * 2 + i % 2) as u8;
            i += 1;
        }
        order
    };
    // SAFETY: passed on to the caller; the order has 64 bytes.
    unsafe {
        let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
        let row = |p: usize| {
            let pairs = _mm512_load_si512(source.wrapping_add(p * SIDE).cast());
            _mm512_shuffle_epi8(pairs, order)
        };
        let rows = [0, 1, 2, 3, 4, 5, 6, 7].map(row);
        for (q, row) in transpose(rows).into_iter().enumerate() {
            _mm512_store_si512(target.wrapping_add(q * SIDE).cast(), row);
        }
    }
}

/// Transposes eight rows of eight 64-bit values.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; 8]) -> [__m512i; 8] {
    let [a, b, c, d, e, f, g, h] = rows;
    let even = columns(
        _mm512_unpacklo_epi64(a, b),
        _mm512_unpacklo_epi64(c, d),
        _mm512_unpacklo_epi64(e, f),
        _mm512_unpacklo_epi64(g, h),
    );
    let odd = columns(
        _mm512_unpackhi_epi64(a, b),
        _mm512_unpackhi_epi64(c, d),
        _mm512_unpackhi_epi64(e, f),
        _mm512_unpackhi_epi64(g, h),
    );
    [
        even[0], odd[0], even[1], odd[1], even[2], odd[2], even[3], odd[3],
    ]
}

/// Transposes four rows of four 128-bit values.
#[inline]
#[target_feature(enable = "avx512f")]
fn columns(a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> [__m512i; 4] {
    const EVEN: i32 = 0x88;
    const ODD: i32 = 0xdd;
    let (low, low_odd) = (
        _mm512_shuffle_i64x2::<EVEN>(a, b),
        _mm512_shuffle_i64x2::<ODD>(a, b),
    );
    let (high, high_odd) = (
        _mm512_shuffle_i64x2::<EVEN>(c, d),
        _mm512_shuffle_i64x2::<ODD>(c, d),
    );
    [
        _mm512_shuffle_i64x2::<EVEN>(low, high),
        _mm512_shuffle_i64x2::<EVEN>(low_odd, high_odd),
        _mm512_shuffle_i64x2::<ODD>(low, high),
        _mm512_shuffle_i64x2::<ODD>(low_odd, high_odd),
    ]
}
