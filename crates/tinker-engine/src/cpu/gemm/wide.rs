//! Products with quantized weights, which are widened a few panels at a time.
//!
//! Units that multiply rounded numbers take them as tiles of bf16, into which they are widened 32 rows at a
//! time; everything else takes panels of `f32`.

use smallvec::smallvec;

use super::{PANEL, Rows, Scratch, elementwise};
#[cfg(target_arch = "x86_64")]
use crate::cpu::amx;
use crate::cpu::buffer::Buffer;
use crate::cpu::simd::Isa;
use crate::cpu::tile::{Job, Unit, Wide};

/// Floats that are widened at a time, 1 MiB, as long as they are a panel: they stay in the second-level
/// cache.
const AT_ONCE: usize = 1 << 18;

/// Widens as many panels at a time as stay in the cache, and multiplies with them.
///
/// # Safety
/// As for [`super::run`].
pub(super) unsafe fn run(
    isa: Isa,
    m: usize,
    k: usize,
    a: Rows<'_>,
    job: &Job,
    wide: Wide,
    scratch: &mut Scratch,
) {
    let mut buffer = std::mem::replace(&mut scratch.wide, Buffer::zeros(0));
    let form = Form::of(a, job);
    let (panels, panel) = (job.n.div_ceil(PANEL), form.panel(k));
    let at_once = (AT_ONCE / panel).clamp(1, panels);
    buffer.reserve(at_once * panel);
    for first in (0..panels).step_by(at_once) {
        let count = at_once.min(panels - first);
        for (i, target) in (wide.first + first..).zip(buffer.chunks_exact_mut(panel).take(count)) {
            // SAFETY: passed on to the caller.
            unsafe { form.widen(k, job, wide, i, target) };
        }
        let part = Job {
            b: buffer.as_ptr(),
            n: (count * PANEL).min(job.n - first * PANEL),
            panel_stride: panel,
            c: job.c.wrapping_add(first * PANEL),
            unit: form.unit(job.unit),
            wide: None,
            ..*job
        };
        // SAFETY: passed on to the caller; the buffer holds the panels of the part.
        unsafe { super::run(isa, m, k, a, smallvec![part], scratch) };
    }
    scratch.wide = buffer;
}

/// What weights are widened to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Panels of `f32`.
    Panels,
    /// Panels of `f32` that hold bf16 numbers.
    Rounded,
    /// Tiles of bf16.
    #[cfg(target_arch = "x86_64")]
    Tiles,
}

impl Form {
    fn of(a: Rows<'_>, job: &Job) -> Self {
        match job.unit {
            #[cfg(target_arch = "x86_64")]
            Unit::MatrixRounded if a.is_rounded() => Self::Tiles,
            Unit::Vector if a.is_rounded() => Self::Rounded,
            _ => Self::Panels,
        }
    }

    /// What multiplies the widened weights.
    fn unit(self, unit: Unit) -> Unit {
        match self {
            Self::Panels | Self::Rounded => unit,
            #[cfg(target_arch = "x86_64")]
            Self::Tiles => Unit::Matrix,
        }
    }

    /// Floats of the memory of a widened panel of `k` rows.
    fn panel(self, k: usize) -> usize {
        match self {
            Self::Panels | Self::Rounded => k * PANEL,
            #[cfg(target_arch = "x86_64")]
            Self::Tiles => amx::panel_of_tiles(k),
        }
    }

    /// Widens panel `i`.
    ///
    /// # Safety
    /// The weights live, and the machine has the unit of the job.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(unused_variables, reason = "only tiles depend on them")
    )]
    unsafe fn widen(self, k: usize, job: &Job, wide: Wide, i: usize, target: &mut [f32]) {
        // SAFETY: passed on to the caller.
        let weights = unsafe { &*wide.weights };
        let rows = |from: usize, out: &mut [f32]| {
            if wide.turned {
                weights.widen_turned(i, from, out);
            } else {
                weights.widen(i, from, out);
            }
        };
        match self {
            Self::Panels => rows(0, target),
            Self::Rounded => {
                rows(0, target);
                elementwise::round_to_bf16(target);
            }
            // SAFETY: passed on to the caller.
            #[cfg(target_arch = "x86_64")]
            Self::Tiles => unsafe { amx::panel_to_tiles(job.tiles, k, rows, target) },
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::{Cols, Panels, Product, Store, matmul};
    use super::*;
    use crate::backend::Quantization;
    use crate::cpu::quant::Quantized;
    use crate::cpu::tile::TileUnit;

    fn product(m: usize, x: &[f32], right: Cols<'_>) -> Vec<f32> {
        let (k, n) = (right.k(), right.n());
        let mut y = vec![0.0; m * n];
        let products = &mut [Product::new(right, &mut y, n, Store::Replace)];
        matmul(m, k, Rows::rounded(x, k), products);
        y
    }

    #[test]
    fn tiles_of_widened_weights_give_the_bits_of_panels() {
        let (k, n) = (70, 50);
        let value = |i: usize| ((i * i % 211) as f32 * 0.37).sin();
        for quantization in Quantization::ALL {
            let weights = Quantized::from_columns(quantization, k, n, |j, column| {
                (0..).zip(column).for_each(|(t, x)| *x = value(j * k + t));
                Ok::<(), ()>(())
            });
            let weights = weights.unwrap();
            let panels = Panels::from_columns(k, n, |j, column| {
                weights.column(j, column);
                Ok::<(), ()>(())
            });
            let panels = panels.unwrap();
            let turned = panels.transposed();
            for m in [1, 5, 130] {
                let x: Vec<f32> = (0..m * k.max(n)).map(|i| value(i + 5)).collect();
                for (found, wanted) in [
                    (Cols::quantized(&weights), panels.cols()),
                    (Cols::turned_quantized(&weights), turned.cols()),
                ] {
                    let [found, wanted] = [found, wanted]
                        .map(|right| product(m, &x, right.round().on(TileUnit::Emulated)));
                    assert!(wanted.iter().all(|y| *y != 0.0));
                    assert_eq!(found, wanted, "{quantization:?}, {m} rows");
                }
            }
        }
    }
}
