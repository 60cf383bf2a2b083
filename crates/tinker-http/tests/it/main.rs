//! The transport against a scripted server.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod administration;
mod calls;
mod cassettes;
mod credentials;
mod downloads;
mod futures;
mod heartbeats;
mod sharing;
mod spans;
mod start_up;
mod storage;
mod support;
mod telemetry;
