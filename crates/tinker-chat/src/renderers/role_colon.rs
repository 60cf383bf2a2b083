//! `role_colon`, for base models: `User: {text}⏎⏎Assistant: {text}⏎⏎`, stopped by `⏎⏎User:`.
//!
//! A base model has no markers, so the space after the colon and the blank line belong to the
//! format, and text that contains `⏎⏎User:` cannot be told from a new turn.

use std::sync::Arc;

use tinker_types::Stop;

use crate::error::{Error, Result};
use crate::message::{Message, Role};
use crate::registry::RendererName;
use crate::renderer::{Family, MessageContext, RenderedMessage, Termination};
use crate::tokenizer::Tokenizer;

use super::{refuse_thinking, split_at_eos};

const NAME: RendererName = RendererName::RoleColon;
const END: &str = "\n\n";
const NEXT: &str = "User:";

/// The renderer of base models.
#[derive(Debug)]
pub(crate) struct RoleColon {
    tokenizer: Arc<Tokenizer>,
}

impl RoleColon {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer }
    }
}

impl Family for RoleColon {
    fn name(&self) -> RendererName {
        NAME
    }

    fn has_extension_property(&self) -> bool {
        true
    }

    fn stop(&self) -> Stop {
        Stop::Texts(vec![format!("{END}{NEXT}")])
    }

    fn prefix(&self) -> Vec<u32> {
        self.tokenizer.bos_token_id().into_iter().collect()
    }

    fn render_message(
        &self,
        message: &Message,
        context: MessageContext,
    ) -> Result<RenderedMessage> {
        refuse_thinking(message, context.index, NAME)?;
        Ok(RenderedMessage {
            header: self.generation_header(message.role, context.index)?,
            output: self
                .tokenizer
                .encode_text(&format!(" {}{END}", message.content))?,
            stop_overlap: match message.role {
                Role::Assistant => self.tokenizer.encode_text(NEXT)?,
                _ => Vec::new(),
            },
        })
    }

    fn generation_header(&self, role: Role, n_messages: usize) -> Result<Vec<u32>> {
        let header = match role {
            Role::System => "System:",
            Role::User => NEXT,
            Role::Assistant => "Assistant:",
            Role::Tool => {
                return Err(Error::UnsupportedRole {
                    index: n_messages,
                    renderer: NAME,
                    role,
                });
            }
        };
        self.tokenizer.encode_text(header)
    }

    fn parse_response(&self, tokens: &[u32]) -> Result<(Message, Termination)> {
        let (body, ended) = split_at_eos(&self.tokenizer, tokens);
        let text = self.tokenizer.decode(body)?;
        let stop = format!("{END}{NEXT}");
        let (text, termination) = match text.split_once(&stop) {
            Some((before, _)) => (before, Termination::StopSequence),
            None => (text.strip_suffix(END).unwrap_or(&text), ended),
        };
        let text = text.strip_prefix(' ').unwrap_or(text);
        Ok((Message::assistant(text), termination))
    }
}
