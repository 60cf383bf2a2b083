//! What the nodes of a graph are: tensors, Python's numbers and containers.

use std::collections::BTreeMap;
use std::rc::Rc;

/// Most items of a list, those of lists in it included.
const MAX_ITEMS: usize = 1 << 12;

/// The kinds of numbers, each of which holds those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Bool,
    Int,
    Float,
}

/// A tensor. All values are computed in double precision, whatever the kind.
#[derive(Debug, Clone)]
pub(super) struct Tensor {
    pub(super) shape: Vec<usize>,
    pub(super) kind: Kind,
    /// Row-major values.
    pub(super) data: Rc<[f64]>,
    /// Its entry on the tape, if it depends on the log-probabilities.
    pub(super) node: Option<usize>,
}

impl Tensor {
    /// Dimension `dim`, which counts from the end if it is below 0.
    pub(super) fn dim(&self, dim: i64) -> Result<usize, String> {
        let n = self.shape.len().max(1) as i64;
        if dim < -n || dim >= n {
            return Err(format!("there is no dimension {dim} in {:?}", self.shape));
        }
        Ok(dim.rem_euclid(n) as usize)
    }

    /// The only value of a tensor that has one.
    pub(super) fn single(&self) -> Result<f64, String> {
        match *self.data {
            [value] => Ok(value),
            _ => Err(format!("a tensor of shape {:?} is no number", self.shape)),
        }
    }
}

/// The value of a node, or an argument of one.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Tensor(Tensor),
    Number(f64, Kind),
    None,
    Text(String),
    /// A list or a tuple.
    List(Vec<Self>),
    Dict(BTreeMap<String, Self>),
    /// Start, stop and step.
    Slice([Option<i64>; 3]),
    Ellipsis,
    /// A `dtype`.
    Kind(Kind),
    /// A device, a layout or a memory format, of which there is one here.
    Place,
}

impl Value {
    pub(super) const fn int(value: usize) -> Self {
        Self::Number(value as f64, Kind::Int)
    }

    pub(super) fn ints(values: &[usize]) -> Self {
        Self::List(values.iter().map(|v| Self::int(*v)).collect())
    }

    /// What it is, for errors.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Tensor(_) => "a tensor",
            Self::Number(..) => "a number",
            Self::None => "None",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Dict(_) => "a dict",
            Self::Slice(_) => "a slice",
            Self::Ellipsis => "an ellipsis",
            Self::Kind(_) => "a dtype",
            Self::Place => "a device",
        }
    }

    /// Values of all tensors in it.
    pub(super) fn n_values(&self) -> usize {
        match self {
            Self::Tensor(tensor) => tensor.data.len(),
            Self::List(values) => values.iter().map(Self::n_values).sum(),
            Self::Dict(values) => values.values().map(Self::n_values).sum(),
            _ => 0,
        }
    }

    /// A list, which lists of lists must not let grow without bound.
    pub(super) fn list(values: Vec<Self>) -> Result<Self, String> {
        let list = Self::List(values);
        if list.n_items() > MAX_ITEMS {
            return Err(format!("a list of more than {MAX_ITEMS} items"));
        }
        Ok(list)
    }

    fn n_items(&self) -> usize {
        match self {
            Self::List(values) => 1 + values.iter().map(Self::n_items).sum::<usize>(),
            Self::Dict(values) => 1 + values.values().map(Self::n_items).sum::<usize>(),
            _ => 1,
        }
    }

    /// A number, also from a tensor of one value.
    pub(super) fn number(&self) -> Result<f64, String> {
        match self {
            Self::Number(value, _) => Ok(*value),
            Self::Tensor(tensor) => tensor.single(),
            other => Err(format!("{} is no number", other.name())),
        }
    }

    /// A whole number.
    pub(super) fn integer(&self) -> Result<i64, String> {
        let value = self.number()?;
        if value.fract() == 0.0 && value.abs() < (1_u64 << 53) as f64 {
            return Ok(value as i64);
        }
        Err(format!("{value} is no whole number"))
    }

    /// One whole number or a list of them.
    pub(super) fn integers(&self) -> Result<Vec<i64>, String> {
        match self {
            Self::List(values) => values.iter().map(Self::integer).collect(),
            one => Ok(vec![one.integer()?]),
        }
    }
}

/// Distance between neighbours along each dimension, in values.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    strides
}

/// For each place of `shape` in order, the sum of its coordinates times `strides`.
pub(super) fn offsets(shape: &[usize], strides: &[usize]) -> Vec<usize> {
    let mut offsets = vec![0];
    for (n, stride) in shape.iter().zip(strides) {
        let along = |base: &usize| {
            let base = *base;
            (0..*n).map(move |i| base + i * stride)
        };
        offsets = offsets.iter().flat_map(along).collect();
    }
    offsets
}

/// The shape of an operation on two tensors, by PyTorch's rules of broadcasting.
pub(super) fn broadcast(a: &[usize], b: &[usize]) -> Result<Vec<usize>, String> {
    let n = a.len().max(b.len());
    let at = |shape: &[usize], i: usize| {
        let missing = n - shape.len();
        if i < missing { 1 } else { shape[i - missing] }
    };
    let size = |i| match (at(a, i), at(b, i)) {
        (x, y) if x == y || y == 1 => Ok(x),
        (1, y) => Ok(y),
        _ => Err(format!("shapes {a:?} and {b:?} do not broadcast")),
    };
    (0..n).map(size).collect()
}

/// Where in a tensor of shape `from` each value of its broadcast to `to` lies.
pub(super) fn broadcast_offsets(from: &[usize], to: &[usize]) -> Vec<usize> {
    let own = strides(from);
    let missing = to.len() - from.len();
    let strides: Vec<usize> = (0..to.len())
        .map(|i| match i.checked_sub(missing) {
            Some(j) if from[j] != 1 => own[j],
            _ => 0,
        })
        .collect();
    offsets(to, &strides)
}
