//! Supervised fine-tuning against a service in memory.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking"
)]

mod config;
mod data;
mod fake;
mod prepare;
mod resuming;
mod support;
mod training;
