//! Frozen weights of bf16, packed as the unit reads them.

use super::{DEPTH, SIDE, TILE};
use crate::cpu::buffer::{Buffer, round_up};
use crate::cpu::gemm::{Cols, PANEL};

/// A `[k, n]` matrix of bf16 numbers as right factor: `[n / 16][k / 32]` tiles
/// `[16 pairs][16 columns][2]`, zero padded to whole pairs of tiles.
#[derive(Debug, Clone)]
pub(crate) struct Tiles {
    k: usize,
    n: usize,
    data: Buffer,
}

impl Tiles {
    /// Packs columns of which `column(j, ..)` gives the values, `[k]`, all of them bf16 numbers.
    pub(crate) fn from_columns<E>(
        k: usize,
        n: usize,
        mut column: impl FnMut(usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut tiles = Self {
            k,
            n,
            data: Buffer::zeros(0),
        };
        tiles.data = Buffer::zeros_huge(round_up(n, PANEL) / SIDE * tiles.column_stride());
        let mut values = vec![0.0; round_up(k, DEPTH)];
        for j in 0..n {
            column(j, &mut values[..k])?;
            tiles.pack(j, &values);
        }
        Ok(tiles)
    }

    /// Packs column `j`, padded to whole tiles.
    fn pack(&mut self, j: usize, values: &[f32]) {
        let start = j / SIDE * self.column_stride() + j % SIDE;
        let (pairs, _) = values.as_chunks::<2>();
        for (slot, [even, odd]) in self.data[start..].iter_mut().step_by(SIDE).zip(pairs) {
            *slot = f32::from_bits(even.to_bits() >> 16 | odd.to_bits() & 0xffff_0000);
        }
    }

    /// Copies column `j` to `out`, `[k]`.
    pub(crate) fn column(&self, j: usize, out: &mut [f32]) {
        let group = &self.data[j / SIDE * self.column_stride() + j % SIDE..];
        for (t, out) in out.iter_mut().enumerate() {
            *out = member(group[t / 2 * SIDE], t);
        }
    }

    /// Number of elements, padding not counted.
    pub(crate) fn len(&self) -> usize {
        self.k * self.n
    }

    /// As a right factor.
    pub(crate) fn cols(&self) -> Cols<'_> {
        let panel_stride = PANEL / SIDE * self.column_stride();
        Cols::tiles(&self.data, self.k, self.n, panel_stride)
    }

    /// The transposed matrix as a right factor.
    pub(crate) fn turned(&self) -> Cols<'_> {
        Cols::turned_tiles(&self.data, self.n, self.k, self.column_stride(), TILE)
    }

    /// Floats between the tiles of neighbouring groups of 16 columns.
    fn column_stride(&self) -> usize {
        self.k.div_ceil(DEPTH) * TILE
    }
}

/// The even or odd member of a pair of bf16 numbers.
fn member(pair: f32, t: usize) -> f32 {
    f32::from_bits(pair.to_bits() >> (t % 2 * 16) << 16)
}

/// Whether every value is a bf16 number.
pub(crate) fn is_bf16(values: &[f32]) -> bool {
    values.iter().fold(0, |bits, x| bits | x.to_bits()) & 0xffff == 0
}
