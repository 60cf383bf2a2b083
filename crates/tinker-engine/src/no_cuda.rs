//! What there is of the GPU in a build without it.

use std::path::Path;

use crate::backend::Backend;
use crate::error::{Error, Result};

/// Whether a GPU answers: here never, and the error says how to build a program that asks.
///
/// # Errors
/// Always.
pub fn cuda_is_available() -> Result<()> {
    Err(absent())
}

fn absent() -> Error {
    Error::Device(
        "this program was built without support for GPUs: build it with \
         `cargo build --release --features cuda`"
            .into(),
    )
}

/// Whether the GPU computes the architecture of a model directory; see [`cuda_is_available`].
///
/// # Errors
/// Always.
pub fn cuda_takes(_dir: &Path) -> Result<()> {
    Err(absent())
}

/// Loads a model onto a GPU; see [`cuda_is_available`].
///
/// # Errors
/// Always.
pub fn load_cuda(_dir: &Path, _training_memory: Option<usize>) -> Result<Box<dyn Backend>> {
    Err(absent())
}
