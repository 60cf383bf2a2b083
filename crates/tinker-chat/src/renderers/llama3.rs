//! `llama3`: `<|start_header_id|>{role}<|end_header_id|>⏎⏎{text}<|eot_id|>` after one beginning
//! token, deliberately without the dated system preamble of the model's own template.

use std::sync::Arc;

use tinker_types::Stop;

use crate::error::{Error, Result};
use crate::message::{Message, Role};
use crate::registry::RendererName;
use crate::renderer::{Family, MessageContext, RenderedMessage, Termination};
use crate::tokenizer::Tokenizer;

use super::{marker, refuse_thinking, split_at_end};

const NAME: RendererName = RendererName::Llama3;

/// The renderer of Llama 3 instruct models.
#[derive(Debug)]
pub(crate) struct Llama3 {
    tokenizer: Arc<Tokenizer>,
    begin_of_text: u32,
    start_header: u32,
    end_header: u32,
    end_of_turn: u32,
}

impl Llama3 {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>) -> Result<Self> {
        Ok(Self {
            begin_of_text: marker(&tokenizer, NAME, "<|begin_of_text|>")?,
            start_header: marker(&tokenizer, NAME, "<|start_header_id|>")?,
            end_header: marker(&tokenizer, NAME, "<|end_header_id|>")?,
            end_of_turn: marker(&tokenizer, NAME, "<|eot_id|>")?,
            tokenizer,
        })
    }
}

impl Family for Llama3 {
    fn name(&self) -> RendererName {
        NAME
    }

    fn has_extension_property(&self) -> bool {
        true
    }

    fn stop(&self) -> Stop {
        Stop::Tokens(vec![self.end_of_turn])
    }

    fn prefix(&self) -> Vec<u32> {
        vec![self.begin_of_text]
    }

    fn render_message(
        &self,
        message: &Message,
        context: MessageContext,
    ) -> Result<RenderedMessage> {
        refuse_thinking(message, context.index, NAME)?;
        let header = self.generation_header(message.role, context.index)?;
        let mut output = self.tokenizer.encode_text(&message.content)?;
        output.push(self.end_of_turn);
        Ok(RenderedMessage {
            header,
            output,
            stop_overlap: Vec::new(),
        })
    }

    fn generation_header(&self, role: Role, n_messages: usize) -> Result<Vec<u32>> {
        if role == Role::Tool {
            return Err(Error::UnsupportedRole {
                index: n_messages,
                renderer: NAME,
                role,
            });
        }
        let mut header = vec![self.start_header];
        header.extend(self.tokenizer.encode_text(role.as_str())?);
        header.push(self.end_header);
        header.extend(self.tokenizer.encode_text("\n\n")?);
        Ok(header)
    }

    fn parse_response(&self, tokens: &[u32]) -> Result<(Message, Termination)> {
        let (body, termination) = split_at_end(&self.tokenizer, tokens, self.end_of_turn);
        Ok((
            Message::assistant(self.tokenizer.decode(body)?),
            termination,
        ))
    }
}
