//! What can go wrong between messages and tokens; every message names the thing and the value.

use std::path::PathBuf;

use crate::message::Role;
use crate::registry::RendererName;
use crate::train_on::TrainOnWhat;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure to load a tokenizer, to render a conversation or to parse a name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tokenizer file could not be read.
    #[error("cannot read `{}`", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A tokenizer file does not hold what its name promises.
    #[error("`{file}` is not a usable tokenizer file: {reason}")]
    BadTokenizer {
        /// File name.
        file: String,
        /// What the parser said.
        reason: String,
    },
    /// The tokenizer refused a text or a token id.
    #[error("the tokenizer failed: {0}")]
    Tokenize(String),
    /// The renderer's markers are not in the tokenizer's vocabulary.
    #[error(
        "renderer `{renderer}` needs the token `{token}`, which this tokenizer does not have; \
         choose the renderer that belongs to the model"
    )]
    MissingToken {
        /// The renderer.
        renderer: RendererName,
        /// The marker.
        token: String,
    },
    /// No renderer has this name.
    #[error("unknown renderer `{name}`; known: {known}")]
    UnknownRenderer {
        /// What was asked for.
        name: String,
        /// Known names, separated by commas.
        known: String,
    },
    /// No mode has this name.
    #[error("unknown train_on_what `{name}`; known: {known}")]
    UnknownTrainOn {
        /// What was asked for.
        name: String,
        /// Known names, separated by commas.
        known: String,
    },
    /// A conversation without messages.
    #[error("the conversation has no messages")]
    NoMessages,
    /// The format has no place for this role.
    #[error("message {index}: renderer `{renderer}` has no role `{role}`")]
    UnsupportedRole {
        /// Position in the conversation, from 0.
        index: usize,
        /// The renderer.
        renderer: RendererName,
        /// The role.
        role: Role,
    },
    /// The format has no place for reasoning.
    #[error(
        "message {index}: renderer `{renderer}` cannot carry thinking; remove it or use `qwen3`"
    )]
    UnsupportedThinking {
        /// Position in the conversation, from 0.
        index: usize,
        /// The renderer.
        renderer: RendererName,
    },
    /// The renderer answers a user, and there is none.
    #[error("renderer `{renderer}` needs a user message before the assistant's")]
    NoUserMessage {
        /// The renderer.
        renderer: RendererName,
    },
    /// `customized` reads a flag that is missing.
    #[error(
        "message {index}: train_on_what `customized` needs a `trainable` flag on every message"
    )]
    TrainableMissing {
        /// Position in the conversation, from 0.
        index: usize,
    },
    /// A flag that the mode would ignore.
    #[error(
        "message {index} has a `trainable` flag, which train_on_what `{mode}` does not read; \
         use `customized` or remove the flag"
    )]
    TrainableUnused {
        /// Position in the conversation, from 0.
        index: usize,
        /// The mode asked for.
        mode: TrainOnWhat,
    },
    /// A mode that trains text which differs between the turns of this renderer.
    #[error(
        "renderer `{renderer}` rewrites earlier turns, so train_on_what `{mode}` cannot train text \
         that the assistant did not write; use `all_assistant_messages` or an instruct renderer"
    )]
    ModeNeedsExtension {
        /// The renderer.
        renderer: RendererName,
        /// The mode asked for.
        mode: TrainOnWhat,
    },
    /// The tokenizer came without a chat template.
    #[error(
        "this tokenizer has no chat template; choose another renderer, or put one into chat_template.jinja beside it"
    )]
    NoTemplate,
    /// The chat template cannot be read, or refuses the conversation.
    #[error("the model's chat template: {reason}")]
    Template {
        /// What it, or its parser, said.
        reason: String,
    },
    /// The chat template writes a reply otherwise than its prompt begins it.
    #[error(
        "message {index}: the model's chat template writes this reply otherwise than the prompt before it \
         promises, so it cannot be trained; choose a renderer by name"
    )]
    TemplatePrompt {
        /// Position in the conversation, from 0.
        index: usize,
    },
    /// Every weight would be zero.
    #[error(
        "no token is trained: train_on_what `{mode}` selects none of the {n_messages} messages"
    )]
    NothingToTrain {
        /// The mode asked for.
        mode: TrainOnWhat,
        /// Number of messages.
        n_messages: usize,
    },
}
