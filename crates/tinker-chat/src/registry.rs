//! The renderers by name.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::renderer::Renderer;
use crate::renderers::{ChatTemplate, Llama3, Qwen3, RoleColon, Thinking};
use crate::tokenizer::Tokenizer;

/// Name of a chat format, spelled as the Tinker cookbook spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RendererName {
    /// `User: …` and `Assistant: …` lines; for base models.
    RoleColon,
    /// Llama 3 instruct models.
    Llama3,
    /// Qwen3 hybrid models, thinking.
    Qwen3,
    /// Qwen3 hybrid models, not thinking.
    Qwen3DisableThinking,
    /// Qwen3 instruct models, which never think, and `tinker/nano`.
    Qwen3Instruct,
    /// The chat template that came with the tokenizer, of any model.
    ChatTemplate,
}

impl RendererName {
    /// Every known renderer.
    pub const ALL: [Self; 6] = [
        Self::RoleColon,
        Self::Llama3,
        Self::Qwen3,
        Self::Qwen3DisableThinking,
        Self::Qwen3Instruct,
        Self::ChatTemplate,
    ];

    /// The name in configuration files and flags.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RoleColon => "role_colon",
            Self::Llama3 => "llama3",
            Self::Qwen3 => "qwen3",
            Self::Qwen3DisableThinking => "qwen3_disable_thinking",
            Self::Qwen3Instruct => "qwen3_instruct",
            Self::ChatTemplate => "chat_template",
        }
    }
}

impl fmt::Display for RendererName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for RendererName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|known| known.as_str() == name)
            .ok_or_else(|| {
                let known = Self::ALL.map(Self::as_str).join(", ");
                Error::UnknownRenderer {
                    name: name.to_owned(),
                    known,
                }
            })
    }
}

/// The renderer `name` over `tokenizer`.
///
/// # Errors
/// [`Error::MissingToken`] if the tokenizer lacks one of the format's markers, [`Error::NoTemplate`] or
/// [`Error::Template`] if it has no chat template that can be used.
pub fn renderer(name: RendererName, tokenizer: Arc<Tokenizer>) -> Result<Arc<dyn Renderer>> {
    Ok(match name {
        RendererName::RoleColon => Arc::new(RoleColon::new(tokenizer)),
        RendererName::Llama3 => Arc::new(Llama3::new(tokenizer)?),
        RendererName::Qwen3 => Arc::new(Qwen3::new(tokenizer, Thinking::Enabled)?),
        RendererName::Qwen3DisableThinking => Arc::new(Qwen3::new(tokenizer, Thinking::Disabled)?),
        RendererName::Qwen3Instruct => Arc::new(Qwen3::new(tokenizer, Thinking::Never)?),
        RendererName::ChatTemplate => Arc::new(ChatTemplate::new(tokenizer)?),
    })
}
