//! Renderers and tokenizers over a small byte-level vocabulary (`fixtures/chat/bytes`).

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod nano;
mod properties;
mod recommend;
mod renderers;
mod stop;
mod support;
mod tokenizer;
