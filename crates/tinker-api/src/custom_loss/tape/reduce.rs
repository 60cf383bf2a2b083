//! Sums, means and their like, over all values or along one axis.

use super::Var;
use super::op::Op;
use super::tensor::n_cells;

impl<'t> Var<'t> {
    /// The sum of all values; 0 of none.
    #[must_use]
    pub fn sum(self) -> Self {
        self.tape.apply(Op::SumTo(self.id), [])
    }

    /// The mean of all values. Fails if there are none.
    #[must_use]
    pub fn mean(self) -> Self {
        match self.n_values() {
            0 => self.tape.fail("mean", "there are no values".into()),
            n => self.sum() / n as f64,
        }
    }

    /// Euclidean norm of all values; its gradient at zero is zero.
    #[must_use]
    pub fn norm(self) -> Self {
        let squares = self.square().sum();
        match squares.value() {
            0.0 => squares,
            _ => squares.sqrt(),
        }
    }

    /// The largest value; equal ones share the gradient. Fails if there are none.
    #[must_use]
    pub fn max(self) -> Self {
        self.extreme("max", f64::max)
    }

    /// The smallest value; equal ones share the gradient. Fails if there are none.
    #[must_use]
    pub fn min(self) -> Self {
        self.extreme("min", f64::min)
    }

    /// `ln sum e^x` of all values, without overflow. Fails if there are none.
    #[must_use]
    pub fn log_sum_exp(self) -> Self {
        let largest = finite(self.max().detach());
        (self - largest).exp().sum().ln() + largest
    }

    /// The sum along an axis, which goes.
    #[must_use]
    pub fn sum_axis(self, axis: usize) -> Self {
        let shape = self.tensor().shape;
        if axis >= shape.len() {
            let detail = format!("the shape {shape:?} has no axis {axis}");
            return self.tape.fail("sum_axis", detail);
        }
        let (mut ones, mut rest) = (shape.to_vec(), shape.to_vec());
        ones[axis] = 1;
        rest.remove(axis);
        let sum = self.tape.apply(Op::SumTo(self.id), ones);
        self.tape.apply(Op::Reshape(sum.id), rest)
    }

    /// The mean along an axis, which goes. Fails if it is empty.
    #[must_use]
    pub fn mean_axis(self, axis: usize) -> Self {
        match self.tensor().shape.get(axis) {
            Some(0) => self.tape.fail("mean_axis", "there are no values".into()),
            Some(&n) => self.sum_axis(axis) / n as f64,
            None => self.sum_axis(axis),
        }
    }

    /// `ln sum e^x` along an axis, which goes, without overflow.
    #[must_use]
    pub fn log_sum_exp_axis(self, axis: usize) -> Self {
        let shape = self.shape();
        let is_empty = n_cells(&shape) == 0;
        if is_empty || axis >= shape.len() {
            let detail = format!("the shape {shape:?} has no values along axis {axis}");
            return self.tape.fail("log_sum_exp_axis", detail);
        }
        // One shift for each line of the axis.
        let mut ones = shape.clone();
        ones[axis] = 1;
        let inner: usize = shape[axis + 1..].iter().product();
        let mut largest = vec![f64::NEG_INFINITY; n_cells(&ones)];
        for (i, x) in self.tensor().values.iter().enumerate() {
            let line = i / (inner * shape[axis]) * inner + i % inner;
            largest[line] = largest[line].max(*x);
        }
        let largest = finite(self.tape.constant(&largest));
        let shift = largest.reshape(&ones);
        let rest: Vec<usize> = (0..shape.len())
            .filter(|&i| i != axis)
            .map(|i| shape[i])
            .collect();
        (self - shift).exp().sum_axis(axis).ln() + largest.reshape(&rest)
    }

    fn extreme(self, name: &'static str, of: fn(f64, f64) -> f64) -> Self {
        let tensor = self.tensor();
        let Some(extreme) = tensor.values.iter().copied().reduce(of) else {
            return self.tape.fail(name, "there are no values".into());
        };
        let n_equal = tensor.values.iter().filter(|&&x| x == extreme).count();
        let share = |x| {
            if x == extreme {
                1.0 / n_equal as f64
            } else {
                0.0
            }
        };
        self.masked_by(tensor.map(share).values).sum()
    }
}

/// Shifts by infinity make no numbers.
fn finite(shift: Var<'_>) -> Var<'_> {
    let finite = |x: f64| if x.is_finite() { x } else { 0.0 };
    shift.tape.leaf(shift.tensor().map(finite))
}
