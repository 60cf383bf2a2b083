//! The transport against a scripted server.

mod calls;
mod futures;
mod start_up;
mod support;
