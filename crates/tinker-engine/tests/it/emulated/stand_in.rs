//! Libraries that stand in for NVIDIA's driver and cuBLAS in this process: whoever looks for these by name
//! finds them, as libraries that are loaded are known by the names that they give themselves.

use std::sync::LazyLock;

use libloading::{Library, Symbol};
use tinker_engine::cuda::device::{KERNELS, SOURCE};

use super::{build, with_entries};

/// Width of heads that the stand-in has kernels for.
pub(crate) const HEAD: usize = 64;

/// The stand-ins, once they are loaded.
#[derive(Debug)]
pub(crate) struct StandIn {
    driver: Library,
    _blas: Library,
}

impl StandIn {
    /// Loads them, if that was not done.
    pub(crate) fn get() -> &'static Self {
        static LOADED: LazyLock<StandIn> = LazyLock::new(|| StandIn {
            driver: build(
                &format!(
                    "{}\n{}",
                    with_entries(SOURCE, &KERNELS),
                    include_str!("driver.h")
                ),
                &[&format!("-DHEAD={HEAD}"), "-Wl,-soname,libcuda.so"],
            ),
            _blas: build(include_str!("blas.cpp"), &["-Wl,-soname,libcublas.so"]),
        });
        &LOADED
    }

    /// Allocations and contexts that nobody has given back.
    pub(crate) fn left(&self) -> i32 {
        // SAFETY: the function has this signature.
        unsafe {
            let left: Symbol<'_, unsafe extern "C" fn() -> i32> =
                self.driver.get(b"stand_in_left").unwrap();
            left()
        }
    }
}
