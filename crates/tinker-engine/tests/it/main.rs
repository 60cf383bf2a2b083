//! Integration tests of the engine, on the reference models of `fixtures/numerics`.

mod bad_input;
mod common;
mod finite_differences;
mod generating;
mod invariance;
mod loading;
mod pytorch;
