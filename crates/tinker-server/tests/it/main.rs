//! Integration tests of the server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail the test that calls them"
)]

mod bad_input;
mod checkpoints;
mod disk_faults;
mod durability;
mod fake;
mod harness;
mod lifecycle;
mod passing_faults;
mod real_engine;
mod recovery;
mod sampling;
mod sessions;
mod training;
