//! One message of a conversation, as found in chat data files.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Instructions that hold for the whole conversation.
    System,
    /// The person, or the program, that asks.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The role's lower-case name, as chat formats write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One message: a role and its text.
///
/// Reads the common chat row: `content` is a string or a list of `text` and `thinking` parts, whose
/// texts are joined without a separator. Unknown keys are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "RawMessage")]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The visible text.
    pub content: String,
    /// The model's reasoning before the visible text; never empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thinking: Option<String>,
    /// Whether `customized` trains this message; every other mode refuses the flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trainable: Option<bool>,
}

impl Message {
    /// A message of `role` saying `content`.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            thinking: None,
            trainable: None,
        }
    }

    /// A system message.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new(Role::System, content)
    }

    /// A user message.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new(Role::User, content)
    }

    /// An assistant message.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(Role::Assistant, content)
    }

    /// The same message with reasoning before its text; an empty `thinking` is none.
    pub fn with_thinking(mut self, thinking: impl Into<String>) -> Self {
        self.thinking = Some(thinking.into()).filter(|text| !text.is_empty());
        self
    }

    /// The same message with its `trainable` flag set.
    pub fn with_trainable(mut self, trainable: bool) -> Self {
        self.trainable = Some(trainable);
        self
    }
}

#[derive(Deserialize)]
struct RawMessage {
    role: Role,
    content: Content,
    #[serde(default)]
    thinking: Option<String>,
    #[serde(default)]
    trainable: Option<bool>,
}

/// `content` as data files write it.
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Part {
    Text { text: String },
    Thinking { thinking: String },
}

/// Written by hand so that the error says what is wrong, which an untagged enum does not.
impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`content` as a string or a list of text parts")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_string<E: serde::de::Error>(self, text: String) -> Result<Content, E> {
                Ok(Content::Text(text))
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(
                self,
                mut parts: A,
            ) -> Result<Content, A::Error> {
                let mut all = Vec::new();
                while let Some(part) = parts.next_element()? {
                    all.push(part);
                }
                Ok(Content::Parts(all))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl From<RawMessage> for Message {
    fn from(raw: RawMessage) -> Self {
        let mut thinking = raw.thinking.unwrap_or_default();
        let content = match raw.content {
            Content::Text(text) => text,
            Content::Parts(parts) => {
                let mut content = String::new();
                for part in parts {
                    match part {
                        Part::Text { text } => content.push_str(&text),
                        Part::Thinking { thinking: text } => thinking.push_str(&text),
                    }
                }
                content
            }
        };
        let message = Self {
            role: raw.role,
            content,
            thinking: None,
            trainable: raw.trainable,
        };
        message.with_thinking(thinking)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_plain_text_and_ignores_unknown_keys() {
        let row = r#"{"role":"user","content":"hi","name":"Ada","weight":3}"#;

        let message: Message = serde_json::from_str(row).unwrap();

        assert_eq!(message, Message::user("hi"));
    }

    #[test]
    fn reads_text_and_thinking_parts() {
        let row = r#"{"role":"assistant","trainable":true,"content":[
            {"type":"thinking","thinking":"hm"},{"type":"text","text":"a"},{"type":"text","text":"b"}]}"#;

        let message: Message = serde_json::from_str(row).unwrap();

        let expected = Message::assistant("ab")
            .with_thinking("hm")
            .with_trainable(true);
        assert_eq!(message, expected);
    }

    #[test]
    fn says_what_is_wrong_with_a_bad_message() {
        let check = |row: &str, needle: &str| {
            let error = serde_json::from_str::<Message>(row)
                .unwrap_err()
                .to_string();
            assert!(error.contains(needle), "{error}");
        };

        check(
            r#"{"role":"bot","content":""}"#,
            "unknown variant `bot`, expected one of `system`",
        );
        check(
            r#"{"role":"user","content":7}"#,
            "expected `content` as a string",
        );
        check(r#"{"role":"user"}"#, "missing field `content`");
        check(
            r#"{"role":"user","content":[{"type":"image"}]}"#,
            "unknown variant `image`",
        );
    }
}
