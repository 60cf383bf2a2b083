//! The frame every renderer shares: prompts, training examples and their weights are assembled
//! here from the rendered messages of a family.

use std::fmt::Debug;

use tinker_types::Stop;

use crate::error::{Error, Result};
use crate::message::{Message, Role};
use crate::registry::RendererName;
use crate::train_on::TrainOnWhat;

/// How a sampled message ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Termination {
    /// With the renderer's stop sequence.
    StopSequence,
    /// With the model's end-of-text token instead.
    Eos,
    /// With neither, or with a block left open.
    Malformed,
}

/// A rendered conversation with its loss weights.
#[derive(Debug, Clone, PartialEq)]
pub struct SupervisedExample {
    /// Token ids, `[tokens]`.
    pub tokens: Vec<u32>,
    /// Loss weight of each token as a target, `[tokens]`, 0 or 1.
    pub weights: Vec<f32>,
}

impl SupervisedExample {
    /// Number of tokens with a weight above zero.
    pub fn n_trained(&self) -> usize {
        self.weights.iter().filter(|&&weight| weight > 0.0).count()
    }

    /// Whether anything is trained.
    ///
    /// # Errors
    /// [`Error::NothingToTrain`].
    pub(crate) fn check(&self, mode: TrainOnWhat, n_messages: usize) -> Result<()> {
        if self.n_trained() == 0 {
            return Err(Error::NothingToTrain { mode, n_messages });
        }
        Ok(())
    }

    fn push(&mut self, tokens: &[u32], is_trained: bool) {
        self.tokens.extend_from_slice(tokens);
        let weight = if is_trained { 1.0 } else { 0.0 };
        self.weights.resize(self.tokens.len(), weight);
    }
}

/// Where a message stands in its conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MessageContext {
    /// Position, from 0.
    pub(crate) index: usize,
    /// Whether no message follows; in a prompt one always does.
    pub(crate) is_last: bool,
    /// Position of the last user message.
    pub(crate) last_user: Option<usize>,
}

/// One message as tokens, in the parts that weights distinguish.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RenderedMessage {
    /// Role framing, which the generation prompt supplies.
    pub(crate) header: Vec<u32>,
    /// The body with its end marker, which the speaker produces.
    pub(crate) output: Vec<u32>,
    /// The start of the next message where it completes the stop string; only after the last.
    pub(crate) stop_overlap: Vec<u32>,
}

/// The chat format of a model family.
pub trait Renderer: Debug + Send + Sync {
    /// The name it is registered under.
    fn name(&self) -> RendererName;

    /// Whether a later prompt always starts with the earlier prompt and reply, token for token.
    ///
    /// If not, a conversation with several trained turns becomes several examples.
    fn has_extension_property(&self) -> bool;

    /// What ends a reply; hand it to the sampler.
    fn stop(&self) -> Stop;

    /// The prompt that makes the model continue `messages` as `role`.
    ///
    /// # Errors
    /// The format has no place for a message or the role, or the tokenizer fails.
    fn build_generation_prompt(&self, messages: &[Message], role: Role) -> Result<Vec<u32>>;

    /// Renders the whole conversation once, with weights by `train_on`.
    ///
    /// # Errors
    /// As [`Self::build_generation_prompt`] and [`TrainOnWhat::select`]; [`Error::NothingToTrain`] if no
    /// message is selected.
    fn build_supervised_example(
        &self,
        messages: &[Message],
        train_on: TrainOnWhat,
    ) -> Result<SupervisedExample>;

    /// Turns sampled tokens into a message; text that cannot be parsed is kept as it is.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    fn parse_response(&self, tokens: &[u32]) -> Result<(Message, Termination)>;

    /// The examples that train everything `train_on` selects, each rendered as the model will see
    /// it: one for the conversation, or one per trained turn without the extension property.
    ///
    /// # Errors
    /// As [`Self::build_supervised_example`]; [`Error::ModeNeedsExtension`] if such a renderer is
    /// asked to train text that the assistant did not write.
    fn build_supervised_examples(
        &self,
        messages: &[Message],
        train_on: TrainOnWhat,
    ) -> Result<Vec<SupervisedExample>> {
        if self.has_extension_property() || train_on.is_single() || messages.is_empty() {
            return Ok(vec![self.build_supervised_example(messages, train_on)?]);
        }
        one_per_turn(self, messages, train_on)
    }
}

/// An example for each turn that `train_on` selects something of.
///
/// # Errors
/// As [`Renderer::build_supervised_examples`].
pub(crate) fn one_per_turn<R: Renderer + ?Sized>(
    renderer: &R,
    messages: &[Message],
    train_on: TrainOnWhat,
) -> Result<Vec<SupervisedExample>> {
    let selected = train_on.select(messages)?;
    refuse_others(renderer.name(), messages, &selected, train_on)?;
    let mut examples = Vec::new();
    for turn in trained_turns(messages, &selected) {
        examples.push(renderer.build_supervised_example(&turn, TrainOnWhat::Customized)?);
    }
    if examples.is_empty() {
        return Err(Error::NothingToTrain {
            mode: train_on,
            n_messages: messages.len(),
        });
    }
    Ok(examples)
}

/// A chat format that renders each message by itself.
pub(crate) trait Family: Debug + Send + Sync {
    /// As [`Renderer::name`].
    fn name(&self) -> RendererName;

    /// As [`Renderer::has_extension_property`].
    fn has_extension_property(&self) -> bool;

    /// As [`Renderer::stop`].
    fn stop(&self) -> Stop;

    /// Tokens before the first message.
    fn prefix(&self) -> Vec<u32>;

    /// The message at `context.index`.
    ///
    /// # Errors
    /// The format has no place for the message, or the tokenizer fails.
    fn render_message(&self, message: &Message, context: MessageContext)
    -> Result<RenderedMessage>;

    /// The framing that makes the model speak as `role` after the messages so far.
    ///
    /// # Errors
    /// The format has no such role, or the tokenizer fails.
    fn generation_header(&self, role: Role, n_messages: usize) -> Result<Vec<u32>>;

    /// As [`Renderer::parse_response`].
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    fn parse_response(&self, tokens: &[u32]) -> Result<(Message, Termination)>;
}

impl<F: Family> Renderer for F {
    fn name(&self) -> RendererName {
        Family::name(self)
    }

    fn has_extension_property(&self) -> bool {
        Family::has_extension_property(self)
    }

    fn stop(&self) -> Stop {
        Family::stop(self)
    }

    fn parse_response(&self, tokens: &[u32]) -> Result<(Message, Termination)> {
        Family::parse_response(self, tokens)
    }

    fn build_generation_prompt(&self, messages: &[Message], role: Role) -> Result<Vec<u32>> {
        let mut tokens = self.prefix();
        for (index, message) in messages.iter().enumerate() {
            let context = MessageContext {
                is_last: false,
                ..context_of(messages, index)
            };
            let rendered = self.render_message(message, context)?;
            tokens.extend(rendered.header);
            tokens.extend(rendered.output);
        }
        tokens.extend(self.generation_header(role, messages.len())?);
        Ok(tokens)
    }

    fn build_supervised_example(
        &self,
        messages: &[Message],
        train_on: TrainOnWhat,
    ) -> Result<SupervisedExample> {
        if messages.is_empty() {
            return Err(Error::NoMessages);
        }
        let selected = train_on.select(messages)?;
        let mut example = SupervisedExample {
            tokens: Vec::new(),
            weights: Vec::new(),
        };
        example.push(&self.prefix(), false);
        for (index, (message, &is_trained)) in messages.iter().zip(&selected).enumerate() {
            let context = context_of(messages, index);
            let rendered = self.render_message(message, context)?;
            example.push(&rendered.header, train_on.trains_headers());
            example.push(&rendered.output, is_trained);
            if context.is_last {
                example.push(&rendered.stop_overlap, is_trained);
            }
        }
        example.check(train_on, messages.len())?;
        Ok(example)
    }
}

/// Refuses a mode that trains what the assistant did not write.
///
/// # Errors
/// [`Error::ModeNeedsExtension`].
pub(crate) fn refuse_others(
    renderer: RendererName,
    messages: &[Message],
    selected: &[bool],
    mode: TrainOnWhat,
) -> Result<()> {
    let trains_others = messages
        .iter()
        .zip(selected)
        .any(|(message, &is_trained)| is_trained && message.role != Role::Assistant);
    if trains_others || mode.trains_headers() {
        return Err(Error::ModeNeedsExtension { renderer, mode });
    }
    Ok(())
}

fn context_of(messages: &[Message], index: usize) -> MessageContext {
    MessageContext {
        index,
        is_last: index + 1 == messages.len(),
        last_user: messages
            .iter()
            .rposition(|message| message.role == Role::User),
    }
}

/// The conversation up to the end of each turn that has trained messages, with `trainable` set on
/// those of that turn alone. A turn ends before a user message.
fn trained_turns(messages: &[Message], selected: &[bool]) -> Vec<Vec<Message>> {
    let starts_turn = |index: usize| messages.get(index).is_none_or(|m| m.role == Role::User);
    let mut turns = Vec::new();
    let mut start = 0;
    for end in (1..=messages.len()).filter(|&index| starts_turn(index)) {
        if selected[start..end].contains(&true) {
            let flagged = messages[..end].iter().zip(selected).enumerate();
            let turn = flagged.map(|(index, (message, &is_trained))| {
                message.clone().with_trainable(is_trained && index >= start)
            });
            turns.push(turn.collect());
        }
        start = end;
    }
    turns
}
