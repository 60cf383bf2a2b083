//! Tensors, dense and sparse.

use super::messages as pb;
use super::numbers::{Result, dims, pack, pack_values, unpack, unpack_values};
use crate::{SparseIndex, TensorData, TypeError};

/// Reads a tensor; `what` names it in errors.
///
/// # Errors
/// If the bytes, dtype and shape disagree.
pub(super) fn tensor_from_proto(what: &str, tensor: &pb::Tensor) -> Result<TensorData> {
    let named = |error: TypeError| TypeError::new(format!("{what}: {error}"));
    let shape = dims(what, &tensor.shape)?;
    match &tensor.layout {
        Some(pb::tensor::Layout::SparseCsr(csr)) => {
            let values = unpack_values(what, tensor.dtype, &csr.values)?;
            let index = SparseIndex {
                crow_indices: unpack(what, &csr.crow_indices)?,
                col_indices: unpack(what, &csr.col_indices)?,
            };
            TensorData::sparse(values, shape, index).map_err(named)
        }
        Some(pb::tensor::Layout::Dense(bytes)) => dense(what, tensor.dtype, bytes, shape),
        // An empty bytes field of a oneof may be left out by other encoders.
        None => dense(what, tensor.dtype, &[], shape),
    }
}

fn dense(what: &str, dtype: i32, bytes: &[u8], shape: Vec<usize>) -> Result<TensorData> {
    let values = unpack_values(what, dtype, bytes)?;
    let shape = if shape.is_empty() {
        vec![values.len()]
    } else {
        shape
    };
    TensorData::dense(values, shape).map_err(|error| TypeError::new(format!("{what}: {error}")))
}

pub(super) fn tensor_to_proto(tensor: &TensorData) -> pb::Tensor {
    let (bytes, dtype) = pack_values(tensor.values());
    let layout = match tensor.sparse_index() {
        None => pb::tensor::Layout::Dense(bytes),
        Some(index) => pb::tensor::Layout::SparseCsr(pb::SparseCsr {
            values: bytes,
            crow_indices: pack(&index.crow_indices),
            col_indices: pack(&index.col_indices),
        }),
    };
    let shape = tensor.shape().iter().map(|&dim| dim as i64).collect();
    pb::Tensor {
        layout: Some(layout),
        dtype: dtype.into(),
        shape,
    }
}
