//! Drives the built binary as a person does.

mod bad_input;
mod help;
mod listing;
mod sampling;
mod serving;
mod support;
mod training;
mod version;
