//! Dense arrays of 64-bit floats, row-major, and how their shapes fit together.

use std::rc::Rc;

/// An array. Cheap to clone.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tensor {
    pub(super) shape: Rc<[usize]>,
    pub(super) values: Rc<[f64]>,
}

impl Tensor {
    /// The number of values is the product of the shape; callers see to that.
    pub(super) fn new(shape: impl Into<Rc<[usize]>>, values: impl Into<Rc<[f64]>>) -> Self {
        let (shape, values) = (shape.into(), values.into());
        debug_assert_eq!(n_cells(&shape), values.len());
        Self { shape, values }
    }

    pub(super) fn scalar(value: f64) -> Self {
        Self::new([], [value])
    }

    pub(super) fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        let values: Rc<[f64]> = self.values.iter().map(|&x| f(x)).collect();
        Self::new(Rc::clone(&self.shape), values)
    }

    /// Both have the same shape.
    pub(super) fn zip(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
        let pairs = self.values.iter().zip(&*other.values);
        let values: Rc<[f64]> = pairs.map(|(&a, &b)| f(a, b)).collect();
        Self::new(Rc::clone(&self.shape), values)
    }

    /// Repeats values along axes that are missing or 1; the shapes fit.
    pub(super) fn broadcast(&self, shape: &[usize]) -> Self {
        let values: Rc<[f64]> = match &*self.values {
            [value] => std::iter::repeat_n(*value, n_cells(shape)).collect(),
            values => sources(&self.shape, shape).map(|i| values[i]).collect(),
        };
        Self::new(shape, values)
    }

    /// The opposite of [`broadcast`](Self::broadcast): sums over the axes it would repeat.
    pub(super) fn sum_to(&self, shape: &[usize]) -> Self {
        if n_cells(shape) == 1 {
            return Self::new(shape, [self.values.iter().sum()]);
        }
        let mut sums = vec![0.0; n_cells(shape)];
        for (value, i) in self.values.iter().zip(sources(shape, &self.shape)) {
            sums[i] += value;
        }
        Self::new(shape, sums)
    }

    /// `[m, k]` times `[k, n]`.
    pub(super) fn matmul(&self, other: &Self) -> Self {
        let (&[m, k], &[_, n]) = (&*self.shape, &*other.shape) else {
            return Self::scalar(f64::NAN);
        };
        let mut product = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..k {
                let a = self.values[i * k + j];
                let row = &other.values[j * n..(j + 1) * n];
                for (sum, b) in product[i * n..(i + 1) * n].iter_mut().zip(row) {
                    *sum += a * b;
                }
            }
        }
        Self::new([m, n], product)
    }

    /// `[m, n]` as `[n, m]`.
    pub(super) fn transpose(&self) -> Self {
        let &[m, n] = &*self.shape else {
            return self.clone();
        };
        let cells = (0..n).flat_map(|j| (0..m).map(move |i| i * n + j));
        let values: Rc<[f64]> = cells.map(|i| self.values[i]).collect();
        Self::new([n, m], values)
    }
}

/// Number of values of a shape.
pub(super) fn n_cells(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// The shape that two arrays are repeated to: aligned at the last axis, 1 fits everything.
pub(super) fn common_shape(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let n_axes = a.len().max(b.len());
    let dim = |shape: &[usize], axis: usize| {
        let missing = n_axes - shape.len();
        axis.checked_sub(missing).map_or(1, |axis| shape[axis])
    };
    (0..n_axes)
        .map(|axis| match (dim(a, axis), dim(b, axis)) {
            (a, b) if a == b || b == 1 => Some(a),
            (1, b) => Some(b),
            _ => None,
        })
        .collect()
}

/// For each cell of `to`, the cell of `from` that is repeated into it.
fn sources(from: &[usize], to: &[usize]) -> impl Iterator<Item = usize> {
    let missing = to.len() - from.len();
    let mut stride = 1;
    let mut strides = vec![0; to.len()];
    for axis in (0..from.len()).rev() {
        if from[axis] > 1 {
            strides[missing + axis] = stride;
        }
        stride *= from[axis];
    }
    let dims = to.to_vec();
    (0..n_cells(to)).map(move |mut cell| {
        let mut source = 0;
        for (dim, stride) in dims.iter().zip(&strides).rev() {
            source += cell % dim * stride;
            cell /= dim;
        }
        source
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(a: &[usize], b: &[usize], expected: Option<&[usize]>) {
        assert_eq!(common_shape(a, b).as_deref(), expected);
        assert_eq!(common_shape(b, a).as_deref(), expected);
    }

    #[test]
    fn shapes_are_aligned_at_the_last_axis() {
        check(&[], &[3], Some(&[3]));
        check(&[3], &[2, 3], Some(&[2, 3]));
        check(&[2, 1], &[3], Some(&[2, 3]));
        check(&[0], &[1], Some(&[0]));
        check(&[2], &[2, 3], None);
        check(&[0], &[3], None);
    }

    #[test]
    fn sums_undo_repetition() {
        let column = Tensor::new([2, 1], [1.0, 2.0]);

        let repeated = column.broadcast(&[2, 2, 3]);

        assert_eq!(repeated.values[..6], [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]);
        assert_eq!(repeated.sum_to(&[2, 1]).values[..], [6.0, 12.0]);
        assert_eq!(repeated.sum_to(&[]).values[..], [18.0]);
    }

    #[test]
    fn products_of_matrices() {
        let a = Tensor::new([1, 2], [1.0, 2.0]);
        let b = Tensor::new([2, 3], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);

        assert_eq!(a.matmul(&b).values[..], [9.0, 12.0, 15.0]);
        assert_eq!(b.transpose().values[..], [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
