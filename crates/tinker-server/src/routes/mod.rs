//! Handlers, one file per group of endpoints.

pub(crate) mod service;
