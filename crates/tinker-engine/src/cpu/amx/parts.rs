//! Splitting `f32` into bf16 numbers whose sum it is.

use std::arch::x86_64::{
    _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_loadu_si512,
    _mm512_mask_blend_epi16, _mm512_maskz_loadu_ps, _mm512_permutex2var_epi16, _mm512_set1_epi32,
    _mm512_srli_epi32, _mm512_store_si512, _mm512_storeu_si512, _mm512_sub_ps,
};

use super::{DEPTH, PARTS, SIDE, TILE};

/// Splits up to 16 rows of `k` values into tiles `[k / 32][parts][rows][32]` of bf16, zero padded.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn split_rows(a: &[f32], stride: usize, rows: usize, k: usize, out: &mut [f32]) {
    let tiles = k.div_ceil(DEPTH);
    assert!((rows - 1) * stride + k <= a.len() && tiles * PARTS * TILE <= out.len());
    let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
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
                for part in 0..PARTS {
                    // The upper half of a float is a bf16 number; what it leaves is exact.
                    let (l, t) = (_mm512_castps_si512(low), _mm512_castps_si512(top));
                    let words = _mm512_permutex2var_epi16(l, odd_words, t);
                    _mm512_storeu_si512(target.wrapping_add(part * TILE).cast(), words);
                    low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(l, high)));
                    top = _mm512_sub_ps(top, _mm512_castsi512_ps(_mm512_and_si512(t, high)));
                }
            }
        }
    }
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
        let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        let row = |t: usize| {
            let mask = if t < self.k { u16::MAX } else { 0 };
            let source = self.data.wrapping_add(t * self.stride + group * SIDE);
            // SAFETY: passed on to the caller.
            unsafe { _mm512_maskz_loadu_ps(mask, source) }
        };
        let t = self.first + 2 * pair;
        let (mut even, mut odd) = (row(t), row(t + 1));
        for part in 0..PARTS {
            let (e, o) = (_mm512_castps_si512(even), _mm512_castps_si512(odd));
            // The upper half of a float is a bf16 number; what it leaves is exact.
            let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(e), o);
            // SAFETY: passed on to the caller.
            unsafe { _mm512_store_si512(out.wrapping_add(part * TILE).cast(), both) };
            even = _mm512_sub_ps(even, _mm512_castsi512_ps(_mm512_and_si512(e, high)));
            odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(o, high)));
        }
    }
}
