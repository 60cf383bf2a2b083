//! Functions and operators that work value by value.

use std::ops::{Add, Div, Mul, Neg, Sub};
use std::rc::Rc;

use super::op::{Id, Op, Unary};
use super::tensor::common_shape;
use super::{Tape, Var};

impl<'t> Var<'t> {
    /// `e^x`.
    #[must_use]
    pub fn exp(self) -> Self {
        self.unary(Unary::Exp)
    }

    /// `e^x - 1`, exact near zero.
    #[must_use]
    pub fn exp_m1(self) -> Self {
        self.unary(Unary::ExpM1)
    }

    /// Natural logarithm.
    #[must_use]
    pub fn ln(self) -> Self {
        self.unary(Unary::Ln)
    }

    /// `ln(1 + x)`, exact near zero.
    #[must_use]
    pub fn ln_1p(self) -> Self {
        self.unary(Unary::Ln1p)
    }

    /// Square root. Its gradient at 0 is infinite; [`norm`](Self::norm) does not have that.
    #[must_use]
    pub fn sqrt(self) -> Self {
        self.unary(Unary::Sqrt)
    }

    /// Hyperbolic tangent.
    #[must_use]
    pub fn tanh(self) -> Self {
        self.unary(Unary::Tanh)
    }

    /// `1 / (1 + e^-x)`.
    #[must_use]
    pub fn sigmoid(self) -> Self {
        self.unary(Unary::Sigmoid)
    }

    /// `ln sigmoid(x)`, without overflow: the loss of DPO is `-logsigmoid` of the margin.
    #[must_use]
    pub fn logsigmoid(self) -> Self {
        self.unary(Unary::LogSigmoid)
    }

    /// `ln(1 + e^x)`, without overflow.
    #[must_use]
    pub fn softplus(self) -> Self {
        -(-self).logsigmoid()
    }

    /// `x^power`.
    #[must_use]
    pub fn powf(self, power: f64) -> Self {
        self.unary(Unary::Powf(power))
    }

    /// `x^2`.
    #[must_use]
    pub fn square(self) -> Self {
        self * self
    }

    /// `|x|`; gradient 0 at 0.
    #[must_use]
    pub fn abs(self) -> Self {
        self.weigh(|x| if x == 0.0 { 0.0 } else { x.signum() })
    }

    /// `max(x, 0)`; gradient 0 at 0.
    #[must_use]
    pub fn relu(self) -> Self {
        self.weigh(|x| match x {
            x if x > 0.0 => 1.0,
            x if x.is_nan() => f64::NAN,
            _ => 0.0,
        })
    }

    /// Between two bounds; no gradient beyond them.
    #[must_use]
    pub fn clamp(self, min: f64, max: f64) -> Self {
        if min.is_nan() || max.is_nan() || min > max {
            return self
                .tape
                .fail("clamp", format!("{min} is not at most {max}"));
        }
        let inside = |x: f64| min <= x && x <= max;
        let bound = self.tensor().map(|x| match x {
            x if inside(x) => 0.0,
            x if x < min => min,
            x if x > max => max,
            _ => f64::NAN,
        });
        self.weigh(|x| if inside(x) { 1.0 } else { 0.0 }) + self.tape.leaf(bound)
    }

    /// The larger of two; equal ones share the gradient.
    #[must_use]
    pub fn maximum(self, other: Self) -> Self {
        self.choose("maximum", other, |a, b| a > b)
    }

    /// The smaller of two; equal ones share the gradient.
    #[must_use]
    pub fn minimum(self, other: Self) -> Self {
        self.choose("minimum", other, |a, b| a < b)
    }

    fn choose(self, name: &'static str, other: Self, wins: fn(f64, f64) -> bool) -> Self {
        let Some((a, b)) = self.repeated(name, other) else {
            return self.tape.number(f64::NAN);
        };
        let share = |a: f64, b: f64| match () {
            () if a.is_nan() || b.is_nan() => f64::NAN,
            () if wins(a, b) => 1.0,
            () if wins(b, a) => 0.0,
            () => 0.5,
        };
        let (x, y) = (a.tensor(), b.tensor());
        let (of_a, of_b) = (x.zip(&y, share).values, y.zip(&x, share).values);
        a.masked_by(of_a) + b.masked_by(of_b)
    }

    /// Times a function of the value that is not differentiated.
    fn weigh(self, weight: impl Fn(f64) -> f64) -> Self {
        self.masked_by(self.tensor().map(weight).values)
    }

    pub(super) fn masked_by(self, weights: Rc<[f64]>) -> Self {
        self.tape.same_shape(Op::Masked(self.id, weights), self)
    }

    fn unary(self, function: Unary) -> Self {
        self.tape.same_shape(Op::Unary(function, self.id), self)
    }

    /// Both repeated to their common shape.
    pub(super) fn repeated(self, name: &'static str, other: Self) -> Option<(Self, Self)> {
        if !std::ptr::eq(self.tape, other.tape) {
            self.tape.fail(name, "the operands are on two tapes".into());
            return None;
        }
        let (a, b) = (self.tensor().shape, other.tensor().shape);
        if a == b {
            return Some((self, other));
        }
        let Some(shape) = common_shape(&a, &b) else {
            let detail = format!("the shapes {a:?} and {b:?} do not fit together");
            self.tape.fail(name, detail);
            return None;
        };
        Some((self.broadcast(&shape), other.broadcast(&shape)))
    }

    fn broadcast(self, shape: &[usize]) -> Self {
        if *self.tensor().shape == *shape {
            return self;
        }
        self.tape.apply(Op::Broadcast(self.id), shape)
    }

    fn binary(self, name: &'static str, other: Self, op: fn(Id, Id) -> Op) -> Self {
        match self.repeated(name, other) {
            Some((a, b)) => self.tape.same_shape(op(a.id, b.id), a),
            None => self.tape.number(f64::NAN),
        }
    }
}

macro_rules! operator {
    ($Trait:ident, $method:ident, $with_number:expr, $of_number:expr) => {
        impl<'t> $Trait for Var<'t> {
            type Output = Self;

            fn $method(self, other: Self) -> Self {
                self.binary(stringify!($method), other, Op::$Trait)
            }
        }

        impl<'t> $Trait<f64> for Var<'t> {
            type Output = Self;

            fn $method(self, number: f64) -> Self {
                let with_number: fn(Self, f64) -> Self = $with_number;
                with_number(self, number)
            }
        }

        impl<'t> $Trait<Var<'t>> for f64 {
            type Output = Var<'t>;

            fn $method(self, var: Var<'t>) -> Var<'t> {
                let of_number: fn(f64, Var<'t>) -> Var<'t> = $of_number;
                of_number(self, var)
            }
        }
    };
}

operator!(Add, add, offset, |number, var| offset(var, number));
operator!(
    Sub,
    sub,
    |var, number| offset(var, -number),
    |number, var| { offset(-var, number) }
);
operator!(Mul, mul, scale, |number, var| scale(var, number));
operator!(
    Div,
    div,
    |var, number| scale(var, 1.0 / number),
    |number, var| var.tape.number(number) / var
);

impl Neg for Var<'_> {
    type Output = Self;

    fn neg(self) -> Self {
        scale(self, -1.0)
    }
}

fn offset(var: Var<'_>, number: f64) -> Var<'_> {
    var.tape.same_shape(Op::Offset(var.id, number), var)
}

fn scale(var: Var<'_>, factor: f64) -> Var<'_> {
    var.tape.same_shape(Op::Scale(var.id, factor), var)
}

impl Tape {
    /// The sum of several values; 0 of none.
    pub fn sum<'t>(&'t self, vars: impl IntoIterator<Item = Var<'t>>) -> Var<'t> {
        let sum = vars.into_iter().reduce(|sum, var| sum + var);
        sum.unwrap_or_else(|| self.number(0.0))
    }
}
