//! Requests of the messages endpoint, and the conversation that they describe.

use serde::Deserialize;
use serde_json::Value;
use tinker_chat::{Message, Role};

use crate::api_error::{ApiError, ApiResult};
use crate::inference::chat::{Tool, with_calls};
use crate::inference::split::ToolCall;

/// A request for a message, or for the number of tokens of its prompt.
#[derive(Debug, Deserialize)]
pub(super) struct Request {
    pub(super) model: String,
    messages: Vec<RawMessage>,
    #[serde(default)]
    system: Option<Content>,
    #[serde(default)]
    pub(super) max_tokens: Option<u32>,
    #[serde(default)]
    pub(super) temperature: Option<f64>,
    #[serde(default)]
    pub(super) top_p: Option<f64>,
    #[serde(default)]
    pub(super) top_k: Option<i64>,
    #[serde(default)]
    pub(super) stop_sequences: Vec<String>,
    #[serde(default)]
    pub(super) stream: bool,
    #[serde(default)]
    tools: Vec<RawTool>,
    #[serde(default)]
    tool_choice: Option<ToolChoice>,
}

#[derive(Debug, Deserialize)]
struct RawMessage {
    role: RawRole,
    content: Content,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawRole {
    User,
    Assistant,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "content takes a string or a list of blocks")]
enum Content {
    Text(String),
    Blocks(Vec<Block>),
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Block {
    Text {
        text: String,
    },
    Thinking {
        thinking: String,
    },
    ToolUse {
        name: String,
        #[serde(default)]
        input: Value,
    },
    ToolResult {
        #[serde(default)]
        content: Option<Box<Content>>,
    },
}

#[derive(Debug, Deserialize)]
struct RawTool {
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    input_schema: Value,
}

#[derive(Debug, Deserialize)]
struct ToolChoice {
    #[serde(rename = "type")]
    kind: String,
}

/// What a request asks to be continued.
#[derive(Debug)]
pub(super) struct Conversation {
    pub(super) messages: Vec<Message>,
    pub(super) tools: Vec<Tool>,
    /// What the reply begins with.
    pub(super) prefill: Option<String>,
}

impl Request {
    /// # Errors
    /// 400 for blocks in the wrong place and calls that cannot be forced.
    pub(super) fn into_conversation(self) -> ApiResult<Conversation> {
        let mut messages = Vec::new();
        if let Some(system) = self.system {
            messages.push(Message::system(system.into_text()?));
        }
        let last_role = self.messages.last().map(|message| message.role);
        for message in self.messages {
            message.add_to(&mut messages)?;
        }
        let is_begun = last_role == Some(RawRole::Assistant);
        let prefill = is_begun.then(|| messages.pop()).flatten();
        Ok(Conversation {
            messages,
            tools: tools(self.tools, self.tool_choice)?,
            prefill: prefill.map(|message| message.content),
        })
    }
}

fn tools(tools: Vec<RawTool>, choice: Option<ToolChoice>) -> ApiResult<Vec<Tool>> {
    match choice.as_ref().map(|choice| choice.kind.as_str()) {
        None | Some("auto") => {}
        Some("none") => return Ok(Vec::new()),
        Some(kind) => {
            return Err(ApiError::bad_request(format!(
                "tool_choice {kind:?} is not supported: this server cannot force a call, take auto or none"
            )));
        }
    }
    let tool = |tool: RawTool| Tool {
        name: tool.name,
        description: tool.description,
        parameters: tool.input_schema,
    };
    Ok(tools.into_iter().map(tool).collect())
}

impl Content {
    /// # Errors
    /// 400 if there are other blocks than text.
    fn into_text(self) -> ApiResult<String> {
        let blocks = match self {
            Self::Text(text) => return Ok(text),
            Self::Blocks(blocks) => blocks,
        };
        let text = |block| match block {
            Block::Text { text } => Ok(text),
            _ => Err(ApiError::bad_request("only text blocks can stand here")),
        };
        blocks.into_iter().map(text).collect()
    }
}

impl RawMessage {
    /// Results of tools become messages of their own, before the text beside them.
    fn add_to(self, messages: &mut Vec<Message>) -> ApiResult<()> {
        let role = match self.role {
            RawRole::User => Role::User,
            RawRole::Assistant => Role::Assistant,
        };
        let blocks = match self.content {
            Content::Text(text) => {
                messages.push(Message::new(role, text));
                return Ok(());
            }
            Content::Blocks(blocks) => blocks,
        };
        let (mut text, mut thinking, mut calls) = (String::new(), String::new(), Vec::new());
        let mut has_own = blocks.is_empty();
        for block in blocks {
            has_own |= !matches!(block, Block::ToolResult { .. });
            match block {
                Block::Text { text: more } => text.push_str(&more),
                Block::Thinking { thinking: more } => thinking.push_str(&more),
                Block::ToolUse { name, input } => calls.push(ToolCall {
                    name,
                    arguments: input,
                }),
                Block::ToolResult { content } => {
                    let result = content.map(|content| content.into_text()).transpose()?;
                    messages.push(Message::new(Role::Tool, result.unwrap_or_default()));
                }
            }
        }
        if has_own {
            let message = Message::new(role, with_calls(&text, &calls));
            messages.push(message.with_thinking(thinking));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn conversation(body: Value) -> Conversation {
        let request: Request = serde_json::from_value(body).unwrap();
        request.into_conversation().unwrap()
    }

    #[test]
    fn blocks_become_messages() {
        let all = conversation(
            json!({"model": "m", "system": [{"type": "text", "text": "s"}],
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "text", "text": "a"},
                    {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": "4"},
                    {"type": "text", "text": "and?"}]},
            ]}),
        );

        let roles: Vec<Role> = all.messages.iter().map(|m| m.role).collect();
        assert_eq!(
            roles,
            [
                Role::System,
                Role::User,
                Role::Assistant,
                Role::Tool,
                Role::User
            ]
        );
        assert!(all.messages[2].content.starts_with("a\n<tool_call>"));
        assert_eq!(all.messages[2].thinking.as_deref(), Some("hm"));
        assert_eq!((&*all.messages[3].content, all.prefill), ("4", None));
    }

    #[test]
    fn a_last_message_of_the_assistant_begins_the_reply() {
        let all = conversation(json!({"model": "m", "messages": [
            {"role": "user", "content": "hi"}, {"role": "assistant", "content": "So"}]}));

        assert_eq!(
            (all.messages.len(), all.prefill.as_deref()),
            (1, Some("So"))
        );
    }

    #[test]
    fn a_forced_call_is_refused_by_name() {
        let body = json!({"model": "m", "messages": [], "tool_choice": {"type": "any"}});
        let request: Request = serde_json::from_value(body).unwrap();

        let error = request.into_conversation().unwrap_err();

        assert!(error.message().contains("\"any\""));
    }
}
