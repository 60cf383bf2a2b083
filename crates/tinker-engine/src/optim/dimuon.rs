//! Dimuon: the direction of steepest descent in spectral norm, of a momentum scaled by row and column.
//!
//! The service publishes the parameters of its Dimuon, that it scales rows and columns before a
//! matrix sign, and that its direction has the Frobenius norm `sqrt(rank)`; not its formulas. These
//! are ours: the diagonal of Shampoo (Gupta et al. 2018, algorithm 1) for the scaling, and the
//! Newton-Schulz iteration of Muon (Jordan et al. 2024) for the matrix sign.

use super::{Rule, check_rules};
use crate::error::Result;

/// Hyper-parameters of one Dimuon step.
///
/// For a factor `W` of a LoRA module with the momentum `M = beta1 M + (1 - beta1) G`:
///
/// ```text
/// P = M / ((R + d) (C + d))^(1/4)    R, C: mean squares of M's rows and columns over that of all
/// W = W - learning_rate (rank / 32)^e sign(P)       sign(U S V^T) = U V^T
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dimuon {
    /// Step size, at least 0.
    pub learning_rate: f32,
    /// Decay of the momentum, in `[0, 1)`.
    pub beta1: f32,
    /// Largest global gradient norm; 0 turns clipping off.
    pub grad_clip_norm: f32,
    /// `d`: keeps rows and columns without momentum from being scaled up; above 0.
    pub damping: f32,
    /// `e`: how the step grows with the rank.
    pub rank_exponent: f32,
}

impl Dimuon {
    /// A step of this size with the defaults of the service: momentum 0.9, no clipping, damping 1e-4,
    /// rank exponent 0.175.
    #[must_use]
    pub const fn new(learning_rate: f32) -> Self {
        Self {
            learning_rate,
            beta1: 0.9,
            grad_clip_norm: 0.0,
            damping: 1e-4,
            rank_exponent: 0.175,
        }
    }

    /// Checks every hyper-parameter against its range.
    pub(crate) fn check(&self) -> Result<()> {
        let at_least_0 = |name, value: f32| -> Rule { (name, value, value >= 0.0, "at least 0") };
        let beta1 = (0.0..1.0).contains(&self.beta1);
        check_rules(&[
            at_least_0("learning_rate", self.learning_rate),
            ("beta1", self.beta1, beta1, "in [0, 1)"),
            at_least_0("grad_clip_norm", self.grad_clip_norm),
            ("damping", self.damping, self.damping > 0.0, "above 0"),
            ("rank_exponent", self.rank_exponent, true, "finite"),
        ])
    }

    /// The step size for an adapter of this rank.
    pub(crate) fn rate(&self, rank: usize) -> f32 {
        const NEUTRAL_RANK: f64 = 32.0;
        let correction = (rank as f64 / NEUTRAL_RANK).powf(self.rank_exponent.into());
        (f64::from(self.learning_rate) * correction) as f32
    }
}

/// The momentum after a gradient.
pub(crate) fn ema(beta: f32, momentum: f32, gradient: f32) -> f32 {
    beta * momentum + (1.0 - beta) * gradient
}

/// Coefficients of `p(G) = a + b G + c G^2`, by which an iteration multiplies.
type Coefficients = [f64; 3];

/// Muon's iteration lifts small singular values fast and ends between 0.7 and 1.2.
const LIFT: Coefficients = [3.4445, -4.7750, 2.0315];
const N_LIFTS: usize = 5;
/// The fifth-order iteration, which converges to 1 from there.
const SETTLE: Coefficients = [1.875, -1.25, 0.375];
const N_SETTLES: usize = 3;

/// Computes the direction of one factor, with memory kept between factors.
#[derive(Debug, Default)]
pub(crate) struct Direction {
    scaled: Vec<f64>,
    gram: Vec<f64>,
    product: Vec<f64>,
    polynomial: Vec<f64>,
    total: Vec<f64>,
}

impl Direction {
    /// Overwrites `momentum [rank, n]` with its direction; zero stays zero.
    ///
    /// All iterations are on the `[rank, rank]` Gram matrix, with which their polynomials commute; the
    /// factor itself is read twice.
    pub(crate) fn compute(&mut self, rank: usize, damping: f32, momentum: &mut [f32]) {
        self.scale(rank, damping.into(), momentum);
        let squares: f64 = self.scaled.iter().map(|x| x * x).sum();
        if squares == 0.0 {
            momentum.fill(0.0);
            return;
        }
        let inverse = 1.0 / squares.sqrt();
        self.scaled.iter_mut().for_each(|x| *x *= inverse);
        self.iterate(rank);
        let n = momentum.len() / rank;
        let mut row = vec![0.0; n];
        for (i, out) in momentum.chunks_exact_mut(n).enumerate() {
            row.fill(0.0);
            for (factor, x) in self.total[i * rank..][..rank]
                .iter()
                .zip(self.scaled.chunks_exact(n))
            {
                add_scaled(*factor, x, &mut row);
            }
            for (out, x) in out.iter_mut().zip(&row) {
                *out = *x as f32;
            }
        }
    }

    /// The momentum with its rows and columns scaled.
    fn scale(&mut self, rank: usize, damping: f64, momentum: &[f32]) {
        let n = momentum.len() / rank;
        let (mut rows, mut columns) = (vec![0.0; rank], vec![0.0; n]);
        for (row, values) in rows.iter_mut().zip(momentum.chunks_exact(n)) {
            for (column, x) in columns.iter_mut().zip(values) {
                let square = f64::from(*x) * f64::from(*x);
                *row += square;
                *column += square;
            }
        }
        let all = rows.iter().sum::<f64>() / (rank * n) as f64;
        self.scaled.clear();
        if all == 0.0 {
            return;
        }
        let factor = |sum: f64, count: usize| (sum / count as f64 / all + damping).powf(-0.25);
        columns.iter_mut().for_each(|c| *c = factor(*c, rank));
        for (row, values) in rows.iter().zip(momentum.chunks_exact(n)) {
            let row = factor(*row, n);
            let scaled = values
                .iter()
                .zip(&columns)
                .map(|(x, c)| f64::from(*x) * row * c);
            self.scaled.extend(scaled);
        }
    }

    /// Finds the `[rank, rank]` matrix that takes the scaled momentum to its sign.
    fn iterate(&mut self, rank: usize) {
        let n = self.scaled.len() / rank;
        self.gram.clear();
        for a in self.scaled.chunks_exact(n) {
            self.gram
                .extend(self.scaled.chunks_exact(n).map(|b| dot(a, b)));
        }
        self.total.clear();
        self.total.resize(rank * rank, 0.0);
        self.total
            .iter_mut()
            .step_by(rank + 1)
            .for_each(|x| *x = 1.0);
        let steps =
            std::iter::repeat_n(LIFT, N_LIFTS).chain(std::iter::repeat_n(SETTLE, N_SETTLES));
        for [a, b, c] in steps {
            multiply(rank, &self.gram, &self.gram, &mut self.polynomial);
            for (p, g) in self.polynomial.iter_mut().zip(&self.gram) {
                *p = c * *p + b * g;
            }
            self.polynomial
                .iter_mut()
                .step_by(rank + 1)
                .for_each(|p| *p += a);
            multiply(rank, &self.polynomial, &self.total, &mut self.product);
            std::mem::swap(&mut self.total, &mut self.product);
            multiply(rank, &self.polynomial, &self.gram, &mut self.product);
            multiply(rank, &self.product, &self.polynomial, &mut self.gram);
        }
    }
}

/// `out = a b`, all `[n, n]`.
fn multiply(n: usize, a: &[f64], b: &[f64], out: &mut Vec<f64>) {
    out.clear();
    out.resize(n * n, 0.0);
    for (out, a) in out.chunks_exact_mut(n).zip(a.chunks_exact(n)) {
        for (factor, b) in a.iter().zip(b.chunks_exact(n)) {
            add_scaled(*factor, b, out);
        }
    }
}

fn add_scaled(factor: f64, x: &[f64], y: &mut [f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// `sum a b`, in lanes so that it is vectorised.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng;

    fn random(rank: usize, n: usize) -> Vec<f32> {
        let value = |i| rng::uniform(7, i) as f32 - 0.5;
        (0..(rank * n) as u64).map(value).collect()
    }

    fn direction(rank: usize, momentum: &[f32]) -> Vec<f32> {
        let mut out = momentum.to_vec();
        Direction::default().compute(rank, 1e-4, &mut out);
        out
    }

    #[test]
    fn rows_of_a_direction_are_orthonormal() {
        let (rank, n) = (5, 40);

        let direction = direction(rank, &random(rank, n));

        for i in 0..rank {
            for j in 0..rank {
                let rows = direction[i * n..][..n].iter().zip(&direction[j * n..][..n]);
                let dot: f64 = rows.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let wanted = if i == j { 1.0 } else { 0.0 };
                assert!((dot - wanted).abs() < 1e-5, "{i} {j}: {dot}");
            }
        }
    }

    #[test]
    fn a_direction_does_not_depend_on_the_size_of_the_momentum() {
        let momentum = random(3, 20);
        let tiny: Vec<f32> = momentum.iter().map(|x| x * 1e-12).collect();

        let (a, b) = (direction(3, &momentum), direction(3, &tiny));

        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }

    #[test]
    fn without_momentum_there_is_no_direction() {
        assert_eq!(direction(2, &[0.0; 8]), [0.0; 8]);
    }

    #[test]
    fn the_step_grows_with_the_rank() {
        let step = Dimuon::new(0.5);

        assert_eq!(step.rate(32), 0.5);
        assert_eq!(step.rate(64), (0.5 * 2f64.powf(0.175)) as f32);
        let flat = Dimuon {
            rank_exponent: 0.0,
            ..step
        };
        assert_eq!(flat.rate(1), 0.5);
    }
}
