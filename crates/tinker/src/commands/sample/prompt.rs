//! Where a prompt comes from, and how it becomes tokens.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Deserialize;
use tinker_chat::{Message, Renderer, Role};

use crate::base_model::BaseModel;
use crate::failure::{Failure, Result};

/// The flags that give a prompt; exactly one of the first three.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(super) struct Flags {
    /// The prompt
    #[arg(short, long, value_name = "TEXT", required_unless_present_any = ["prompt_file", "tokens_file"])]
    pub(super) prompt: Option<String>,
    /// File with the prompt; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub(super) prompt_file: Option<PathBuf>,
    /// File with the prompt's token ids, as [7, 8] or {"tokens": [7, 8]}; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_file"])]
    tokens_file: Option<PathBuf>,
    /// Instructions that stand before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["raw", "tokens_file"])]
    system: Option<String>,
    /// Continue the prompt as it is, without the chat format
    #[arg(long)]
    raw: bool,
}

/// A prompt that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Prompt {
    /// Messages to reply to.
    Chat(Vec<Message>),
    /// Text to continue.
    Raw(String),
    /// Tokens to continue.
    Tokens(Vec<u32>),
}

impl Flags {
    /// Reads the prompt.
    ///
    /// # Errors
    /// A file cannot be read, or does not hold token ids.
    pub(super) fn read(&self) -> Result<Prompt> {
        if let Some(path) = &self.tokens_file {
            return parse_tokens(path, &read_text(path)?).map(Prompt::Tokens);
        }
        let text = match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) => read_text(path)?,
            (None, None) => return Err(Failure::usage("there is no prompt")),
        };
        if self.raw {
            return Ok(Prompt::Raw(text));
        }
        let system = self.system.iter().map(Message::system);
        Ok(Prompt::Chat(system.chain([Message::user(text)]).collect()))
    }
}

impl Prompt {
    /// Whether the chat format is applied.
    pub(super) const fn is_chat(&self) -> bool {
        matches!(self, Self::Chat(_))
    }

    /// The tokens to continue.
    ///
    /// # Errors
    /// The chat format or the tokenizer refuses the text, there are none, or one is out of range.
    pub(super) fn tokens(
        &self,
        model: &BaseModel,
        renderer: Option<&dyn Renderer>,
    ) -> Result<Vec<u32>> {
        let tokens = match (self, renderer) {
            (Self::Chat(messages), Some(renderer)) => renderer
                .build_generation_prompt(messages, Role::Assistant)
                .map_err(anyhow::Error::new)?,
            (Self::Chat(_), None) => return Err(Failure::usage("a chat prompt needs a renderer")),
            (Self::Raw(text), _) => model
                .tokenizer
                .encode_with_template(text)
                .map_err(anyhow::Error::new)?,
            (Self::Tokens(tokens), _) => tokens.clone(),
        };
        if tokens.is_empty() {
            return Err(Failure::usage("the prompt is empty")
                .hint("give it at least one token; with a chat format it has some"));
        }
        Ok(tokens)
    }
}

fn read_text(path: &Path) -> Result<String> {
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("cannot read standard input")?;
        return Ok(text);
    }
    std::fs::read_to_string(path).map_err(|error| {
        Failure::usage(format!(
            "cannot read prompt file {}: {error}",
            path.display()
        ))
    })
}

/// Token ids as a bare list or as the `tokens` of an object.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokensFile {
    Bare(Vec<u32>),
    Named { tokens: Vec<u32> },
}

fn parse_tokens(path: &Path, text: &str) -> Result<Vec<u32>> {
    match serde_json::from_str(text) {
        Ok(TokensFile::Bare(tokens) | TokensFile::Named { tokens }) => Ok(tokens),
        Err(_) => Err(
            Failure::usage(format!("{} does not hold token ids", path.display()))
                .hint("write [7, 8] or {\"tokens\": [7, 8]}, each a whole number of at least 0"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<u32>> {
        parse_tokens(Path::new("t.json"), text)
    }

    #[test]
    fn token_files_are_a_list_or_an_object() {
        assert_eq!(parse("[7, 8]").unwrap(), [7, 8]);
        assert_eq!(parse(r#"{"tokens": [9]}"#).unwrap(), [9]);
    }

    #[test]
    fn other_token_files_are_bad_input() {
        for bad in ["", "[-1]", "[1.5]", "\"7\"", "{\"ids\": [1]}"] {
            let failure = parse(bad).unwrap_err().to_string();
            assert!(
                failure.contains("t.json does not hold token ids"),
                "{failure}"
            );
        }
    }
}
