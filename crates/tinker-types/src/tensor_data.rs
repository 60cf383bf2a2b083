//! Tensors on the wire: dense or compressed-row sparse, 32-bit floats or 64-bit integers.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::TypeError;

/// The element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 binary32.
    Float32,
    /// Two's complement, 64 bits.
    Int64,
}

/// The values of a tensor, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum TensorValues {
    /// Floats.
    Float32(Vec<f32>),
    /// Integers.
    Int64(Vec<i64>),
}

impl TensorValues {
    /// Number of values held.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Float32(values) => values.len(),
            Self::Int64(values) => values.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where the values of a sparse `[rows, cols]` tensor sit (compressed sparse rows).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparseIndex {
    /// `[rows + 1]`: the values of row `i` are `crow_indices[i]..crow_indices[i + 1]`.
    pub crow_indices: Vec<i64>,
    /// The column of each value.
    pub col_indices: Vec<i64>,
}

/// A tensor whose shape and values agree.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorData {
    values: TensorValues,
    shape: Vec<usize>,
    sparse: Option<SparseIndex>,
}

impl TensorData {
    /// A dense tensor.
    ///
    /// # Errors
    /// If the product of `shape` is not the number of values.
    pub fn dense(values: TensorValues, shape: Vec<usize>) -> Result<Self, TypeError> {
        let n_cells = checked_product(&shape)?;
        if n_cells != values.len() {
            return Err(TypeError::new(format!(
                "tensor of shape {shape:?} needs {n_cells} values, got {}",
                values.len()
            )));
        }
        Ok(Self {
            values,
            shape,
            sparse: None,
        })
    }

    /// A sparse `[rows, cols]` tensor; cells without a value are padding.
    ///
    /// # Errors
    /// If the shape is not 2-D, or row pointers or columns do not fit the shape and the values.
    pub fn sparse(
        values: TensorValues,
        shape: Vec<usize>,
        index: SparseIndex,
    ) -> Result<Self, TypeError> {
        check_sparse(values.len(), &shape, &index)?;
        Ok(Self {
            values,
            shape,
            sparse: Some(index),
        })
    }

    /// A dense vector of floats, shape `[len]`.
    #[must_use]
    pub fn floats(values: Vec<f32>) -> Self {
        Self {
            shape: vec![values.len()],
            values: TensorValues::Float32(values),
            sparse: None,
        }
    }

    /// A dense vector of integers, shape `[len]`.
    #[must_use]
    pub fn ints(values: Vec<i64>) -> Self {
        Self {
            shape: vec![values.len()],
            values: TensorValues::Int64(values),
            sparse: None,
        }
    }

    /// The element type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        match self.values {
            TensorValues::Float32(_) => DType::Float32,
            TensorValues::Int64(_) => DType::Int64,
        }
    }

    /// Row-major dimensions.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The listed values: all cells of a dense tensor, the stored ones of a sparse tensor.
    #[must_use]
    pub const fn values(&self) -> &TensorValues {
        &self.values
    }

    /// The index of a sparse tensor.
    #[must_use]
    pub const fn sparse_index(&self) -> Option<&SparseIndex> {
        self.sparse.as_ref()
    }

    /// The floats of a dense float tensor.
    #[must_use]
    pub fn as_floats(&self) -> Option<&[f32]> {
        match (&self.values, &self.sparse) {
            (TensorValues::Float32(values), None) => Some(values),
            _ => None,
        }
    }

    /// The integers of a dense integer tensor.
    #[must_use]
    pub fn as_ints(&self) -> Option<&[i64]> {
        match (&self.values, &self.sparse) {
            (TensorValues::Int64(values), None) => Some(values),
            _ => None,
        }
    }

    /// The same tensor without a sparse index; unlisted cells become 0.
    #[must_use]
    pub fn to_dense(&self) -> Self {
        let Some(index) = &self.sparse else {
            return self.clone();
        };
        let n_cols = self.shape.get(1).copied().unwrap_or(0);
        let values = match &self.values {
            TensorValues::Float32(v) => {
                TensorValues::Float32(scatter(v, index, &self.shape, n_cols))
            }
            TensorValues::Int64(v) => TensorValues::Int64(scatter(v, index, &self.shape, n_cols)),
        };
        Self {
            values,
            shape: self.shape.clone(),
            sparse: None,
        }
    }

    /// Size in bytes as the chunking rule counts it: 4 a float, 8 an integer or index.
    #[must_use]
    pub fn estimated_bytes(&self) -> usize {
        let index = self
            .sparse
            .as_ref()
            .map_or(0, |i| i.crow_indices.len() + i.col_indices.len());
        let width = match self.dtype() {
            DType::Float32 => 4,
            DType::Int64 => 8,
        };
        self.values.len() * width + index * 8
    }
}

/// Most cells of a sparse tensor: a few bytes must not ask for a dense form of gigabytes.
const MAX_SPARSE_CELLS: usize = 1 << 26;

fn checked_product(shape: &[usize]) -> Result<usize, TypeError> {
    shape
        .iter()
        .try_fold(1_usize, |product, &dim| product.checked_mul(dim))
        .ok_or_else(|| TypeError::new(format!("tensor shape {shape:?} is too large")))
}

fn check_sparse(n_values: usize, shape: &[usize], index: &SparseIndex) -> Result<(), TypeError> {
    let &[n_rows, n_cols] = shape else {
        return Err(TypeError::new(format!(
            "sparse tensor of shape {shape:?} must be 2-D"
        )));
    };
    if checked_product(shape)? > MAX_SPARSE_CELLS || n_rows == usize::MAX {
        return Err(TypeError::new(format!(
            "sparse tensor of shape {shape:?} has more than {MAX_SPARSE_CELLS} cells"
        )));
    }
    let crow = &index.crow_indices;
    let fault = |why: String| {
        Err(TypeError::new(format!(
            "sparse tensor of shape {shape:?}: {why}"
        )))
    };
    if crow.len() != n_rows + 1 {
        return fault(format!(
            "needs {} row pointers, got {}",
            n_rows + 1,
            crow.len()
        ));
    }
    if index.col_indices.len() != n_values {
        return fault(format!(
            "{} columns for {n_values} values",
            index.col_indices.len()
        ));
    }
    let ends = (
        crow.first().copied(),
        crow.last().map(|&last| usize::try_from(last)),
    );
    if ends != (Some(0), Some(Ok(n_values))) || crow.windows(2).any(|w| w[0] > w[1]) {
        return fault(format!("row pointers must rise from 0 to {n_values}"));
    }
    match index
        .col_indices
        .iter()
        .find(|&&c| usize::try_from(c).map_or(true, |c| c >= n_cols))
    {
        Some(column) => fault(format!("column {column} is outside 0..{n_cols}")),
        None => Ok(()),
    }
}

/// Writes sparse values into a zeroed dense buffer; the index was checked on construction.
fn scatter<T: Copy + Default>(
    values: &[T],
    index: &SparseIndex,
    shape: &[usize],
    n_cols: usize,
) -> Vec<T> {
    let mut dense = vec![T::default(); shape.iter().product()];
    for (row, ends) in index.crow_indices.windows(2).enumerate() {
        let (start, end) = (ends[0] as usize, ends[1] as usize);
        for (value, &column) in values[start..end]
            .iter()
            .zip(&index.col_indices[start..end])
        {
            dense[row * n_cols + column as usize] = *value;
        }
    }
    dense
}

/// The JSON form of a tensor.
#[derive(Serialize, Deserialize)]
struct Json<'a> {
    data: JsonValues<'a>,
    dtype: DType,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shape: Option<Vec<usize>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sparse_crow_indices: Option<Vec<i64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sparse_col_indices: Option<Vec<i64>>,
}

/// Numbers whose type is known only after `dtype` was read.
enum JsonValues<'a> {
    Floats(&'a [f32]),
    Ints(&'a [i64]),
    Raw(Vec<Option<f64>>),
    RawInts(Vec<i64>),
}

impl Serialize for JsonValues<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Floats(values) => values.serialize(serializer),
            Self::Ints(values) => values.serialize(serializer),
            Self::Raw(values) => values.serialize(serializer),
            Self::RawInts(values) => values.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for JsonValues<'_> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(NumbersVisitor)
    }
}

/// Reads a list of numbers as integers until the first one that is not.
struct NumbersVisitor;

#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Int(i64),
    Float(f64),
    Null(()),
}

impl<'de> serde::de::Visitor<'de> for NumbersVisitor {
    type Value = JsonValues<'static>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a flat list of numbers")
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut ints = Vec::new();
        let mut floats: Vec<Option<f64>> = Vec::new();
        while let Some(number) = seq.next_element::<Number>()? {
            match number {
                Number::Int(value) if floats.is_empty() => ints.push(value),
                other => {
                    if floats.is_empty() {
                        floats = ints.drain(..).map(|i| Some(i as f64)).collect();
                    }
                    floats.push(match other {
                        Number::Int(value) => Some(value as f64),
                        Number::Float(value) => Some(value),
                        Number::Null(()) => None,
                    });
                }
            }
        }
        Ok(if floats.is_empty() {
            JsonValues::RawInts(ints)
        } else {
            JsonValues::Raw(floats)
        })
    }
}

impl JsonValues<'_> {
    fn into_values(self, dtype: DType) -> Result<TensorValues, TypeError> {
        Ok(match (dtype, self) {
            (DType::Int64, Self::RawInts(values)) => TensorValues::Int64(values),
            (DType::Float32, Self::RawInts(values)) => {
                TensorValues::Float32(values.into_iter().map(|v| v as f32).collect())
            }
            (DType::Float32, Self::Raw(values)) => TensorValues::Float32(
                values
                    .into_iter()
                    .map(|v| v.map_or(f32::NAN, |v| v as f32))
                    .collect(),
            ),
            (DType::Int64, _) => {
                return Err(TypeError::new(
                    "int64 tensor holds a number that is not an integer",
                ));
            }
            (DType::Float32, Self::Floats(values)) => TensorValues::Float32(values.to_vec()),
            (DType::Float32, Self::Ints(values)) => {
                TensorValues::Float32(values.iter().map(|&v| v as f32).collect())
            }
        })
    }
}

impl Serialize for TensorData {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let data = match &self.values {
            TensorValues::Float32(values) => JsonValues::Floats(values),
            TensorValues::Int64(values) => JsonValues::Ints(values),
        };
        let sparse = self.sparse.as_ref();
        Json {
            data,
            dtype: self.dtype(),
            shape: Some(self.shape.clone()),
            sparse_crow_indices: sparse.map(|s| s.crow_indices.clone()),
            sparse_col_indices: sparse.map(|s| s.col_indices.clone()),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for TensorData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = Json::deserialize(deserializer)?;
        let values = json
            .data
            .into_values(json.dtype)
            .map_err(serde::de::Error::custom)?;
        let shape = json.shape.unwrap_or_else(|| vec![values.len()]);
        match (json.sparse_crow_indices, json.sparse_col_indices) {
            (None, None) => Self::dense(values, shape),
            (Some(crow_indices), Some(col_indices)) => Self::sparse(
                values,
                shape,
                SparseIndex {
                    crow_indices,
                    col_indices,
                },
            ),
            _ => Err(TypeError::new(
                "a sparse tensor needs both row pointers and columns",
            )),
        }
        .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_shape_that_disagrees_with_the_values() {
        let error = TensorData::dense(TensorValues::Int64(vec![1, 2, 3]), vec![2, 2]).unwrap_err();

        assert_eq!(
            error.to_string(),
            "tensor of shape [2, 2] needs 4 values, got 3"
        );
    }

    #[test]
    fn json_reads_integers_as_floats_when_the_dtype_says_so() {
        let tensor: TensorData =
            serde_json::from_str(r#"{"data":[1,2.5,null],"dtype":"float32"}"#).unwrap();

        let floats = tensor.as_floats().unwrap();
        assert_eq!(floats[..2], [1.0, 2.5]);
        assert!(floats[2].is_nan());
        assert_eq!(tensor.shape(), [3]);
    }

    #[test]
    fn int64_survives_json_exactly() {
        let tensor = TensorData::ints(vec![i64::MAX, i64::MIN, 0]);

        let text = serde_json::to_string(&tensor).unwrap();

        assert_eq!(serde_json::from_str::<TensorData>(&text).unwrap(), tensor);
    }

    #[test]
    fn sparse_becomes_dense() {
        let index = SparseIndex {
            crow_indices: vec![0, 1, 1, 3],
            col_indices: vec![2, 0, 1],
        };
        let tensor =
            TensorData::sparse(TensorValues::Int64(vec![7, 8, 9]), vec![3, 3], index).unwrap();

        assert_eq!(
            tensor.to_dense().as_ints().unwrap(),
            [0, 0, 7, 0, 0, 0, 8, 9, 0]
        );
    }

    #[test]
    fn sparse_index_outside_the_shape_is_refused() {
        let index = SparseIndex {
            crow_indices: vec![0, 1],
            col_indices: vec![3],
        };

        let error =
            TensorData::sparse(TensorValues::Float32(vec![1.0]), vec![1, 3], index).unwrap_err();

        assert_eq!(
            error.to_string(),
            "sparse tensor of shape [1, 3]: column 3 is outside 0..3"
        );
    }
}
