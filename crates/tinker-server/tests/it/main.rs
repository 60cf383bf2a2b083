//! Integration tests of the server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail the test that calls them"
)]

mod admin;
mod backup;
mod bad_input;
mod checkpoints;
mod completions;
mod connections;
mod disk_faults;
mod durability;
mod expiry;
mod fake;
mod gaps;
mod gone;
mod harness;
mod inference;
mod keys;
mod lifecycle;
mod losses;
mod many_adapters;
mod memory;
mod passing_faults;
mod prompt_scores;
mod quota;
mod real_engine;
mod recovery;
mod sampling;
mod search;
mod sessions;
mod sharing;
mod tls;
mod training;
mod uploads;
mod watching;
