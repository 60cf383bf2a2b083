//! What a tape notes: operations and the nodes they read.

use std::rc::Rc;

use super::tensor::Tensor;

/// Index of a node.
pub(super) type Id = usize;

/// A function of one number.
#[derive(Debug, Clone, Copy)]
pub(super) enum Unary {
    Exp,
    /// `exp(x) - 1`, exact near zero.
    ExpM1,
    Ln,
    /// `ln(1 + x)`, exact near zero.
    Ln1p,
    Sqrt,
    Tanh,
    Sigmoid,
    LogSigmoid,
    Powf(f64),
}

impl Unary {
    fn of(self, x: f64) -> f64 {
        match self {
            Self::Exp => x.exp(),
            Self::ExpM1 => x.exp_m1(),
            Self::Ln => x.ln(),
            Self::Ln1p => x.ln_1p(),
            Self::Sqrt => x.sqrt(),
            Self::Tanh => x.tanh(),
            // Neither form overflows on its side.
            Self::Sigmoid if x < 0.0 => x.exp() / (1.0 + x.exp()),
            Self::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Self::LogSigmoid => x.min(0.0) - (-x.abs()).exp().ln_1p(),
            Self::Powf(power) => x.powf(power),
        }
    }
}

/// An operation. Binary ones have operands of equal shapes: repetition is an operation of its own.
#[derive(Debug, Clone)]
pub(super) enum Op {
    Leaf,
    Scale(Id, f64),
    Offset(Id, f64),
    Unary(Unary, Id),
    Add(Id, Id),
    Sub(Id, Id),
    Mul(Id, Id),
    Div(Id, Id),
    /// Times constants; where the constant is 0 the result is 0, even of infinity.
    Masked(Id, Rc<[f64]>),
    Broadcast(Id),
    SumTo(Id),
    Reshape(Id),
    /// The values at these positions.
    Gather(Id, Rc<[usize]>),
    /// Zeros with the values added at these positions.
    Scatter(Id, Rc<[usize]>),
    /// All values one after the other.
    Concat(Rc<[Id]>),
    MatMul(Id, Id),
    Transpose(Id),
}

impl Op {
    /// The result, which has this shape.
    pub(super) fn compute(&self, shape: &Rc<[usize]>, value: impl Fn(Id) -> Tensor) -> Tensor {
        let reshaped = |values: Rc<[f64]>| Tensor::new(Rc::clone(shape), values);
        match self {
            Self::Leaf => Tensor::scalar(f64::NAN),
            &Self::Scale(a, factor) => value(a).map(|x| x * factor),
            &Self::Offset(a, term) => value(a).map(|x| x + term),
            &Self::Unary(function, a) => value(a).map(|x| function.of(x)),
            &Self::Add(a, b) => value(a).zip(&value(b), |a, b| a + b),
            &Self::Sub(a, b) => value(a).zip(&value(b), |a, b| a - b),
            &Self::Mul(a, b) => value(a).zip(&value(b), |a, b| a * b),
            &Self::Div(a, b) => value(a).zip(&value(b), |a, b| a / b),
            Self::Masked(a, weights) => {
                let weights = reshaped(Rc::clone(weights));
                value(*a).zip(&weights, |x, w| if w == 0.0 { 0.0 } else { w * x })
            }
            &Self::Broadcast(a) => value(a).broadcast(shape),
            &Self::SumTo(a) => value(a).sum_to(shape),
            &Self::Reshape(a) => reshaped(value(a).values),
            Self::Gather(a, positions) => {
                let values = value(*a).values;
                reshaped(positions.iter().map(|&i| values[i]).collect())
            }
            Self::Scatter(a, positions) => {
                let mut sums = vec![0.0; super::n_cells(shape)];
                for (value, &i) in value(*a).values.iter().zip(&**positions) {
                    sums[i] += value;
                }
                reshaped(sums.into())
            }
            Self::Concat(parts) => {
                let values = parts.iter().flat_map(|&part| value(part).values.to_vec());
                reshaped(values.collect())
            }
            &Self::MatMul(a, b) => value(a).matmul(&value(b)),
            &Self::Transpose(a) => value(a).transpose(),
        }
    }

    /// The nodes that it reads.
    pub(super) fn operands(&self) -> Vec<Id> {
        match self {
            Self::Leaf => Vec::new(),
            &(Self::Scale(a, _)
            | Self::Offset(a, _)
            | Self::Unary(_, a)
            | Self::Masked(a, _)
            | Self::Broadcast(a)
            | Self::SumTo(a)
            | Self::Reshape(a)
            | Self::Gather(a, _)
            | Self::Scatter(a, _)
            | Self::Transpose(a)) => vec![a],
            &(Self::Add(a, b)
            | Self::Sub(a, b)
            | Self::Mul(a, b)
            | Self::Div(a, b)
            | Self::MatMul(a, b)) => vec![a, b],
            Self::Concat(parts) => parts.to_vec(),
        }
    }
}
