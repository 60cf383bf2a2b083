//! One file per family of chat formats, and the small helpers they share.

mod chat_template;
mod llama3;
mod qwen3;
mod role_colon;

pub(crate) use chat_template::{ChatTemplate, Template};
pub(crate) use llama3::Llama3;
pub(crate) use qwen3::{Qwen3, Thinking};
pub(crate) use role_colon::RoleColon;

use crate::error::{Error, Result};
use crate::message::Message;
use crate::registry::RendererName;
use crate::renderer::Termination;
use crate::tokenizer::Tokenizer;

/// The id of a marker that the format cannot do without.
fn marker(tokenizer: &Tokenizer, renderer: RendererName, token: &str) -> Result<u32> {
    tokenizer
        .token_id(token)
        .ok_or_else(|| Error::MissingToken {
            renderer,
            token: token.to_owned(),
        })
}

fn refuse_thinking(message: &Message, index: usize, renderer: RendererName) -> Result<()> {
    if message.thinking.is_some() {
        return Err(Error::UnsupportedThinking { index, renderer });
    }
    Ok(())
}

/// Splits a reply at its first end marker: the body before it, and how it ended.
fn split_at_end<'a>(
    tokenizer: &Tokenizer,
    tokens: &'a [u32],
    stop: u32,
) -> (&'a [u32], Termination) {
    if let Some(at) = tokens.iter().position(|&token| token == stop) {
        return (&tokens[..at], Termination::StopSequence);
    }
    split_at_eos(tokenizer, tokens)
}

/// Splits a reply at its first end-of-text token.
fn split_at_eos<'a>(tokenizer: &Tokenizer, tokens: &'a [u32]) -> (&'a [u32], Termination) {
    let eos = tokenizer.eos_token_ids();
    match tokens.iter().position(|token| eos.contains(token)) {
        Some(at) => (&tokens[..at], Termination::Eos),
        None => (tokens, Termination::Malformed),
    }
}
