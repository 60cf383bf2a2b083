//! The factors of a product, as they lie in memory.

use super::PANEL;
use crate::cpu::buffer::{Buffer, round_up};
use crate::cpu::quant::Quantized;
use crate::cpu::tile::{TileUnit, Unit};

/// A `[k, n]` matrix packed for use as the right factor: `[n / 32][k][32]`, zero padded.
#[derive(Debug, Clone)]
pub(crate) struct Panels {
    k: usize,
    n: usize,
    data: Buffer,
}

impl Panels {
    /// Packs row `j` of `rows(j)` (`[k]` values) as column `j`, for `n` columns.
    pub(crate) fn from_columns<E>(
        k: usize,
        n: usize,
        mut column: impl FnMut(usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut data = Buffer::zeros_huge(k * round_up(n, PANEL));
        let mut line = vec![0.0; k];
        for j in 0..n {
            column(j, &mut line)?;
            let panel = &mut data[j / PANEL * k * PANEL..][..k * PANEL];
            for (value, slot) in line
                .iter()
                .zip(panel[j % PANEL..].iter_mut().step_by(PANEL))
            {
                *slot = *value;
            }
        }
        Ok(Self { k, n, data })
    }

    /// The transposed matrix, packed again.
    pub(crate) fn transposed(&self) -> Self {
        let (k, n) = (self.n, self.k);
        let mut data = Buffer::zeros_huge(k * round_up(n, PANEL));
        for (p, source) in self.data.chunks_exact(self.k * PANEL).enumerate() {
            let columns = PANEL.min(self.n - p * PANEL);
            for (row, values) in source.chunks_exact(PANEL).enumerate() {
                let panel = &mut data[row / PANEL * k * PANEL..];
                for (j, value) in values[..columns].iter().enumerate() {
                    panel[(p * PANEL + j) * PANEL + row % PANEL] = *value;
                }
            }
        }
        Self { k, n, data }
    }

    /// Copies column `j` to `out`, `[k]`.
    pub(crate) fn column(&self, j: usize, out: &mut [f32]) {
        let panel = &self.data[j / PANEL * self.k * PANEL..][..self.k * PANEL];
        for (out, row) in out.iter_mut().zip(panel.chunks_exact(PANEL)) {
            *out = row[j % PANEL];
        }
    }

    /// Copies row `t` to `out`, `[n]`.
    pub(crate) fn row(&self, t: usize, out: &mut [f32]) {
        for (out, panel) in out
            .chunks_mut(PANEL)
            .zip(self.data.chunks_exact(self.k * PANEL))
        {
            out.copy_from_slice(&panel[t * PANEL..][..out.len()]);
        }
    }

    /// Number of elements, padding not counted.
    pub(crate) fn len(&self) -> usize {
        self.k * self.n
    }

    /// As a right factor.
    pub(crate) fn cols(&self) -> Cols<'_> {
        Cols::panels(&self.data, self.k, self.n, self.k * PANEL)
    }
}

/// The right factor `B [k, n]` of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cols<'a> {
    pub(super) data: &'a [f32],
    pub(super) k: usize,
    pub(super) n: usize,
    pub(super) row_stride: usize,
    pub(super) panel_stride: usize,
    /// Columns that may be read in the last panel: 32 where it is padded.
    pub(super) readable: usize,
    pub(super) unit: Unit,
    /// What multiplies tiles.
    pub(super) tiles: TileUnit,
    /// Quantized weights, and whether the factor is their transpose; then there is no data.
    pub(super) quantized: Option<(&'a Quantized, bool)>,
}

impl<'a> Cols<'a> {
    /// A row-major `[k, n]` matrix whose rows start `stride` apart.
    pub(crate) fn row_major(data: &'a [f32], k: usize, n: usize, stride: usize) -> Self {
        let readable = n - n.saturating_sub(1) / PANEL * PANEL;
        Self {
            data,
            k,
            n,
            row_stride: stride,
            panel_stride: PANEL,
            readable,
            unit: Unit::Vector,
            tiles: TileUnit::Amx,
            quantized: None,
        }
    }

    /// Panels `[k][32]` that lie `panel_stride` apart.
    pub(crate) fn panels(data: &'a [f32], k: usize, n: usize, panel_stride: usize) -> Self {
        Self {
            data,
            k,
            n,
            row_stride: PANEL,
            panel_stride,
            readable: PANEL,
            unit: Unit::Vector,
            tiles: TileUnit::Amx,
            quantized: None,
        }
    }

    /// Quantized weights `[k, n]`.
    pub(crate) fn quantized(weights: &'a Quantized) -> Self {
        Self {
            quantized: Some((weights, false)),
            ..Self::panels(&[], weights.k(), weights.n(), 0)
        }
    }

    /// The transpose of quantized weights `[n, k]`.
    pub(crate) fn turned_quantized(weights: &'a Quantized) -> Self {
        Self {
            quantized: Some((weights, true)),
            ..Self::panels(&[], weights.n(), weights.k(), 0)
        }
    }

    /// Tiles for the matrix unit, of which 32 columns take `panel_stride` floats.
    #[cfg(target_arch = "x86_64")]
    pub(in crate::cpu) fn tiles(data: &'a [f32], k: usize, n: usize, panel_stride: usize) -> Self {
        Self {
            data,
            k,
            n,
            row_stride: 0,
            panel_stride,
            readable: PANEL,
            unit: Unit::Matrix,
            tiles: TileUnit::Amx,
            quantized: None,
        }
    }

    /// The transpose of tiles `[n, k]`, which take `column_stride` floats for each 16 of the `k`, and
    /// for each of these `panel_stride` for 32 of the `n`.
    #[cfg(target_arch = "x86_64")]
    pub(in crate::cpu) fn turned_tiles(
        data: &'a [f32],
        k: usize,
        n: usize,
        column_stride: usize,
        panel_stride: usize,
    ) -> Self {
        Self {
            data,
            k,
            n,
            row_stride: column_stride,
            panel_stride,
            readable: PANEL,
            unit: Unit::MatrixTurned,
            tiles: TileUnit::Amx,
            quantized: None,
        }
    }

    /// The same factor, for the matrix unit.
    pub(in crate::cpu) fn split(self) -> Self {
        Self {
            unit: Unit::MatrixSplit,
            ..self
        }
    }

    /// The same factor, rounded to bf16 for a unit that multiplies tiles.
    #[cfg(target_arch = "x86_64")]
    pub(in crate::cpu) fn round(self) -> Self {
        Self {
            unit: Unit::MatrixRounded,
            ..self
        }
    }

    /// The same factor, for another unit of those that multiply tiles.
    #[cfg(target_arch = "x86_64")]
    pub(in crate::cpu) fn on(self, tiles: TileUnit) -> Self {
        Self { tiles, ..self }
    }

    /// The numbers as they lie in memory.
    pub(crate) fn data(&self) -> &'a [f32] {
        self.data
    }

    /// Inner dimension.
    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// Columns.
    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// One past the last element that a kernel reads.
    pub(super) fn end(&self) -> usize {
        if self.quantized.is_some() {
            return 0;
        }
        let last_panel = (self.n - 1) / PANEL;
        match self.unit {
            Unit::Matrix => return (last_panel + 1) * self.panel_stride,
            Unit::MatrixTurned => {
                let groups = self.k.div_ceil(PANEL) * PANEL / 16;
                return (groups - 1) * self.row_stride + (last_panel + 1) * self.panel_stride;
            }
            Unit::Vector | Unit::MatrixSplit | Unit::MatrixRounded => {}
        }
        last_panel * self.panel_stride + (self.k - 1) * self.row_stride + self.readable
    }

    /// Whether a kernel would read beyond the last panel; kernels read 16 columns or 32.
    pub(super) fn has_tail(&self) -> bool {
        !self.readable.is_multiple_of(16)
    }

    /// Copies the last, partial panel to `[k][32]`; what lies beyond its columns is unspecified.
    pub(super) fn copy_tail(&self, out: &mut [f32]) {
        let columns = self.n % PANEL;
        let rows = self.data[self.n / PANEL * self.panel_stride..].chunks(self.row_stride);
        for (row, out) in rows.zip(out.chunks_exact_mut(PANEL)) {
            out[..columns].copy_from_slice(&row[..columns]);
        }
    }
}

/// The left factor `A [m, k]` of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rows<'a> {
    /// `A[i, t]` at `i * stride + t`.
    RowMajor { data: &'a [f32], stride: usize },
    /// As `RowMajor`, each element rounded to bf16 as it is read.
    Rounded { data: &'a [f32], stride: usize },
    /// `A[i, t]` at `t * stride + i`.
    Transposed { data: &'a [f32], stride: usize },
}

impl<'a> Rows<'a> {
    /// A row-major matrix of rows of `width`.
    pub(crate) fn row_major(data: &'a [f32], width: usize) -> Self {
        Rows::RowMajor {
            data,
            stride: width,
        }
    }

    /// As [`Rows::row_major`], rounded to bf16.
    pub(crate) fn rounded(data: &'a [f32], width: usize) -> Self {
        Rows::Rounded {
            data,
            stride: width,
        }
    }

    /// A matrix whose transpose has rows of `width`.
    pub(crate) fn transposed(data: &'a [f32], width: usize) -> Self {
        Rows::Transposed {
            data,
            stride: width,
        }
    }

    /// Whether elements are rounded.
    pub(super) fn is_rounded(&self) -> bool {
        matches!(self, Rows::Rounded { .. })
    }

    /// The rows from `row` on.
    pub(crate) fn skip_rows(self, row: usize) -> Self {
        match self {
            Rows::RowMajor { data, stride } => Rows::RowMajor {
                data: &data[row * stride..],
                stride,
            },
            Rows::Rounded { data, stride } => Rows::Rounded {
                data: &data[row * stride..],
                stride,
            },
            Rows::Transposed { data, stride } => Rows::Transposed {
                data: &data[row..],
                stride,
            },
        }
    }
}

/// Whether both factors of a product of a backward pass that no weights are part of are rounded to bf16,
/// for a unit that multiplies tiles of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rounding(pub(in crate::cpu) Option<TileUnit>);

impl Rounding {
    /// The factors as they are multiplied.
    pub(crate) fn of<'a>(self, left: Rows<'a>, right: Cols<'a>) -> (Rows<'a>, Cols<'a>) {
        match (self.0, left) {
            #[cfg(target_arch = "x86_64")]
            (Some(unit), Rows::RowMajor { data, stride }) => {
                (Rows::Rounded { data, stride }, right.round().on(unit))
            }
            _ => (left, right),
        }
    }

    /// Whether it rounds.
    pub(crate) fn rounds(self) -> bool {
        self.0.is_some()
    }
}
