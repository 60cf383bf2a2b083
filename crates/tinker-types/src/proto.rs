//! The protobuf bodies of forward-backward and of sampling results.
//!
//! Package `tinker_public`, proto3. Arrays travel as raw little-endian bytes, so decoding is a copy.
//! The messages are written by hand; [`convert`](self) turns them into the types of this crate.

mod convert;
mod messages;

pub use messages::*;
