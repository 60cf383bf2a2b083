//! The CPU backend.
#![expect(unsafe_code, reason = "vector instructions and memory shared between workers")]

mod buffer;
mod gemm;
mod simd;
mod tile;

use std::path::Path;

use crate::backend::Backend;
use crate::error::{Error, Result};

/// Loads a model directory onto the CPU.
pub(crate) fn load(dir: &Path, _threads: usize) -> Result<Box<dyn Backend>> {
    Err(Error::Model {
        path: dir.to_path_buf(),
        message: "the cpu backend cannot load models in this build".into(),
    })
}
