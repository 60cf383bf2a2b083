//! Messages to tokens and back: chat messages, tokenizers, renderers, and which tokens are trained.
//!
//! Everything here is pure apart from reading a tokenizer's files. A [`Renderer`] turns a
//! conversation into the prompt to sample from or into a training example with one weight per
//! token, and turns sampled tokens back into a message. [`renderer()`] finds one by name and
//! [`RendererName::recommended`] by model.

mod error;
mod message;
mod recommend;
mod registry;
mod renderer;
mod renderers;
mod stop;
mod stream;
mod tokenizer;
mod train_on;

pub use error::{Error, Result};
pub use message::{Message, Role};
pub use registry::{RendererName, renderer};
pub use renderer::{Renderer, SupervisedExample, Termination};
pub use stop::StopMatcher;
pub use stream::DecodeStream;
pub use tokenizer::{Tokenizer, TokenizerFiles};
pub use train_on::TrainOnWhat;
