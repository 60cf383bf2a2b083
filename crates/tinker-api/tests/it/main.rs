//! The clients against a scripted server.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail by panicking"
)]

mod blocking;
mod custom_loss;
mod ledger;
mod many_samples;
mod parity;
mod public_api;
mod recovery;
mod reference;
mod reports;
mod rest;
mod sampling;
mod service;
mod support;
mod training;
