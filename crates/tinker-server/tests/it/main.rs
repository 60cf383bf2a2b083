//! Integration tests of the server.

mod bad_input;
mod checkpoints;
mod disk_faults;
mod durability;
mod fake;
mod harness;
mod lifecycle;
mod sessions;
mod training;
