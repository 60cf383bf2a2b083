//! The agreement that client and server must both keep, as tests.
//!
//! [`mock`] is a scripted double of the service for tests of the client and [`skyrl`] one that speaks
//! as SkyRL's server; [`faults`] is a wire that breaks before any server; [`target`] starts our own
//! server, in this process or in one that can be killed; [`chaos`] breaks and kills all of them at
//! once; [`kills`] kills the server under load; [`soak`] loads it for hours; [`crowd`] is thousands of
//! samplers at once; [`fuzz`] mutates requests; [`suite`] is what every server must do for our client; [`python`] runs the
//! official SDK against a server.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "this crate is test support, and tests fail by panicking"
)]

pub mod cases;
pub mod chaos;
pub mod crowd;
pub mod endpoints;
pub mod faults;
pub mod fuzz;
pub mod kills;
pub mod mock;
mod process;
pub mod python;
pub mod skyrl;
pub mod soak;
pub mod suite;
pub mod target;
