//! Operations on tensors that remember how to differentiate themselves, backwards.

use std::rc::Rc;

use super::value::{Kind, Tensor, broadcast, broadcast_offsets};

/// Most values that one evaluation reads and writes; a small graph could ask for any number.
const MAX_CELLS: usize = 1 << 24;

/// From the derivative for a result to that for one of its arguments.
type Back = Box<dyn Fn(&[f64]) -> Vec<f64>>;

/// Everything computed so far that depends on the log-probabilities.
#[derive(Default)]
pub(super) struct Tape {
    entries: Vec<Entry>,
    n_cells: usize,
}

struct Entry {
    len: usize,
    parents: Vec<(usize, Back)>,
}

impl Tape {
    /// Accounts for a tensor of this shape and returns its number of values.
    ///
    /// # Errors
    /// If there would be too many values.
    pub(super) fn reserve(&mut self, shape: &[usize]) -> Result<usize, String> {
        let n = shape.iter().copied().fold(1, usize::saturating_mul);
        self.n_cells = self.n_cells.saturating_add(n);
        if self.n_cells > MAX_CELLS {
            return Err(format!(
                "a tensor of shape {shape:?} is too much: a loss may read and write {MAX_CELLS} values of a datum in all"
            ));
        }
        Ok(n)
    }

    /// A tensor that nothing is differentiated for.
    pub(super) fn constant(
        &mut self,
        shape: &[usize],
        kind: Kind,
        data: Vec<f64>,
    ) -> Result<Tensor, String> {
        self.reserve(shape)?;
        Ok(Tensor {
            shape: shape.to_vec(),
            kind,
            data: data.into(),
            node: None,
        })
    }

    /// The tensor that everything is differentiated for.
    pub(super) fn variable(&mut self, shape: &[usize], data: Vec<f64>) -> Result<Tensor, String> {
        let mut tensor = self.constant(shape, Kind::Float, data)?;
        tensor.node = Some(self.push(tensor.data.len(), Vec::new()));
        Ok(tensor)
    }

    fn push(&mut self, len: usize, parents: Vec<(usize, Back)>) -> usize {
        self.entries.push(Entry { len, parents });
        self.entries.len() - 1
    }

    fn result(
        &mut self,
        shape: Vec<usize>,
        kind: Kind,
        data: Vec<f64>,
        parents: Vec<(usize, Back)>,
    ) -> Tensor {
        let node = if parents.is_empty() {
            None
        } else {
            Some(self.push(data.len(), parents))
        };
        let data: Rc<[f64]> = data.into();
        Tensor {
            shape,
            kind,
            data,
            node,
        }
    }

    /// Applies `f`, which gives value and derivative, to every value.
    pub(super) fn map(
        &mut self,
        x: &Tensor,
        kind: Kind,
        f: impl Fn(f64) -> (f64, f64),
    ) -> Result<Tensor, String> {
        self.reserve(&x.shape)?;
        let (data, slopes): (Vec<f64>, Vec<f64>) = x.data.iter().map(|v| f(*v)).unzip();
        let back = x.node.map(|node| {
            let back: Back = Box::new(move |g| g.iter().zip(&slopes).map(|(g, s)| g * s).collect());
            (node, back)
        });
        Ok(self.result(x.shape.clone(), kind, data, back.into_iter().collect()))
    }

    /// Applies `f`, which gives value and both derivatives, to the values of two tensors.
    pub(super) fn zip(
        &mut self,
        x: &Tensor,
        y: &Tensor,
        kind: Kind,
        f: impl Fn(f64, f64) -> [f64; 3],
    ) -> Result<Tensor, String> {
        let shape = broadcast(&x.shape, &y.shape)?;
        let n = self.reserve(&shape)?;
        let at: [Rc<[usize]>; 2] = [x, y].map(|t| broadcast_offsets(&t.shape, &shape).into());
        let all: Vec<[f64; 3]> = (0..n)
            .map(|i| f(x.data[at[0][i]], y.data[at[1][i]]))
            .collect();
        let mut parents = Vec::new();
        for (which, tensor) in [x, y].into_iter().enumerate() {
            let Some(node) = tensor.node else { continue };
            let slopes: Vec<f64> = all.iter().map(|v| v[which + 1]).collect();
            let (at, len) = (Rc::clone(&at[which]), tensor.data.len());
            let back: Back = Box::new(move |g| {
                let mut out = vec![0.0; len];
                for ((g, slope), i) in g.iter().zip(&slopes).zip(at.iter()) {
                    out[*i] += g * slope;
                }
                out
            });
            parents.push((node, back));
        }
        let data = all.iter().map(|v| v[0]).collect();
        Ok(self.result(shape, kind, data, parents))
    }

    /// The values of `x` at these places, in another shape.
    pub(super) fn gather(
        &mut self,
        x: &Tensor,
        shape: &[usize],
        at: Vec<usize>,
    ) -> Result<Tensor, String> {
        self.reserve(shape)?;
        let data = at.iter().map(|i| x.data[*i]).collect();
        let len = x.data.len();
        let back = x.node.map(|node| {
            let back: Back = Box::new(move |g| {
                let mut out = vec![0.0; len];
                at.iter().zip(g).for_each(|(i, g)| out[*i] += g);
                out
            });
            (node, back)
        });
        Ok(self.result(shape.to_vec(), x.kind, data, back.into_iter().collect()))
    }

    /// The sums of those values of `x` that have the same place.
    pub(super) fn sum_to(
        &mut self,
        x: &Tensor,
        shape: &[usize],
        to: Vec<usize>,
    ) -> Result<Tensor, String> {
        let n = self.reserve(shape)?;
        let mut data = vec![0.0; n];
        to.iter()
            .zip(x.data.iter())
            .for_each(|(i, v)| data[*i] += v);
        let back = x.node.map(|node| {
            let back: Back = Box::new(move |g| to.iter().map(|i| g[*i]).collect());
            (node, back)
        });
        let kind = x.kind.max(Kind::Int);
        Ok(self.result(shape.to_vec(), kind, data, back.into_iter().collect()))
    }

    /// For every value the sum of those at `at` of itself and all before: rows of `n` values that are
    /// `stride` apart.
    pub(super) fn running_sum(
        &mut self,
        x: &Tensor,
        n: usize,
        stride: usize,
    ) -> Result<Tensor, String> {
        self.reserve(&x.shape)?;
        let mut data = x.data.to_vec();
        let has_previous = move |i: usize| !(i / stride).is_multiple_of(n);
        for i in 0..data.len() {
            if has_previous(i) {
                data[i] += data[i - stride];
            }
        }
        let back = x.node.map(|node| {
            let back: Back = Box::new(move |g| {
                let mut out = g.to_vec();
                for i in (0..out.len()).rev() {
                    if has_previous(i) {
                        out[i - stride] += out[i];
                    }
                }
                out
            });
            (node, back)
        });
        let kind = x.kind.max(Kind::Int);
        Ok(self.result(x.shape.clone(), kind, data, back.into_iter().collect()))
    }

    /// All values of several tensors, one tensor after the other.
    pub(super) fn chain(&mut self, tensors: &[Tensor]) -> Result<Tensor, String> {
        let n = tensors.iter().map(|t| t.data.len()).sum();
        self.reserve(&[n])?;
        let (mut data, mut parents) = (Vec::with_capacity(n), Vec::new());
        for tensor in tensors {
            let range = data.len()..data.len() + tensor.data.len();
            data.extend_from_slice(&tensor.data);
            if let Some(node) = tensor.node {
                let back: Back = Box::new(move |g| g[range.clone()].to_vec());
                parents.push((node, back));
            }
        }
        let kind = tensors.iter().map(|t| t.kind).max().unwrap_or(Kind::Float);
        Ok(self.result(vec![n], kind, data, parents))
    }

    /// The same values, with nothing to differentiate.
    pub(super) fn detach(x: &Tensor) -> Tensor {
        Tensor {
            node: None,
            ..x.clone()
        }
    }

    /// The derivative of the number `of` for the variable `of_variable`.
    pub(super) fn gradient(&self, of: &Tensor, for_variable: &Tensor) -> Vec<f64> {
        let mut gradients: Vec<Option<Vec<f64>>> = self.entries.iter().map(|_| None).collect();
        if let Some(node) = of.node {
            gradients[node] = Some(vec![1.0]);
        }
        for (i, entry) in self.entries.iter().enumerate().rev() {
            if entry.parents.is_empty() {
                continue;
            }
            let Some(own) = gradients[i].take() else {
                continue;
            };
            for (parent, back) in &entry.parents {
                let part = back(&own);
                match &mut gradients[*parent] {
                    Some(sum) => sum.iter_mut().zip(part).for_each(|(s, p)| *s += p),
                    none => *none = Some(part),
                }
            }
        }
        let zeros = || vec![0.0; for_variable.data.len()];
        let own = for_variable.node.and_then(|node| {
            debug_assert_eq!(self.entries[node].len, for_variable.data.len());
            gradients[node].take()
        });
        own.unwrap_or_else(zeros)
    }
}
