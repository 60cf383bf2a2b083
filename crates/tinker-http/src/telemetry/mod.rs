//! Telemetry: what goes wrong in a client, reported to the service in the official client's format
//! if the program asks for it.
//!
//! Reports say which call failed, how, and after how many attempts. They hold no data, prompt or
//! result, and every text in them is cleaned of the secrets that the client knows and of what looks
//! like one. They never disturb a call: what cannot be sent is dropped.

mod queue;
mod report;

pub(crate) use report::Telemetry;
