//! What the host gives to a pass over rows: uploaded at once, as each upload waits for the device.

use super::memory::{Floats, Plain, Table, as_bytes};
use super::tiles::Tiles;
use crate::arch::Arch;
use crate::error::Result;

/// Parts of an upload begin at multiples of this many bytes.
const ALIGN: usize = 256;

/// Cosines and sines of each row's rotary angles, for each of the model's ropes: half of what is rotated
/// of a head, and `[2, rows, half]`.
#[derive(Debug)]
pub(super) struct Angles {
    pub(super) ropes: Vec<(usize, Floats)>,
}

/// Where the numbers of a call lie on the device.
#[derive(Debug)]
pub(super) struct Call {
    /// Tokens of the rows.
    pub(super) tokens: u64,
    /// Where keys and values of the rows go.
    pub(super) places: u64,
    pub(super) tiles: u64,
    pub(super) angles: Angles,
}

impl Call {
    /// Puts into `table` what rows at `positions` need.
    pub(super) fn upload(
        table: &mut Table,
        arch: &Arch,
        tokens: &[u32],
        positions: impl Iterator<Item = usize> + Clone,
        (places, tiles): (&[u64], &Tiles),
    ) -> Result<Self> {
        let mut bytes = Vec::new();
        let offsets = [
            add(&mut bytes, tokens),
            add(&mut bytes, places),
            add(&mut bytes, &tiles.words),
        ];
        let ropes = arch.ropes.iter().map(|rope| {
            let angles = positions.clone().flat_map(|position| {
                let turn = move |frequency: &f32| (position as f32 * frequency).sin_cos();
                rope.frequencies.iter().map(turn)
            });
            let (mut cosines, sines): (Vec<f32>, Vec<f32>) = angles
                .map(|(sine, cosine)| (cosine * rope.amplitude, sine * rope.amplitude))
                .unzip();
            cosines.extend(sines);
            let half = rope.frequencies.len();
            (half, add(&mut bytes, &cosines), cosines.len())
        });
        let ropes: Vec<_> = ropes.collect();
        let base = table.set(&bytes)?;
        let [tokens, places, tiles] = offsets.map(|offset| base + offset as u64);
        let angles = |(half, offset, len)| Ok((half, table.floats(offset, len)?));
        Ok(Self {
            tokens,
            places,
            tiles,
            angles: Angles {
                ropes: ropes.into_iter().map(angles).collect::<Result<_>>()?,
            },
        })
    }
}

/// Appends numbers; returns where they begin.
fn add<T: Plain>(bytes: &mut Vec<u8>, values: &[T]) -> usize {
    let offset = bytes.len().next_multiple_of(ALIGN);
    bytes.resize(offset, 0);
    bytes.extend_from_slice(as_bytes(values));
    offset
}
