//! Arrays of numbers as raw little-endian bytes.

use bytes::Bytes;

use super::messages as pb;
use crate::{TensorValues, TypeError};

/// Most entries that a bare count, with no data behind it, may ask to be allocated.
pub(super) const MAX_EMPTY_ROWS: usize = 1 << 20;

pub(super) type Result<T> = std::result::Result<T, TypeError>;

/// A number with a fixed little-endian form.
pub(super) trait LittleEndian: Copy {
    const WIDTH: usize;
    fn read(bytes: &[u8]) -> Self;
    /// Fills `WIDTH` bytes.
    fn write(self, bytes: &mut [u8]);
}

macro_rules! little_endian {
    ($($type:ty),+) => {$(
        impl LittleEndian for $type {
            const WIDTH: usize = size_of::<Self>();

            fn read(bytes: &[u8]) -> Self {
                let mut word = [0; size_of::<Self>()];
                word.copy_from_slice(bytes);
                Self::from_le_bytes(word)
            }

            fn write(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
        }
    )+};
}

little_endian!(f32, i32, i64, u16, u32);

pub(super) fn pack<T: LittleEndian>(values: &[T]) -> Bytes {
    // Pieces of known length are copied many at once.
    let mut bytes = vec![0; values.len() * T::WIDTH];
    for (value, piece) in values.iter().zip(bytes.chunks_exact_mut(T::WIDTH)) {
        value.write(piece);
    }
    bytes.into()
}

pub(super) fn unpack<T: LittleEndian>(what: &str, bytes: &[u8]) -> Result<Vec<T>> {
    if !bytes.len().is_multiple_of(T::WIDTH) {
        return Err(TypeError::new(format!(
            "{what}: {} bytes are not a whole number of {}-byte values",
            bytes.len(),
            T::WIDTH
        )));
    }
    Ok(bytes.chunks_exact(T::WIDTH).map(T::read).collect())
}

pub(super) fn unpack_tokens(what: &str, bytes: &[u8]) -> Result<Vec<u32>> {
    let tokens: Vec<i32> = unpack(what, bytes)?;
    tokens
        .into_iter()
        .map(|token| {
            u32::try_from(token)
                .map_err(|_| TypeError::new(format!("{what}: token {token} is negative")))
        })
        .collect()
}

pub(super) fn unpack_values(what: &str, dtype: i32, bytes: &[u8]) -> Result<TensorValues> {
    Ok(match pb::DType::try_from(dtype) {
        Ok(pb::DType::Float32) => TensorValues::Float32(unpack(what, bytes)?),
        Ok(pb::DType::Int64) => TensorValues::Int64(unpack(what, bytes)?),
        Ok(pb::DType::Int32) => TensorValues::Int64(
            unpack::<i32>(what, bytes)?
                .into_iter()
                .map(i64::from)
                .collect(),
        ),
        Ok(pb::DType::Bfloat16) => TensorValues::Float32(
            unpack::<u16>(what, bytes)?
                .into_iter()
                .map(|half| f32::from_bits(u32::from(half) << 16))
                .collect(),
        ),
        Ok(pb::DType::Unspecified) | Err(_) => {
            return Err(TypeError::new(format!(
                "{what}: tensor has unknown dtype {dtype}"
            )));
        }
    })
}

pub(super) fn pack_values(values: &TensorValues) -> (Bytes, pb::DType) {
    match values {
        TensorValues::Float32(values) => (pack(values), pb::DType::Float32),
        TensorValues::Int64(values) => (pack(values), pb::DType::Int64),
    }
}

pub(super) fn dims(what: &str, shape: &[i64]) -> Result<Vec<usize>> {
    shape
        .iter()
        .map(|&dim| {
            usize::try_from(dim).map_err(|_| {
                TypeError::new(format!("{what}: shape {shape:?} has a negative dimension"))
            })
        })
        .collect()
}
