//! Drives the built binary as a person does.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking"
)]

mod bad_input;
mod chatting;
mod connecting;
mod disk_full;
mod double;
mod help;
mod interrupting;
mod listing;
mod outages;
mod sampling;
mod serving;
mod support;
mod training;
mod version;
