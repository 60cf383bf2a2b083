//! Frozen weights of 8 or 4 bits, made when a model is loaded and widened to `f32` a few panels at a
//! time when a product reads them.
//!
//! A widened weight is its code times the scale of its block, with one rounding. So it has the same bits
//! on every instruction set, and a product has the bits that `f32` weights of these values give.

use super::gemm::PANEL;
#[cfg(target_arch = "x86_64")]
use super::simd::Isa;
use super::simd::kernels;
use super::tile;
use crate::backend::Quantization;

/// Inputs that share a scale in [`Codes::Nf4`].
const BLOCK: usize = 64;

/// What 4 bits stand for, in parts of the scale: values that a normal distribution has equally often
/// (`NormalFloat`, Dettmers et al. 2023, appendix E).
#[rustfmt::skip]
const NF4: [f32; 16] = [
    -1.0, -0.696_192_8, -0.525_073_05, -0.394_917_5, -0.284_441_38, -0.184_773_43, -0.091_050_036, 0.0,
    0.079_580_3, 0.160_930_2, 0.246_112_3, 0.337_915_24, 0.440_709_83, 0.562_617, 0.722_956_84, 1.0,
];

/// A `[k, n]` right factor, `W^T` of a layer `W [n, k]`, in codes.
#[derive(Debug)]
pub(crate) struct Quantized {
    k: usize,
    n: usize,
    codes: Codes,
    /// `[n / 32][blocks of k][32]`.
    scales: Vec<f32>,
}

#[derive(Debug)]
enum Codes {
    /// `[n / 32][k][32]`; all of a column is one block.
    Int8(Vec<i8>),
    /// `[n / 32][k][16]`: a byte holds columns `j` and, in its upper half, `j + 16`.
    Nf4(Vec<u8>),
}

impl Quantized {
    /// Quantizes columns of which `column(j, ..)` gives the values, `[k]`.
    pub(crate) fn from_columns<E>(
        quantization: Quantization,
        k: usize,
        n: usize,
        mut column: impl FnMut(usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let panels = n.div_ceil(PANEL);
        let (codes, blocks) = match quantization {
            Quantization::Int8 => (Codes::Int8(vec![0; panels * k * PANEL]), 1),
            Quantization::Nf4 => {
                let codes = vec![0; panels * k * PANEL / 2];
                (Codes::Nf4(codes), k.div_ceil(BLOCK))
            }
        };
        let mut quantized = Self {
            k,
            n,
            codes,
            scales: vec![0.0; panels * blocks * PANEL],
        };
        let mut values = vec![0.0; k];
        for j in 0..n {
            column(j, &mut values)?;
            quantized.set_column(j, &values);
        }
        Ok(quantized)
    }

    fn set_column(&mut self, j: usize, values: &[f32]) {
        let (panel, lane) = (j / PANEL, j % PANEL);
        let (block, n_blocks) = (self.block(), self.n_blocks());
        for (b, values) in values.chunks(block).enumerate() {
            let largest = values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            let first = panel * self.k + b * block;
            let scale = match &mut self.codes {
                Codes::Int8(codes) => {
                    let scale = largest / 127.0;
                    for (t, x) in (first..).zip(values) {
                        codes[t * PANEL + lane] = int8(*x, scale);
                    }
                    scale
                }
                Codes::Nf4(codes) => {
                    for (t, x) in (first..).zip(values) {
                        let byte = &mut codes[t * (PANEL / 2) + lane % 16];
                        *byte |= nf4(*x, largest) << (lane / 16 * 4);
                    }
                    largest
                }
            };
            self.scales[(panel * n_blocks + b) * PANEL + lane] = scale;
        }
    }

    /// Inputs that share a scale.
    fn block(&self) -> usize {
        match self.codes {
            Codes::Int8(_) => self.k.max(1),
            Codes::Nf4(_) => BLOCK,
        }
    }

    fn n_blocks(&self) -> usize {
        self.k.div_ceil(self.block())
    }

    /// Widens rows `from..` of a panel of 32 columns to `out`, `[rows][32]`.
    pub(crate) fn widen(&self, panel: usize, from: usize, out: &mut [f32]) {
        let (block, n_blocks) = (self.block(), self.n_blocks());
        let rows = out.len() / PANEL;
        let mut row = from;
        while row < from + rows {
            let end = ((row / block + 1) * block).min(from + rows);
            let scales = &self.scales[(panel * n_blocks + row / block) * PANEL..][..PANEL];
            let out = &mut out[(row - from) * PANEL..(end - from) * PANEL];
            let range = panel * self.k + row..panel * self.k + end;
            match &self.codes {
                Codes::Int8(codes) => {
                    widen_int8(&codes[range.start * PANEL..range.end * PANEL], scales, out);
                }
                Codes::Nf4(codes) => {
                    let half = PANEL / 2;
                    widen_nf4(&codes[range.start * half..range.end * half], scales, out);
                }
            }
            row = end;
        }
    }

    /// Widens rows `from..`, a multiple of 32, of a panel of 32 columns of the transposed factor to `out`,
    /// `[rows][32]`.
    pub(crate) fn widen_turned(&self, panel: usize, from: usize, out: &mut [f32]) {
        let mut square = [0.0; PANEL * PANEL];
        let first = panel * PANEL;
        let columns = PANEL.min(self.k - first);
        for (p, out) in (from / PANEL..).zip(out.chunks_mut(PANEL * PANEL)) {
            self.widen(p, first, &mut square[..columns * PANEL]);
            let rows = out.len() / PANEL;
            for j in (0..PANEL).step_by(4) {
                tile::pack_quad(&square[j * PANEL..], PANEL, rows, PANEL, &mut out[j..]);
            }
        }
    }

    /// Copies column `j`, widened, to `out`, `[k]`.
    pub(crate) fn column(&self, j: usize, out: &mut [f32]) {
        let mut row = [0.0; PANEL];
        for (t, out) in out.iter_mut().enumerate() {
            self.widen(j / PANEL, t, &mut row);
            *out = row[j % PANEL];
        }
    }

    /// Inner dimension.
    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// Columns.
    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.k * self.n
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        let codes = match &self.codes {
            Codes::Int8(codes) => size_of_val(&codes[..]),
            Codes::Nf4(codes) => size_of_val(&codes[..]),
        };
        codes + size_of_val(&self.scales[..])
    }
}

/// The nearest of the codes -127 to 127.
fn int8(x: f32, scale: f32) -> i8 {
    if scale > 0.0 {
        (x / scale).round().clamp(-127.0, 127.0) as i8
    } else {
        0
    }
}

/// The code whose value is nearest, the lower of two that are equally near.
fn nf4(x: f32, scale: f32) -> u8 {
    let part = if scale > 0.0 { x / scale } else { 0.0 };
    let above = NF4.partition_point(|value| *value < part).min(15);
    let is_lower = above > 0 && part - NF4[above - 1] <= NF4[above] - part;
    (above - usize::from(is_lower)) as u8
}

kernels! {
    /// `out = codes * scales`, rows of 32.
    fn widen_int8 / widen_int8_at(codes: &[i8], scales: &[f32], out: &mut [f32]) {
        let scales = &scales[..PANEL];
        for (out, codes) in out.chunks_exact_mut(PANEL).zip(codes.chunks_exact(PANEL)) {
            for ((out, code), scale) in out.iter_mut().zip(codes).zip(scales) {
                *out = f32::from(*code) * scale;
            }
        }
    }

    /// As [`widen_int8`], of the values that 4 bits stand for.
    fn widen_nf4_by_load / widen_nf4_by_load_at(codes: &[u8], scales: &[f32], out: &mut [f32]) {
        let (low_scales, high_scales) = scales[..PANEL].split_at(PANEL / 2);
        let rows = out.chunks_exact_mut(PANEL).zip(codes.chunks_exact(PANEL / 2));
        for (out, codes) in rows {
            let (low, high) = out.split_at_mut(PANEL / 2);
            for ((out, code), scale) in low.iter_mut().zip(codes).zip(low_scales) {
                *out = NF4[usize::from(code & 15)] * scale;
            }
            for ((out, code), scale) in high.iter_mut().zip(codes).zip(high_scales) {
                *out = NF4[usize::from(code >> 4)] * scale;
            }
        }
    }
}

/// As [`widen_int8`], of the values that 4 bits stand for.
fn widen_nf4(codes: &[u8], scales: &[f32], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if Isa::best() == Isa::Avx512 {
        // SAFETY: an `Isa` is only made for a machine that has it.
        return unsafe { x86::widen_nf4(codes, scales, out) };
    }
    widen_nf4_by_load(codes, scales, out);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The 16 values of 4 bits in one register, where looking up sixteen of them is one instruction.

    use std::arch::x86_64::{
        _mm_loadu_si128, _mm512_cvtepu8_epi32, _mm512_loadu_ps, _mm512_mul_ps,
        _mm512_permutexvar_ps, _mm512_srli_epi32, _mm512_storeu_ps,
    };

    use super::{NF4, PANEL};

    /// As [`super::widen_nf4`]; lanes of the table are chosen by the lower four bits alone.
    #[target_feature(enable = "avx512f")]
    pub(super) fn widen_nf4(codes: &[u8], scales: &[f32], out: &mut [f32]) {
        const HALF: usize = PANEL / 2;
        let (low_scales, high_scales) = scales[..PANEL].split_at(HALF);
        let (rows, _) = out.as_chunks_mut::<PANEL>();
        let (codes, _) = codes.as_chunks::<HALF>();
        // SAFETY: each load and store is of 16 floats, or 16 bytes, of a slice or array that has them.
        unsafe {
            let table = _mm512_loadu_ps(NF4.as_ptr());
            let low_scales = _mm512_loadu_ps(low_scales.as_ptr());
            let high_scales = _mm512_loadu_ps(high_scales.as_ptr());
            for (out, codes) in rows.iter_mut().zip(codes) {
                let low = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
                let high = _mm512_srli_epi32::<4>(low);
                let low = _mm512_permutexvar_ps(low, table);
                let high = _mm512_permutexvar_ps(high, table);
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(low, low_scales));
                let out = out[HALF..].as_mut_ptr();
                _mm512_storeu_ps(out, _mm512_mul_ps(high, high_scales));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Isa;

    /// A matrix, `[n, k]`, with a column of zeros and sizes that differ.
    fn values(k: usize, n: usize) -> Vec<f32> {
        let value = |i: usize| {
            let size = if i / k == 1 {
                0.0
            } else {
                1.0 + (i / k) as f32
            };
            ((i * 37 % 101) as f32 / 50.0 - 1.0) * size
        };
        (0..n * k).map(value).collect()
    }

    fn quantized(quantization: Quantization, k: usize, n: usize, of: &[f32]) -> Quantized {
        let column = |j: usize, out: &mut [f32]| {
            out.copy_from_slice(&of[j * k..][..k]);
            Ok::<(), ()>(())
        };
        Quantized::from_columns(quantization, k, n, column).unwrap()
    }

    #[test]
    fn a_weight_is_off_by_half_a_step_at_most() {
        let (k, n) = (150, 70);
        let values = values(k, n);
        let mut column = vec![0.0; k];
        for (quantization, step, block) in [
            (Quantization::Int8, 0.5 / 127.0, k),
            // The widest gap is that between -1 and its neighbour.
            (Quantization::Nf4, (1.0 - 0.696) / 2.0, BLOCK),
        ] {
            let quantized = quantized(quantization, k, n, &values);
            for j in 0..n {
                quantized.column(j, &mut column);
                let wanted = values[j * k..][..k].chunks(block);
                for (found, wanted) in column.chunks(block).zip(wanted) {
                    let largest = wanted.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                    for (found, wanted) in found.iter().zip(wanted) {
                        let off = (found - wanted).abs();
                        assert!(off <= 1.001 * step * largest, "{found} for {wanted}");
                    }
                    let is_kept = |x: &f32| (x.abs() - largest).abs() <= 1e-6 * largest;
                    assert!(found.iter().any(is_kept), "the largest is kept");
                }
            }
        }
    }

    #[test]
    fn every_code_of_four_bits_is_its_own_nearest() {
        for (code, value) in (0..).zip(NF4) {
            assert_eq!(nf4(value * 3.0, 3.0), code);
            assert_eq!(nf4(value + 0.03, 1.0), code);
            assert_eq!(nf4(value - 0.03, 1.0), code);
        }
        assert_eq!(nf4(0.0, 0.0), 7);
    }

    #[test]
    fn panels_hold_the_columns_either_way() {
        let (k, n) = (150, 70);
        for quantization in [Quantization::Int8, Quantization::Nf4] {
            let quantized = quantized(quantization, k, n, &values(k, n));
            let (mut panel, mut turned) = (vec![0.0; k * PANEL], vec![0.0; n * PANEL]);
            let mut column = vec![0.0; k];
            for j in 0..n {
                quantized.column(j, &mut column);
                quantized.widen(j / PANEL, 0, &mut panel);
                let found: Vec<f32> = panel.chunks(PANEL).map(|row| row[j % PANEL]).collect();
                assert_eq!(found, column);
                for (t, value) in column.iter().enumerate().step_by(29) {
                    quantized.widen_turned(t / PANEL, 0, &mut turned);
                    assert_eq!(turned[j * PANEL + t % PANEL], *value);
                }
            }
        }
    }

    #[test]
    fn instruction_sets_give_the_same_bits() {
        let codes: Vec<u8> = (0..64 * PANEL).map(|i| (i * 89 % 256) as u8).collect();
        let signed: Vec<i8> = codes.iter().map(|c| c.cast_signed()).collect();
        let scales: Vec<f32> = (0..PANEL).map(|j| 0.1 + j as f32 / 7.0).collect();
        let widen = |isa| {
            let (mut eight, mut four) = (vec![0.0; 64 * PANEL], vec![0.0; 128 * PANEL]);
            widen_int8_at(isa, &signed, &scales, &mut eight);
            widen_nf4_by_load_at(isa, &codes, &scales, &mut four);
            (eight, four)
        };
        let portable = widen(Isa::Baseline);
        assert_eq!(portable.0[33], f32::from(signed[33]) * scales[1]);
        for isa in Isa::available() {
            assert!(widen(isa) == portable, "{isa:?}");
        }
        let mut four = vec![0.0; 128 * PANEL];
        widen_nf4(&codes, &scales, &mut four);
        assert!(four == portable.1);
    }
}
