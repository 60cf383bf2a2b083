//! Splitting `f32` into bf16 numbers whose sum it is.
//!
//! Each part is what is left, rounded to nearest: then parts are as small as can be, and the products
//! of parts that nobody computes have either sign. An infinity leaves a NaN, and so does what rounds
//! to one, above 3.39e38.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_epi32, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_blend_epi16,
    _mm512_maskz_loadu_ps, _mm512_permutex2var_epi16, _mm512_permutexvar_epi16, _mm512_set1_epi32,
    _mm512_srli_epi32, _mm512_store_si512, _mm512_storeu_si512, _mm512_sub_ps,
};

use super::{DEPTH, PARTS, SIDE, TILE};
use crate::cpu::gemm::PANEL;

/// The next part of each value, in the upper halves, and what it leaves; both are exact.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn part(x: __m512) -> (__m512i, __m512) {
    let (half, high) = (
        _mm512_set1_epi32(0x8000),
        _mm512_set1_epi32(0xffff_0000_u32.cast_signed()),
    );
    let rounded = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), high);
    (rounded, _mm512_sub_ps(x, _mm512_castsi512_ps(rounded)))
}

/// Splits up to 16 rows of `k` values into tiles `[k / 32][parts][rows][32]` of bf16, zero padded.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn split_rows(a: &[f32], stride: usize, rows: usize, k: usize, out: &mut [f32]) {
    let tiles = k.div_ceil(DEPTH);
    assert!((rows - 1) * stride + k <= a.len() && tiles * PARTS * TILE <= out.len());
    let odd_words: [u16; 32] = std::array::from_fn(|i| 2 * i as u16 + 1);
    // SAFETY: 32 words are 64 bytes.
    let odd_words = unsafe { _mm512_loadu_si512(odd_words.as_ptr().cast()) };
    for row in 0..rows {
        for tile in 0..tiles {
            let at = row * stride + tile * DEPTH;
            let left = k - tile * DEPTH;
            let mask = |n: usize| if n >= SIDE { u16::MAX } else { (1 << n) - 1 };
            let source = a.as_ptr().wrapping_add(at);
            let target = out
                .as_mut_ptr()
                .wrapping_add(tile * PARTS * TILE + row * SIDE);
            // SAFETY: only the `left` values of the row are read, and the assertion covers the tiles.
            unsafe {
                let mut low = _mm512_maskz_loadu_ps(mask(left), source);
                let upper = left.saturating_sub(SIDE);
                let mut top = _mm512_maskz_loadu_ps(mask(upper), source.wrapping_add(SIDE));
                for i in 0..PARTS {
                    let (of_low, of_top);
                    (of_low, low) = part(low);
                    (of_top, top) = part(top);
                    let words = _mm512_permutex2var_epi16(of_low, odd_words, of_top);
                    _mm512_storeu_si512(target.wrapping_add(i * TILE).cast(), words);
                }
            }
        }
    }
}

/// As [`split_rows`] with one part, each value rounded to the nearest bf16 number: of two the even one.
/// A NaN stays one.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn round_rows(a: &[f32], stride: usize, rows: usize, k: usize, out: &mut [f32]) {
    let tiles = k.div_ceil(DEPTH);
    assert!((rows - 1) * stride + k <= a.len() && tiles * TILE <= out.len());
    for row in 0..rows {
        let source = a.as_ptr().wrapping_add(row * stride);
        let target = out.as_mut_ptr().wrapping_add(row * SIDE);
        for tile in 0..tiles {
            let left = k - tile * DEPTH;
            let mask = |n: usize| if n >= SIDE { u16::MAX } else { (1 << n) - 1 };
            let source = source.wrapping_add(tile * DEPTH);
            // SAFETY: only the `left` values of the row are read, and the assertion covers the tiles.
            unsafe {
                let low = _mm512_maskz_loadu_ps(mask(left), source);
                let upper = left.saturating_sub(SIDE);
                let top = _mm512_maskz_loadu_ps(mask(upper), source.wrapping_add(SIDE));
                let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(top, low));
                _mm512_storeu_si512(target.wrapping_add(tile * TILE).cast(), pairs);
            }
        }
    }
}

/// Rounds `[32][32]` numbers, as [`round_rows`] does, into the tiles of the first 16 columns and of the others.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn round_square(square: &[f32; DEPTH * PANEL], out: [&mut [f32; TILE]; 2]) {
    let order = alternating();
    for (group, tile) in out.into_iter().enumerate() {
        let (pairs, _) = square.as_chunks::<{ 2 * PANEL }>();
        let (lines, _) = tile.as_chunks_mut::<SIDE>();
        for (line, pair) in lines.iter_mut().zip(pairs) {
            // SAFETY: both rows of the pair have 16 columns from that of the group on, and the line has 64
            // bytes.
            unsafe {
                let even = _mm512_loadu_ps(pair[group * SIDE..].as_ptr());
                let odd = _mm512_loadu_ps(pair[PANEL + group * SIDE..].as_ptr());
                let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
                let both = _mm512_permutexvar_epi16(order, both);
                _mm512_storeu_si512(line.as_mut_ptr().cast(), both);
            }
        }
    }
}

/// Picks the numbers of two rows in turns.
#[inline]
#[target_feature(enable = "avx512f")]
fn alternating() -> __m512i {
    let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: 32 words are 64 bytes.
    unsafe { _mm512_loadu_si512(order.as_ptr().cast()) }
}

/// Part of a right factor of `f32`: 16 or 32 columns, and rows `first..` of `k` that lie `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    pub(super) data: *const f32,
    pub(super) stride: usize,
    pub(super) columns: usize,
    pub(super) first: usize,
    pub(super) k: usize,
}

impl Strip {
    /// As [`Strip::split`] with one part, rounded as [`round_rows`] does.
    ///
    /// # Safety
    /// The columns have `k` rows, and the machine AVX512-BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn round(&self, depth: usize, out: &mut [f32]) {
        assert!(self.columns * depth * TILE <= SIDE * out.len());
        let order = alternating();
        for pair in 0..depth * DEPTH / 2 {
            for group in 0..self.columns / SIDE {
                let tile = (group * depth + pair / SIDE) * TILE + pair % SIDE * SIDE;
                // SAFETY: rows beyond the last are masked out, and the assertion covers the tiles.
                unsafe {
                    let [even, odd] = self.rows(pair, group);
                    let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
                    let both = _mm512_permutexvar_epi16(order, both);
                    _mm512_store_si512(out.as_mut_ptr().wrapping_add(tile).cast(), both);
                }
            }
        }
    }

    /// Splits `depth` tiles of each group of 16 columns: `[columns / 16][depth][parts]`, zero padded.
    ///
    /// # Safety
    /// The columns have `k` rows, and the machine AVX-512.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn split(&self, depth: usize, out: &mut [f32]) {
        assert!(self.columns * depth * PARTS * TILE <= SIDE * out.len());
        for pair in 0..depth * DEPTH / 2 {
            for group in 0..self.columns / SIDE {
                let tile = (group * depth + pair / SIDE) * PARTS * TILE + pair % SIDE * SIDE;
                // SAFETY: rows beyond the last are masked out, and the assertion covers the tiles.
                unsafe { self.split_pair(pair, group, out.as_mut_ptr().wrapping_add(tile)) };
            }
        }
    }

    /// Splits two rows of 16 columns: the parts of both, interleaved.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn split_pair(&self, pair: usize, group: usize, out: *mut f32) {
        // SAFETY: passed on to the caller.
        let [mut even, mut odd] = unsafe { self.rows(pair, group) };
        for i in 0..PARTS {
            let (of_even, of_odd);
            (of_even, even) = part(even);
            (of_odd, odd) = part(odd);
            let low = _mm512_srli_epi32::<16>(of_even);
            let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, low, of_odd);
            // SAFETY: passed on to the caller.
            unsafe { _mm512_store_si512(out.wrapping_add(i * TILE).cast(), both) };
        }
    }

    /// 16 columns of a pair of rows, which are zero beyond the last.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn rows(&self, pair: usize, group: usize) -> [__m512; 2] {
        let t = self.first + 2 * pair;
        [t, t + 1].map(|t| {
            let mask = if t < self.k { u16::MAX } else { 0 };
            let source = self.data.wrapping_add(t * self.stride + group * SIDE);
            // SAFETY: passed on to the caller.
            unsafe { _mm512_maskz_loadu_ps(mask, source) }
        })
    }
}
