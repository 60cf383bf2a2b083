//! Integration tests of the engine, on the two reference models of `fixtures/numerics`.

mod bad_input;
mod common;
mod finite_differences;
mod invariance;
mod pytorch;
