//! Choosing, joining and arranging values.

use std::ops::Range;
use std::rc::Rc;

use super::op::{Id, Op};
use super::{Tape, Var};

impl<'t> Var<'t> {
    /// Times the weights, one per value; a weight of 0 gives 0 even of infinity.
    #[must_use]
    pub fn mask<T: Into<f64> + Copy>(self, weights: &[T]) -> Self {
        if weights.len() != self.n_values() {
            let (n, shape) = (weights.len(), self.shape());
            let detail = format!("{n} weights for the shape {shape:?}");
            return self.tape.fail("mask", detail);
        }
        self.masked_by(weights.iter().map(|&w| w.into()).collect())
    }

    /// The mean weighted by `weights`, one per value. Fails if they add up to 0.
    #[must_use]
    pub fn masked_mean<T: Into<f64> + Copy>(self, weights: &[T]) -> Self {
        let total: f64 = weights.iter().map(|&w| w.into()).sum();
        if total == 0.0 {
            let detail = "the weights add up to 0".into();
            return self.tape.fail("masked_mean", detail);
        }
        self.mask(weights).sum() / total
    }

    /// `[positions]`: the values at these row-major positions, which may repeat.
    #[must_use]
    pub fn gather(self, positions: &[usize]) -> Self {
        let n = self.n_values();
        if let Some(position) = positions.iter().find(|&&i| i >= n) {
            let detail = format!("position {position} of {n} values");
            return self.tape.fail("gather", detail);
        }
        let positions: Rc<[usize]> = positions.into();
        let shape = [positions.len()];
        self.tape.apply(Op::Gather(self.id, positions), shape)
    }

    /// `[range]`: the values at consecutive row-major positions.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Self {
        if range.start > range.end || range.end > self.n_values() {
            let detail = format!("{range:?} of {} values", self.n_values());
            return self.tape.fail("slice", detail);
        }
        self.gather(&range.collect::<Vec<_>>())
    }

    /// `[rows]` of `[rows, columns]`: one value of each row, at these columns.
    #[must_use]
    pub fn gather_rows(self, columns: &[usize]) -> Self {
        let shape = self.shape();
        let &[n_rows, n_columns] = &*shape else {
            let detail = format!("the shape {shape:?} has no rows and columns");
            return self.tape.fail("gather_rows", detail);
        };
        let is_outside = columns.iter().any(|&column| column >= n_columns);
        if columns.len() != n_rows || is_outside {
            let detail = format!("columns {columns:?} of the shape {shape:?}");
            return self.tape.fail("gather_rows", detail);
        }
        let positions = columns.iter().enumerate();
        let positions = positions.map(|(row, column)| row * n_columns + column);
        self.gather(&positions.collect::<Vec<_>>())
    }

    /// The same values, row-major, in another shape.
    #[must_use]
    pub fn reshape(self, shape: &[usize]) -> Self {
        let n_values = shape.iter().try_fold(1_usize, |n, &dim| n.checked_mul(dim));
        if n_values != Some(self.n_values()) {
            let detail = format!(
                "the shape {:?} has not as many values as {shape:?}",
                self.shape()
            );
            return self.tape.fail("reshape", detail);
        }
        self.tape.apply(Op::Reshape(self.id), shape)
    }

    /// `[m, n]` as `[n, m]`.
    #[must_use]
    pub fn transpose(self) -> Self {
        let shape = self.shape();
        match *shape {
            [m, n] => self.tape.apply(Op::Transpose(self.id), [n, m]),
            _ => {
                let detail = format!("the shape {shape:?} has no rows and columns");
                self.tape.fail("transpose", detail)
            }
        }
    }

    /// The matrix product of `[m, k]` and `[k, n]`.
    #[must_use]
    pub fn matmul(self, other: Self) -> Self {
        let (a, b) = (self.shape(), other.shape());
        match (&*a, &*b) {
            (&[m, k], &[k2, n]) if k == k2 && std::ptr::eq(self.tape, other.tape) => {
                self.tape.apply(Op::MatMul(self.id, other.id), [m, n])
            }
            _ => {
                let detail = format!("the shapes {a:?} and {b:?} do not fit together");
                self.tape.fail("matmul", detail)
            }
        }
    }
}

impl Tape {
    /// `[values]`: all values of all parts, one part after the other.
    pub fn concat<'t>(&'t self, parts: impl IntoIterator<Item = Var<'t>>) -> Var<'t> {
        let parts: Vec<Var<'t>> = parts.into_iter().collect();
        let n = parts.iter().map(|part| part.n_values()).sum::<usize>();
        self.joined("concat", &parts, vec![n])
    }

    /// `[parts, …]`: parts of equal shapes along a new first axis, such as one number per datum.
    pub fn stack<'t>(&'t self, parts: impl IntoIterator<Item = Var<'t>>) -> Var<'t> {
        let parts: Vec<Var<'t>> = parts.into_iter().collect();
        let one = parts.first().map(|part| part.shape()).unwrap_or_default();
        if let Some(other) = parts.iter().find(|part| part.shape() != one) {
            let detail = format!("the shapes {one:?} and {:?} differ", other.shape());
            return self.fail("stack", detail);
        }
        let shape = std::iter::once(parts.len()).chain(one).collect();
        self.joined("stack", &parts, shape)
    }

    fn joined<'t>(&'t self, name: &'static str, parts: &[Var<'t>], shape: Vec<usize>) -> Var<'t> {
        if parts.iter().any(|part| !std::ptr::eq(part.tape, self)) {
            return self.fail(name, "the parts are on two tapes".into());
        }
        let ids: Rc<[Id]> = parts.iter().map(|part| part.id).collect();
        self.apply(Op::Concat(ids), shape)
    }
}
