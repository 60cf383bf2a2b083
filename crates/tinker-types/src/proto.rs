//! The protobuf bodies of forward-backward and of sampling results.
//!
//! Package `tinker_public`, proto3. Arrays travel as raw little-endian bytes, so decoding is a copy.
//! The messages are written by hand; `From` and `TryFrom` turn them into the types of this crate and
//! back, one file per group of messages.

mod datum;
mod messages;
mod numbers;
mod sampling;
mod tensors;
mod training;

pub use messages::*;
pub use training::encode_forward_backward;
