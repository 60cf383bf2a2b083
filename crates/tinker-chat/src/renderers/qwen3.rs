//! The Qwen3 family: the `ChatML` layout,`<|im_start|>{role}⏎{body}<|im_end|>` joined by line feeds.
//!
//! Hybrid models frame what they produce with `<think>⏎{reasoning}⏎</think>⏎⏎`, an empty frame if
//! they did not reason, and drop the reasoning of earlier turns; instruct models, and
//! `tinker/nano`, have no such tag.

use std::borrow::Cow;
use std::sync::Arc;

use tinker_types::Stop;

use crate::error::{Error, Result};
use crate::message::{Message, Role};
use crate::registry::RendererName;
use crate::renderer::{Family, MessageContext, RenderedMessage, Termination};
use crate::tokenizer::Tokenizer;

use super::{marker, refuse_thinking, split_at_end};

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// What a model of the family does with reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Thinking {
    /// A hybrid model that may reason before it answers.
    Enabled,
    /// A hybrid model whose prompt closes an empty frame, so that it answers at once.
    Disabled,
    /// An instruct model, which knows no frame.
    Never,
}

/// The renderer of Qwen3 models.
#[derive(Debug)]
pub(crate) struct Qwen3 {
    tokenizer: Arc<Tokenizer>,
    thinking: Thinking,
    im_start: u32,
    im_end: u32,
}

impl Qwen3 {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, thinking: Thinking) -> Result<Self> {
        let name = name_of(thinking);
        Ok(Self {
            im_start: marker(&tokenizer, name, "<|im_start|>")?,
            im_end: marker(&tokenizer, name, "<|im_end|>")?,
            tokenizer,
            thinking,
        })
    }

    /// `[⏎]<|im_start|>{role}⏎`; the line feed belongs to every message but the first.
    fn header(&self, role: &str, index: usize) -> Result<Vec<u32>> {
        let mut header = Vec::new();
        if index > 0 {
            header.extend(self.tokenizer.encode_text("\n")?);
        }
        header.push(self.im_start);
        header.extend(self.tokenizer.encode_text(&format!("{role}\n"))?);
        Ok(header)
    }

    /// The header and text of an assistant message. Hybrid models frame the text where their own
    /// template does: after the last user message, if it is the last message or reasoned.
    fn assistant<'a>(
        &self,
        message: &'a Message,
        context: MessageContext,
    ) -> Result<(Vec<u32>, Cow<'a, str>)> {
        let mut header = self.header("assistant", context.index)?;
        let (thinking, visible) = split_thinking(message);
        let follows_user = context.last_user.is_some_and(|user| context.index > user);
        let text = match self.thinking {
            Thinking::Enabled if follows_user && (context.is_last || !thinking.is_empty()) => {
                Cow::Owned(format!("{OPEN}\n{thinking}\n{CLOSE}\n\n{visible}"))
            }
            Thinking::Enabled => Cow::Borrowed(visible),
            Thinking::Disabled => {
                if !thinking.is_empty() {
                    return Err(self.unsupported_thinking(context.index));
                }
                if context.is_last && !follows_user {
                    return Err(Error::NoUserMessage {
                        renderer: self.name(),
                    });
                }
                if context.is_last {
                    // The prompt supplies the frame, so it is part of the header and never trained.
                    header.extend(self.empty_frame()?);
                }
                Cow::Borrowed(visible)
            }
            Thinking::Never => {
                refuse_thinking(message, context.index, self.name())?;
                Cow::Borrowed(&*message.content)
            }
        };
        Ok((header, text))
    }

    fn unsupported_thinking(&self, index: usize) -> Error {
        Error::UnsupportedThinking {
            index,
            renderer: self.name(),
        }
    }

    fn empty_frame(&self) -> Result<Vec<u32>> {
        self.tokenizer
            .encode_text(&format!("{OPEN}\n\n{CLOSE}\n\n"))
    }
}

impl Family for Qwen3 {
    fn name(&self) -> RendererName {
        name_of(self.thinking)
    }

    fn has_extension_property(&self) -> bool {
        self.thinking == Thinking::Never
    }

    fn stop(&self) -> Stop {
        Stop::Tokens(vec![self.im_end])
    }

    fn prefix(&self) -> Vec<u32> {
        Vec::new()
    }

    fn render_message(
        &self,
        message: &Message,
        context: MessageContext,
    ) -> Result<RenderedMessage> {
        let (header, text) = match message.role {
            Role::Assistant => self.assistant(message, context)?,
            Role::Tool => {
                let text = format!("<tool_response>\n{}\n</tool_response>", message.content);
                (self.header("user", context.index)?, Cow::Owned(text))
            }
            role => {
                refuse_thinking(message, context.index, self.name())?;
                (
                    self.header(role.as_str(), context.index)?,
                    Cow::Borrowed(&*message.content),
                )
            }
        };
        let mut output = self.tokenizer.encode_text(&text)?;
        output.push(self.im_end);
        Ok(RenderedMessage {
            header,
            output,
            stop_overlap: Vec::new(),
        })
    }

    fn generation_header(&self, role: Role, n_messages: usize) -> Result<Vec<u32>> {
        let mut header = self.header(role.as_str(), n_messages)?;
        if self.thinking == Thinking::Disabled && role == Role::Assistant {
            header.extend(self.empty_frame()?);
        }
        Ok(header)
    }

    fn parse_response(&self, tokens: &[u32]) -> Result<(Message, Termination)> {
        let (body, termination) = split_at_end(&self.tokenizer, tokens, self.im_end);
        let text = self.tokenizer.decode(body)?;
        if self.thinking != Thinking::Enabled || !text.starts_with(OPEN) {
            return Ok((Message::assistant(text), termination));
        }
        if !text.contains(CLOSE) {
            return Ok((Message::assistant(text), Termination::Malformed));
        }
        let (thinking, visible) = split_frame(&text);
        Ok((
            Message::assistant(visible).with_thinking(thinking),
            termination,
        ))
    }
}

fn name_of(thinking: Thinking) -> RendererName {
    match thinking {
        Thinking::Enabled => RendererName::Qwen3,
        Thinking::Disabled => RendererName::Qwen3DisableThinking,
        Thinking::Never => RendererName::Qwen3Instruct,
    }
}

/// The reasoning and the visible text, whether data keep them apart or inline in one frame.
fn split_thinking(message: &Message) -> (&str, &str) {
    match &message.thinking {
        Some(thinking) => (thinking, &message.content),
        None => split_frame(&message.content),
    }
}

/// Takes a leading frame off `text`; a text without one is all visible.
fn split_frame(text: &str) -> (&str, &str) {
    let Some((thinking, visible)) = text
        .strip_prefix(OPEN)
        .and_then(|rest| rest.split_once(CLOSE))
    else {
        return ("", text);
    };
    let thinking = thinking.strip_prefix('\n').unwrap_or(thinking);
    let thinking = thinking.strip_suffix('\n').unwrap_or(thinking);
    (thinking, visible.strip_prefix("\n\n").unwrap_or(visible))
}
