//! Integration tests of the engine, on the reference models of `fixtures/numerics`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail the test that calls them"
)]

mod allocations;
mod architectures;
mod bad_input;
mod common;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda")]
mod emulated;
mod finite_differences;
mod generating;
#[cfg(feature = "cuda")]
mod gpu;
mod half;
mod invariance;
#[cfg(feature = "cuda")]
mod kernels;
mod loading;
mod losses;
mod peft;
mod pytorch;
mod quantized;
mod taking_turns;
#[cfg(feature = "cuda")]
mod wide;
