//! The kernels that are not matrix products: norms, rotary positions, activation, softmax, AdamW.
//!
//! Rows are independent of each other, and every reduction keeps 16 partial sums that are added
//! first to last, so a row has the same bits wherever it stands.

use std::ops::Range;

use super::simd::{kernels, madd};
use crate::optim::AdamW;

/// Partial sums of a reduction.
const LANES: usize = 16;

/// `e^x` to about two units in the last place, for `x` up to 88; below -87.3 it stays at `e^-87.3`.
///
/// Range reduction and polynomial of Cephes' `expf`.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the integer in the low bits
    let x = x.clamp(-87.3, 88.0);
    let shifted = madd::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let f = madd::<FMA>(n, -0.693_359_4, x);
    let f = madd::<FMA>(n, 2.121_944_4e-4, f);
    let mut p = 1.987_569_1e-4;
    for c in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = madd::<FMA>(p, f, c);
    }
    let p = madd::<FMA>(p * f, f, f) + 1.0;
    let exponent = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127)
        << 23;
    f32::from_bits(exponent) * p
}

/// `tanh x` to about two units in the last place; range reduction and polynomial of Cephes' `tanhf`.
#[inline(always)]
fn tanh<const FMA: bool>(x: f32) -> f32 {
    let z = x * x;
    let mut p = -5.704_988_7e-3;
    for c in [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = madd::<FMA>(p, z, c);
    }
    let small = madd::<FMA>(p * z, x, x);
    let large = (1.0 - 2.0 / (exp::<FMA>(2.0 * x.abs()) + 1.0)).copysign(x);
    if x.abs() < 0.625 { small } else { large }
}

/// `cap * tanh(x * scale / cap)`.
#[inline(always)]
fn softcap_row<const FMA: bool>(x: &mut [f32], scale: f32, cap: f32) {
    let factor = scale / cap;
    for x in x {
        *x = cap * tanh::<FMA>(*x * factor);
    }
}

/// `sqrt(8 / pi)`, and the cubic coefficient of the approximation of GELU.
const GELU: [f32; 2] = [1.595_769, 0.044_715];

#[inline(always)]
fn sum(lanes: [f32; LANES]) -> f32 {
    lanes.iter().sum()
}

#[inline(always)]
fn dot_row<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_chunks.iter().zip(b_chunks) {
        for j in 0..LANES {
            lanes[j] = madd::<FMA>(x[j], y[j], lanes[j]);
        }
    }
    for ((x, y), lane) in a_rest.iter().zip(b_rest).zip(&mut lanes) {
        *lane = madd::<FMA>(*x, *y, *lane);
    }
    sum(lanes)
}

#[inline(always)]
fn max_row(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for j in 0..LANES {
            lanes[j] = if chunk[j] > lanes[j] {
                chunk[j]
            } else {
                lanes[j]
            };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |max, x| max.max(*x))
}

/// `x = exp(x * scale - max)`; returns the sum.
#[inline(always)]
fn exp_row<const FMA: bool>(x: &mut [f32], scale: f32, max: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for j in 0..LANES {
            let e = exp::<FMA>(madd::<FMA>(chunk[j], scale, -max));
            chunk[j] = e;
            lanes[j] += e;
        }
    }
    for (x, lane) in rest.iter_mut().zip(&mut lanes) {
        *x = exp::<FMA>(madd::<FMA>(*x, scale, -max));
        *lane += *x;
    }
    sum(lanes)
}

/// A block of attention scores: rows of consecutive positions of one head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScoreBlock {
    /// Distance of rows.
    pub(crate) stride: usize,
    /// Rows.
    pub(crate) rows: usize,
    /// Position of the first row.
    pub(crate) first: usize,
    /// Position of the first key.
    pub(crate) from: usize,
    /// Keys of the block: those that a row does not attend to get probability 0.
    pub(crate) keys: usize,
    /// Positions that a row attends to, up to and with its own; all if absent.
    pub(crate) window: Option<usize>,
    /// Factor on the scores.
    pub(crate) scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub(crate) softcap: Option<f32>,
}

impl ScoreBlock {
    /// The keys that row `i` attends to, counted from the block's first.
    #[inline(always)]
    fn seen(&self, i: usize) -> Range<usize> {
        let end = self.first + i + 1;
        let start = self.window.map_or(0, |window| end.saturating_sub(window));
        start.saturating_sub(self.from)..(end - self.from).min(self.keys)
    }
}

/// One AdamW step's constants, the same for every weight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamStep {
    /// Hyper-parameters.
    pub(crate) params: AdamW,
    /// Factor on the gradient, from clipping.
    pub(crate) clip: f32,
    /// `1 - beta1^t`.
    pub(crate) correction1: f32,
    /// Root of `1 - beta2^t`.
    pub(crate) correction2_root: f32,
}

impl AdamStep {
    /// Weight and moments after the step, of those before it and the gradient (Loshchilov and Hutter
    /// 2019, algorithm 2, in the order PyTorch computes it).
    #[inline(always)]
    fn apply(&self, w: f32, g: f32, m: f32, v: f32) -> [f32; 3] {
        let p = self.params;
        let keep = 1.0 - p.learning_rate * p.weight_decay;
        let rate = p.learning_rate / self.correction1;
        let g = g * self.clip;
        let m = m + (g - m) * (1.0 - p.beta1);
        let v = p.beta2 * v + (1.0 - p.beta2) * g * g;
        let w = w * keep - rate * m / (v.sqrt() / self.correction2_root + p.eps);
        [w, m, v]
    }
}

kernels! {
    /// `sum a b`.
    fn dot / dot_at(a: &[f32], b: &[f32]) -> f32 {
        dot_row::<FMA>(a, b)
    }

    /// `y += x`.
    fn add / add_at(x: &[f32], y: &mut [f32]) {
        for (x, y) in x.iter().zip(y) {
            *y += *x;
        }
    }

    /// `y += factor * x`.
    fn add_scaled / add_scaled_at(factor: f32, x: &[f32], y: &mut [f32]) {
        for (x, y) in x.iter().zip(y) {
            *y = madd::<FMA>(factor, *x, *y);
        }
    }

    /// `x *= factor`.
    fn scale / scale_at(factor: f32, x: &mut [f32]) {
        for x in x {
            *x *= factor;
        }
    }

    /// Rounds each value to the nearest bf16 number, of two the even one. A NaN stays one.
    fn round_to_bf16 / round_to_bf16_at(x: &mut [f32]) {
        for x in x {
            let bits = x.to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
            *x = f32::from_bits(if x.is_nan() { 0x7fc0_0000 } else { rounded });
        }
    }

    /// `sum x^2` in double precision.
    fn sum_of_squares / sum_of_squares_at(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for j in 0..LANES {
                lanes[j] += f64::from(chunk[j]) * f64::from(chunk[j]);
            }
        }
        let rest: f64 = rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        lanes.iter().sum::<f64>() + rest
    }

    /// Adds `bias [n]` to each row of `y [m, n]`.
    fn add_bias / add_bias_at(bias: &[f32], y: &mut [f32]) {
        for row in y.chunks_exact_mut(bias.len()) {
            for (y, b) in row.iter_mut().zip(bias) {
                *y += *b;
            }
        }
    }

    /// RMS norm of rows of `weight.len()` (Zhang and Sennrich 2019, eq. 4); keeps `1 / rms` per row.
    fn rms_norm / rms_norm_at(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], inverse: &mut [f32]) {
        let n = weight.len();
        for ((x, y), inverse) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)).zip(inverse) {
            *inverse = 1.0 / (dot_row::<FMA>(x, x) / n as f32 + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = *x * *inverse * *w;
            }
        }
    }

    /// Adds the gradient of [`rms_norm`] for its input to `dx`.
    fn rms_norm_backward / rms_norm_backward_at(x: &[f32], weight: &[f32], inverse: &[f32], dy: &[f32], dx: &mut [f32]) {
        let n = weight.len();
        let rows = x.chunks_exact(n).zip(dy.chunks_exact(n)).zip(dx.chunks_exact_mut(n));
        for (((x, dy), dx), s) in rows.zip(inverse) {
            let mut lanes = [0.0; LANES];
            let ((xc, xr), (dc, dr), (wc, wr)) =
                (x.as_chunks::<LANES>(), dy.as_chunks::<LANES>(), weight.as_chunks::<LANES>());
            for ((x, d), w) in xc.iter().zip(dc).zip(wc) {
                for j in 0..LANES {
                    lanes[j] = madd::<FMA>(x[j] * d[j], w[j], lanes[j]);
                }
            }
            for (((x, d), w), lane) in xr.iter().zip(dr).zip(wr).zip(&mut lanes) {
                *lane = madd::<FMA>(x * d, *w, *lane);
            }
            let c = sum(lanes) * s * s * s / n as f32;
            for (((dx, x), d), w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                *dx += d * w * s - x * c;
            }
        }
    }

    /// Rotates the first `2 * half` elements of each head of `x [m, heads * size]`, one half against
    /// the other (Su et al. 2021, as Llama lays it out); `angles` are cosines and sines, `[m, half]`. `direction` -1
    /// turns back, which is the gradient.
    fn rope / rope_at(x: &mut [f32], width: usize, size: usize, half: usize, angles: (&[f32], &[f32]), direction: f32) {
        let (cos, sin) = angles;
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for (row, (cos, sin)) in x.chunks_exact_mut(width).zip(angles) {
            for head in row.chunks_exact_mut(size) {
                let (a, b) = head[..2 * half].split_at_mut(half);
                for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                    let s = s * direction;
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
        }
    }

    /// `silu(gate) * up` (Shazeer 2020, eq. 6).
    fn swiglu / swiglu_at(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
            *out = g / (1.0 + exp::<FMA>(-*g)) * u;
        }
    }

    /// Turns `gate` and `up` into their gradients, given that of [`swiglu`]'s output.
    fn swiglu_backward / swiglu_backward_at(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        // Two passes over a tile: one loop over all of it is not vectorised.
        const TILE: usize = 64;
        let mut sigmoid = [0.0; TILE];
        for ((gate, up), dy) in gate.chunks_mut(TILE).zip(up.chunks_mut(TILE)).zip(dy.chunks(TILE)) {
            for (s, g) in sigmoid.iter_mut().zip(gate.iter()) {
                *s = 1.0 / (1.0 + exp::<FMA>(-*g));
            }
            for (((g, u), d), s) in gate.iter_mut().zip(up).zip(dy).zip(&sigmoid) {
                let (gate, up) = (*g, *u);
                *g = d * up * s * (1.0 + gate * (1.0 - s));
                *u = d * gate * s;
            }
        }
    }

    /// `gelu(gate) * up`, with the approximation by a hyperbolic tangent: `x sigmoid(2 z)`, where
    /// `z = sqrt(2 / pi) (x + 0.044715 x^3)`.
    fn geglu / geglu_at(gate: &[f32], up: &[f32], out: &mut [f32]) {
        let [root, cubic] = GELU;
        for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
            let z = root * (*g + cubic * *g * *g * *g);
            *out = g / (1.0 + exp::<FMA>(-z)) * u;
        }
    }

    /// Turns `gate` and `up` into their gradients, given that of [`geglu`]'s output.
    fn geglu_backward / geglu_backward_at(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        const TILE: usize = 64;
        let [root, cubic] = GELU;
        let mut sigmoid = [0.0; TILE];
        for ((gate, up), dy) in gate.chunks_mut(TILE).zip(up.chunks_mut(TILE)).zip(dy.chunks(TILE)) {
            for (s, g) in sigmoid.iter_mut().zip(gate.iter()) {
                *s = 1.0 / (1.0 + exp::<FMA>(-root * (*g + cubic * *g * *g * *g)));
            }
            for (((g, u), d), s) in gate.iter_mut().zip(up).zip(dy).zip(&sigmoid) {
                let (gate, up) = (*g, *u);
                let slope = root * (1.0 + 3.0 * cubic * gate * gate);
                *g = d * up * s * (1.0 + gate * (1.0 - s) * slope);
                *u = d * gate * s;
            }
        }
    }

    /// `x = cap * tanh(x / cap)`.
    fn softcap / softcap_at(x: &mut [f32], cap: f32) {
        softcap_row::<FMA>(x, 1.0, cap);
    }

    /// Turns the gradient of [`softcap`]'s output `y` into that of its input.
    fn softcap_backward / softcap_backward_at(y: &[f32], cap: f32, dx: &mut [f32]) {
        for (y, dx) in y.iter().zip(dx) {
            let tanh = y / cap;
            *dx *= 1.0 - tanh * tanh;
        }
    }

    /// Turns scores into probabilities, row by row; keeps the log of each row's normaliser.
    fn softmax / softmax_at(scores: &mut [f32], block: ScoreBlock, log_normaliser: &mut [f32]) {
        let rows = scores.chunks_mut(block.stride).take(block.rows);
        for ((i, row), log_normaliser) in rows.enumerate().zip(log_normaliser) {
            let Range { start, end } = block.seen(i);
            let seen = &mut row[start..end];
            let scale = match block.softcap {
                None => block.scale,
                Some(cap) => {
                    softcap_row::<FMA>(seen, block.scale, cap);
                    1.0
                }
            };
            let max = max_row(seen) * scale;
            let total = exp_row::<FMA>(seen, scale, max);
            let inverse = 1.0 / total;
            for p in seen {
                *p *= inverse;
            }
            row[..start].fill(0.0);
            row[end..block.keys].fill(0.0);
            *log_normaliser = max + total.ln();
        }
    }

    /// Backward of attention between its products: `scores` become probabilities again, and
    /// `d_probs` the gradient of the scores. `d_dot_out[i]` is `dO_i . O_i` (Dao 2023, algorithm 2).
    fn softmax_backward / softmax_backward_at(scores: &mut [f32], d_probs: &mut [f32], block: ScoreBlock, log_normaliser: &[f32], d_dot_out: &[f32]) {
        let rows = scores.chunks_mut(block.stride).zip(d_probs.chunks_mut(block.stride)).take(block.rows);
        for ((i, (row, d_row)), (log, dot)) in rows.enumerate().zip(log_normaliser.iter().zip(d_dot_out)) {
            let Range { start, end } = block.seen(i);
            let (log, dot) = (*log, *dot);
            row[..start].fill(0.0);
            d_row[..start].fill(0.0);
            row[end..block.keys].fill(0.0);
            d_row[end..block.keys].fill(0.0);
            let (row, d_row) = (&mut row[start..end], &mut d_row[start..end]);
            if let Some(cap) = block.softcap {
                softcap_row::<FMA>(row, block.scale, cap);
                for (p, d) in row.iter_mut().zip(d_row) {
                    let tanh = *p / cap;
                    *p = exp::<FMA>(*p - log);
                    *d = *p * (*d - dot) * block.scale * (1.0 - tanh * tanh);
                }
                continue;
            }
            let ((p, p_rest), (d, d_rest)) =
                (row.as_chunks_mut::<LANES>(), d_row.as_chunks_mut::<LANES>());
            for (p, d) in p.iter_mut().zip(d) {
                for j in 0..LANES {
                    p[j] = exp::<FMA>(madd::<FMA>(p[j], block.scale, -log));
                    d[j] = p[j] * (d[j] - dot) * block.scale;
                }
            }
            for (p, d) in p_rest.iter_mut().zip(d_rest) {
                *p = exp::<FMA>(madd::<FMA>(*p, block.scale, -log));
                *d = *p * (*d - dot) * block.scale;
            }
        }
    }

    /// `log sum exp x`.
    fn log_sum_exp / log_sum_exp_at(x: &[f32]) -> f32 {
        let max = max_row(x);
        let mut lanes = [0.0; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for j in 0..LANES {
                lanes[j] += exp::<FMA>(chunk[j] - max);
            }
        }
        for (x, lane) in rest.iter().zip(&mut lanes) {
            *lane += exp::<FMA>(*x - max);
        }
        max + sum(lanes).ln()
    }

    /// `x = exp(x - max x)` and returns `(log sum exp x, sum)`, with the same bits as [`log_sum_exp`].
    fn exp_and_log_sum / exp_and_log_sum_at(x: &mut [f32]) -> (f32, f32) {
        let max = max_row(x);
        let total = exp_row::<FMA>(x, 1.0, max);
        (max + total.ln(), total)
    }

    /// `x = exp((x - max x) * scale)`: the largest becomes exactly 1.
    fn exp_differences / exp_differences_at(x: &mut [f32], scale: f32) {
        let max = max_row(x);
        for x in x {
            *x = exp::<FMA>((*x - max) * scale);
        }
    }

    /// Index of the largest element; the first of equals.
    fn arg_max / arg_max_at(x: &[f32]) -> usize {
        let max = max_row(x);
        x.iter().position(|x| *x == max).unwrap_or(0)
    }

    /// Whether [`adamw`] would leave weights and moments finite.
    fn adamw_stays_finite / adamw_stays_finite_at(step: AdamStep, weights: &[f32], gradient: &[f32], first: &[f32], second: &[f32]) -> bool {
        let moments = first.iter().zip(second);
        // Not `all`: without an early exit the loop is vectorised.
        let mut finite = true;
        for ((w, g), (m, v)) in weights.iter().zip(gradient).zip(moments) {
            let [w, m, v] = step.apply(*w, *g, *m, *v);
            finite &= w.is_finite() & m.is_finite() & v.is_finite();
        }
        finite
    }

    /// One AdamW step.
    fn adamw / adamw_at(step: AdamStep, weights: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let moments = first.iter_mut().zip(second);
        for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(moments) {
            [*w, *m, *v] = step.apply(*w, *g, *m, *v);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::Isa;
    use super::*;

    #[test]
    fn rounding_to_bf16_is_to_nearest_and_of_two_to_even() {
        let mut values: Vec<f32> = (0..2000).map(|i| (i as f32 - 999.5) * 0.37).collect();
        let ties = [
            0x3f80_8000,
            0x3f81_8000,
            0x3f80_7fff,
            0x3f80_8001,
            0x7f7f_ffff,
        ];
        values.extend(ties.map(f32::from_bits));
        values.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 1e-42]);
        let wanted: Vec<f32> = values
            .iter()
            .map(|x| half::bf16::from_f32(*x).to_f32())
            .collect();
        for isa in Isa::available() {
            let mut found = values.clone();
            round_to_bf16_at(isa, &mut found);
            assert_eq!(found, wanted, "{isa:?}");
            let mut bad = [
                f32::NAN,
                f32::from_bits(0x7fff_ffff),
                f32::from_bits(0xff80_0001),
            ];
            round_to_bf16_at(isa, &mut bad);
            assert!(bad.iter().all(|x| x.is_nan()), "{isa:?}");
        }
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();

            let relative = (f64::from(exp::<true>(x)) - exact).abs() / exact;

            assert!(relative < 3e-7, "exp({x}) is off by {relative}");
        }
    }

    #[test]
    fn tanh_is_accurate_over_its_range() {
        for i in -20_000..20_000 {
            let x = i as f32 / 1000.0 + 1e-5;
            let exact = f64::from(x).tanh();

            let relative = (f64::from(tanh::<true>(x)) - exact).abs() / exact.abs();

            assert!(relative < 3e-7, "tanh({x}) is off by {relative}");
        }
    }

    #[test]
    fn instruction_sets_agree_on_activations_and_caps() {
        let gate: Vec<f32> = (0..150).map(|i| (i as f32 - 75.0) / 9.0).collect();
        let up: Vec<f32> = (0..150).map(|i| (i as f32 * 0.7).sin()).collect();
        let run = |isa| {
            let (mut y, mut dg, mut du) = (vec![0.0; 150], gate.clone(), up.clone());
            geglu_at(isa, &gate, &up, &mut y);
            geglu_backward_at(isa, &mut dg, &mut du, &up);
            let (mut capped, mut slope) = (gate.clone(), vec![1.0; 150]);
            softcap_at(isa, &mut capped, 4.0);
            softcap_backward_at(isa, &capped, 4.0, &mut slope);
            [y, dg, du, capped, slope].concat()
        };
        let best = run(Isa::best());
        for isa in Isa::available() {
            for (a, b) in run(isa).iter().zip(&best) {
                assert!((a - b).abs() < 1e-5 * b.abs().max(1e-2), "{isa:?}: {a} {b}");
            }
        }
    }

    #[test]
    fn a_window_hides_the_keys_before_it_and_a_softcap_bounds_scores() {
        let block = ScoreBlock {
            stride: 48,
            rows: 3,
            first: 70,
            from: 32,
            keys: 41,
            window: Some(30),
            scale: 0.5,
            softcap: Some(2.0),
        };
        let raw: Vec<f32> = (0..3 * 48).map(|i| (i as f32 * 0.9).sin() * 8.0).collect();
        for isa in Isa::available() {
            let (mut p, mut log) = (raw.clone(), [0.0; 3]);
            softmax_at(isa, &mut p, block, &mut log);
            for i in 0..3 {
                let position = 70 + i;
                let score = |key: usize| {
                    let x = f64::from(raw[i * 48 + key - 32]) * 0.5;
                    2.0 * (x / 2.0).tanh()
                };
                let seen = position - 29..=position;
                let total: f64 = seen.clone().map(|key| score(key).exp()).sum();
                assert!((f64::from(log[i]) - total.ln()).abs() < 1e-6);
                for key in 32..73 {
                    let wanted = if seen.contains(&key) {
                        score(key).exp() / total
                    } else {
                        0.0
                    };
                    let found = f64::from(p[i * 48 + key - 32]);
                    assert!((found - wanted).abs() < 1e-6, "{isa:?} row {i} key {key}");
                }
            }
        }
    }

    #[test]
    fn instruction_sets_agree_on_a_norm_and_its_gradient() {
        let x: Vec<f32> = (0..70).map(|i| (i as f32 * 0.7).sin()).collect();
        let weight: Vec<f32> = (0..35).map(|i| 1.0 + i as f32 / 100.0).collect();
        let run = |isa| {
            let (mut y, mut inverse, mut dx) = (vec![0.0; 70], vec![0.0; 2], vec![0.5; 70]);
            rms_norm_at(isa, &x, &weight, 1e-5, &mut y, &mut inverse);
            rms_norm_backward_at(isa, &x, &weight, &inverse, &y, &mut dx);
            y.extend(dx);
            y
        };
        let best = run(Isa::best());
        for isa in Isa::available() {
            for (a, b) in run(isa).iter().zip(&best) {
                assert!((a - b).abs() < 1e-5, "{isa:?}: {a} {b}");
            }
        }
    }

    #[test]
    fn log_sum_exp_has_the_same_bits_in_forward_and_backward() {
        let x: Vec<f32> = (0..1003).map(|i| (i as f32 * 1.3).cos() * 9.0).collect();
        for isa in Isa::available() {
            let mut copy = x.clone();
            assert_eq!(
                log_sum_exp_at(isa, &x),
                exp_and_log_sum_at(isa, &mut copy).0
            );
        }
    }

    #[test]
    fn the_first_of_equal_maxima_is_chosen() {
        assert_eq!(arg_max(&[0.5, 2.0, -1.0, 2.0]), 1);
    }
}
