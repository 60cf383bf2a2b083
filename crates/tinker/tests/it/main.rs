//! Drives the built binary as a person does.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking"
)]

mod bad_input;
mod help;
mod listing;
mod sampling;
mod serving;
mod support;
mod training;
mod version;
