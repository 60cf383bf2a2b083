//! What the matrix unit and the instructions around it do, in plain Rust: the same bits, on any machine.
//!
//! The sum of a tile follows the operation of `TDPBF16PS` in Intel's manual: even and odd products in a
//! chain each, then their sum added to the output.

use super::block::{Block, order};
use super::parts::Strip;
use super::turn::Turned;
use super::{DEPTH, SIDE, TILE};

/// bf16 to nearest, of two the even one; subnormal numbers are 0.
fn round(x: f32) -> u16 {
    if x.is_subnormal() {
        return half::bf16::from_f32(0.0f32.copysign(x)).to_bits();
    }
    half::bf16::from_f32(x).to_bits()
}

/// The parts of a number: of one part rounded to even, of three each the rest rounded away from zero.
fn parts<const L: usize>(mut x: f32) -> [u16; L] {
    if L == 1 {
        return [round(x); L];
    }
    std::array::from_fn(|_| {
        let bits = x.to_bits().wrapping_add(0x8000) & 0xffff_0000;
        x -= f32::from_bits(bits);
        (bits >> 16) as u16
    })
}

/// Sets one of the two numbers that a float holds.
fn set(slot: &mut f32, odd: bool, value: u16) {
    let (bits, value) = (slot.to_bits(), u32::from(value));
    *slot = f32::from_bits(if odd {
        bits & 0xffff | value << 16
    } else {
        bits & 0xffff_0000 | value
    });
}

/// The even and the odd number that a float holds.
fn pair(slot: f32) -> [f32; 2] {
    let bits = slot.to_bits();
    [bits << 16, bits & 0xffff_0000].map(|bits| {
        let x = f32::from_bits(bits);
        if x.is_subnormal() { 0.0 } else { x }
    })
}

/// As [`super::parts::split_rows`] and [`super::parts::round_rows`].
pub(super) fn split_rows<const L: usize>(
    a: &[f32],
    stride: usize,
    rows: usize,
    k: usize,
    out: &mut [f32],
) {
    for row in 0..rows {
        for t in 0..k.next_multiple_of(DEPTH) {
            let x = if t < k { a[row * stride + t] } else { 0.0 };
            for (part, value) in parts::<L>(x).into_iter().enumerate() {
                let at = (t / DEPTH * L + part) * TILE + row * SIDE + t % DEPTH / 2;
                set(&mut out[at], t % 2 == 1, value);
            }
        }
    }
}

/// As [`Strip::split`] and [`Strip::round`].
///
/// # Safety
/// The columns have `k` rows.
pub(super) unsafe fn split<const P: usize>(strip: Strip, depth: usize, out: &mut [f32]) {
    for t in 0..depth * DEPTH {
        for column in 0..strip.columns {
            let row = strip.first + t;
            let x = if row < strip.k {
                // SAFETY: passed on to the caller.
                unsafe { *strip.data.add(row * strip.stride + column) }
            } else {
                0.0
            };
            let tile = column / SIDE * depth + t / DEPTH;
            for (part, value) in parts::<P>(x).into_iter().enumerate() {
                let at = (tile * P + part) * TILE + t % DEPTH / 2 * SIDE + column % SIDE;
                set(&mut out[at], t % 2 == 1, value);
            }
        }
    }
}

/// As [`Turned::turn`].
///
/// # Safety
/// The tiles are there.
pub(super) unsafe fn turn(turned: Turned, first: usize, depth: usize, out: &mut [f32]) {
    for t in 0..depth * DEPTH {
        for column in 0..2 * SIDE {
            let row = first * DEPTH + t;
            let at = row / SIDE * turned.stride + column / 2 * SIDE + row % SIDE;
            // SAFETY: passed on to the caller.
            let held = unsafe { *turned.data.add(at) };
            let value = (held.to_bits() >> (column % 2 * 16)) as u16;
            let tile = column / SIDE * depth + t / DEPTH;
            let at = tile * TILE + t % DEPTH / 2 * SIDE + column % SIDE;
            set(&mut out[at], t % 2 == 1, value);
        }
    }
}

/// As [`Block::run`] with `l` and `p` parts, of whole groups of columns.
///
/// # Safety
/// As for it.
pub(super) unsafe fn run(block: &Block, l: usize, p: usize, rows: usize, columns: usize) {
    for row in 0..rows {
        for column in 0..columns {
            // SAFETY: passed on to the caller.
            unsafe {
                let c = block.c.add(row * block.stride + column);
                let mut sum = if block.add { *c } else { 0.0 };
                for tile in 0..block.depth {
                    for (of_a, of_b) in order(l, p) {
                        let a = row / SIDE * block.a_stride + (tile * l + of_a) * TILE;
                        let b = column / SIDE * block.b_stride + (tile * p + of_b) * TILE;
                        let mut chains = [0.0f32; 2];
                        for i in 0..SIDE {
                            let a = pair(*block.a.add(a + row % SIDE * SIDE + i));
                            let b = pair(*block.b.add(b + i * SIDE + column % SIDE));
                            chains = std::array::from_fn(|odd| chains[odd] + a[odd] * b[odd]);
                        }
                        sum += chains[0] + chains[1];
                    }
                }
                *c = sum;
            }
        }
    }
}
