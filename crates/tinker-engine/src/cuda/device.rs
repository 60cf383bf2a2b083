//! What the GPU backend asks of a device: memory, kernels by name, products of matrices.
//!
//! This is the seam for other devices of the kind, and for an emulation to test on. Calls take effect in
//! their order; memory is named by addresses on the device.

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};

/// The source of all kernels, in CUDA C. `HEAD` is to be defined as the widest head there is room for,
/// one of [`HEADS`].
pub const SOURCE: &str = concat!(
    include_str!("kernels/common.cu"),
    include_str!("kernels/elementwise.cu"),
    include_str!("kernels/matmul.cu"),
    include_str!("kernels/attention.cu"),
    include_str!("kernels/head.cu"),
    include_str!("kernels/optimizer.cu"),
);

/// The names of the kernels.
pub const KERNELS: [&str; 27] = [
    "adamw",
    "add",
    "add_bias",
    "attention_backward_kv",
    "attention_backward_q",
    "attention_dots",
    "attention_join",
    "attention_narrow",
    "attention_wide",
    "embed_bf16",
    "embed_f32",
    "geglu",
    "geglu_backward",
    "head_gradient",
    "head_scores",
    "place_rows",
    "product_wide_bf16",
    "product_wide_f32",
    "products_narrow",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "softcap",
    "split",
    "sum_of_squares",
    "swiglu",
    "swiglu_backward",
];

/// The widths of heads that kernels are made for.
pub const HEADS: [usize; 3] = [64, 128, 256];

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// An address on the device, or 0.
    Address(u64),
    /// `unsigned`.
    U32(u32),
    /// `unsigned long long`.
    U64(u64),
    /// `float`.
    F32(f32),
}

impl Arg {
    /// Where its value lies, for a call that reads it there.
    #[must_use]
    pub fn pointer(&self) -> *mut c_void {
        let pointer: *const c_void = match self {
            Self::Address(value) | Self::U64(value) => (value as *const u64).cast(),
            Self::U32(value) => (value as *const u32).cast(),
            Self::F32(value) => (value as *const f32).cast(),
        };
        pointer.cast_mut()
    }
}

/// One launch of a kernel.
#[derive(Debug)]
pub struct Launch<'a> {
    /// One of [`KERNELS`].
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// In the order of the kernel's parameters.
    pub args: &'a [Arg],
}

/// The numbers of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    /// 32 bits.
    F32,
    /// bf16, 16 bits.
    Bf16,
}

impl Number {
    /// Bytes of one.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// A factor of a product, row by row in memory.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    /// Where it begins.
    pub address: u64,
    /// Distance of rows, in numbers.
    pub stride: usize,
    /// Whether the factor is its transpose.
    pub turned: bool,
}

/// `C = scale * A B`, or `C += scale * A B`; `A [m, k]`, `B [k, n]`, `C [m, n]` of `f32`.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    /// Rows of `C`.
    pub m: usize,
    /// Columns of `C`.
    pub n: usize,
    /// The inner dimension.
    pub k: usize,
    /// Left factor.
    pub a: Matrix,
    /// Right factor.
    pub b: Matrix,
    /// Of both factors; sums are in `f32`.
    pub numbers: Number,
    /// Where `C` begins.
    pub c: u64,
    /// Distance of rows of `C`.
    pub c_stride: usize,
    /// Factor on the product.
    pub scale: f32,
    /// Whether to add to `C`.
    pub adds: bool,
}

/// A GPU, or what stands in for one.
///
/// The same calls give the same bits. An error leaves the device as usable as it can be.
///
/// # Safety
/// Memory that [`Device::allocate`] returns is not handed out again before it is released.
#[expect(unsafe_code, reason = "addresses on the device are not checked")]
pub unsafe trait Device: fmt::Debug + Send + Sync {
    /// Its name, such as `NVIDIA H100`.
    fn name(&self) -> &str;

    /// Bytes of memory that can still be taken.
    ///
    /// # Errors
    /// If the device does not answer.
    fn free_memory(&self) -> Result<usize>;

    /// Takes memory; what it holds is not defined.
    ///
    /// # Errors
    /// If there is not enough.
    fn allocate(&self, bytes: usize) -> Result<u64>;

    /// Gives memory back.
    ///
    /// # Safety
    /// It was taken, with so many bytes, and nothing uses it any more.
    unsafe fn release(&self, address: u64, bytes: usize);

    /// Copies from the host.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Safety
    /// The memory was taken and is large enough.
    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<()>;

    /// Copies to the host, once everything before it is done.
    ///
    /// # Errors
    /// If the device fails, now or in one of the calls before.
    ///
    /// # Safety
    /// The memory was taken and is large enough.
    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()>;

    /// Copies within the device, between ranges that do not overlap.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Safety
    /// As [`Device::upload`], of both.
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;

    /// Sets bytes to 0.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Safety
    /// As [`Device::upload`].
    unsafe fn clear(&self, address: u64, bytes: usize) -> Result<()>;

    /// Launches a kernel.
    ///
    /// # Errors
    /// If it cannot be launched.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and what they make it touch was taken.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Multiplies matrices, to bits that depend on sizes and values alone.
    ///
    /// # Errors
    /// If it cannot be launched.
    ///
    /// # Safety
    /// Matrices lie in memory that was taken, and `C` overlaps no factor.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<()>;
}

/// The kernels of one size of heads, on some device.
pub type Open = dyn Fn(usize) -> Result<Arc<dyn Device>>;

/// The smallest of [`HEADS`] that has room.
pub(super) fn kernels_for(head_dim: usize) -> Option<usize> {
    HEADS.into_iter().find(|width| *width >= head_dim)
}

/// An error of the device itself.
#[must_use]
pub fn fault(message: String) -> Error {
    Error::Device(message)
}
