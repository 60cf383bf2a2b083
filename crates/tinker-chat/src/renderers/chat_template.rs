//! The chat template that a model's tokenizer brings along, in Jinja: the format of every family that has
//! no renderer of its own here, token for token as `transformers` renders it.
//!
//! What a reply's own tokens are is found by rendering twice: they are what the conversation up to the reply
//! has beyond the prompt for it. Where a template writes earlier turns anew, such as without their
//! reasoning, a conversation becomes an example per turn.

use std::sync::Arc;

use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};
use tinker_types::Stop;

use crate::error::{Error, Result};
use crate::message::{Message, Role};
use crate::registry::RendererName;
use crate::renderer::{Renderer, SupervisedExample, Termination, one_per_turn, refuse_others};
use crate::tokenizer::Tokenizer;
use crate::train_on::TrainOnWhat;

use super::split_at_end;

const NAME: RendererName = RendererName::ChatTemplate;
const TEMPLATE: &str = "chat_template";
/// Instructions that one rendering may take: a long conversation takes thousands.
const MOST_INSTRUCTIONS: u64 = 50_000_000;
/// A reply that no template writes by itself.
const PROBE: &str = "Qx7";
/// Unicode's noncharacter: keeps apart what would be a marker if a template had written it.
const APART: char = '\u{fdd0}';

/// The renderer of models that have a chat template.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    tokenizer: Arc<Tokenizer>,
    template: Template,
    special_tokens: Vec<String>,
    /// The marker after a reply.
    end: u32,
    /// What the template writes between the prompt and a reply, and between that and its end.
    around: (String, String),
    has_extension_property: bool,
}

impl ChatTemplate {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>) -> Result<Self> {
        let template = Template::of(&tokenizer)?;
        let special_tokens = tokenizer.special_tokens();
        let mut this = Self {
            tokenizer,
            template,
            special_tokens,
            end: 0,
            around: Default::default(),
            has_extension_property: false,
        };
        this.probe()?;
        Ok(this)
    }

    /// Looks at two turns to see what surrounds a reply.
    fn probe(&mut self) -> Result<()> {
        let turns = [
            Message::user("Hi"),
            Message::assistant(PROBE),
            Message::user("Bye"),
            Message::assistant(PROBE),
        ];
        let prompt = self.encode(&self.text(&turns[..1], true)?)?;
        let first = self.encode(&self.text(&turns[..2], false)?)?;
        let reply = first
            .strip_prefix(prompt.as_slice())
            .ok_or(Error::TemplatePrompt { index: 1 })?;
        let text = self.tokenizer.decode(reply)?;
        let (before, after) = text.split_once(PROBE).ok_or_else(|| {
            template_error("it leaves the text of a reply out, or writes it twice")
        })?;
        let marker = self.special_tokens.iter().filter_map(|token| {
            let at = after.find(token.as_str())?;
            Some((at, self.tokenizer.token_id(token)?))
        });
        let (at, end) = marker
            .min()
            .or_else(|| Some((after.len(), *self.tokenizer.eos_token_ids().first()?)))
            .ok_or_else(|| template_error("it ends a reply with no special token"))?;
        self.end = end;
        self.around = (before.to_owned(), after[..at].to_owned());
        let whole = self.encode(&self.text(&turns, false)?)?;
        let until_end = reply.iter().position(|&token| token == end);
        let n_first = prompt.len() + until_end.map_or(reply.len(), |at| at + 1);
        self.has_extension_property = whole.starts_with(&first[..n_first]);
        Ok(())
    }

    /// The text of a conversation, and of the beginning of a reply if one is to be `prompted`; what looks
    /// like a marker in a message is broken in two.
    fn text(&self, messages: &[Message], prompted: bool) -> Result<String> {
        let messages: Vec<Message> = messages.iter().map(|m| self.kept_apart(m)).collect();
        self.template.render(&messages, prompted)
    }

    /// The tokens of such a text.
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.contains(APART) {
            self.encode_apart(text)
        } else {
            self.tokenizer.encode(text)
        }
    }

    /// Whole conversations whose first token of a reply would swallow the end of the prompt are cut between
    /// the two, as the model sees them when it replies.
    fn encode_after(&self, prompt: &[u32], prompt_text: &str, text: &str) -> Result<Vec<u32>> {
        let reply = text.strip_prefix(prompt_text).unwrap_or_default();
        Ok([prompt, &self.encode(reply)?].concat())
    }

    /// The message with what looks like a marker broken in two.
    fn kept_apart(&self, message: &Message) -> Message {
        let break_up = |text: &str| {
            let mut text = text.to_owned();
            for token in &self.special_tokens {
                // A tokenizer may have hundreds of them, and texts hardly ever one.
                let mut chars = token.chars();
                if let Some(first) = chars.next().filter(|_| text.contains(token)) {
                    text = text.replace(token, &format!("{first}{APART}{}", chars.as_str()));
                }
            }
            text
        };
        Message {
            content: break_up(&message.content),
            thinking: message.thinking.as_deref().map(break_up),
            ..message.clone()
        }
    }

    /// Encodes markers, which are the template's, as such, and everything between them as plain text.
    fn encode_apart(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        let mut at = 0;
        // Where each is next: searched for again only behind that, so that the text is read once for each.
        let mut next: Vec<_> = self
            .special_tokens
            .iter()
            .filter(|token| !token.is_empty())
            .map(|token| (text.find(token.as_str()), token.as_str()))
            .collect();
        loop {
            let found = next.iter().filter_map(|&(position, token)| {
                // The longer of two that begin at one place.
                Some((position?, std::cmp::Reverse(token.len()), token))
            });
            let (start, marker) = match found.min() {
                Some((start, _, token)) => (start, token),
                None => (text.len(), ""),
            };
            let plain = text[at..start].replace(APART, "");
            if !plain.is_empty() {
                tokens.extend(self.tokenizer.encode_text(&plain)?);
            }
            if marker.is_empty() {
                return Ok(tokens);
            }
            tokens.extend(self.tokenizer.token_id(marker));
            at = start + marker.len();
            for (position, token) in &mut next {
                if position.is_some_and(|position| position < at) {
                    *position = text[at..].find(*token).map(|found| at + found);
                }
            }
        }
    }
}

impl Renderer for ChatTemplate {
    fn name(&self) -> RendererName {
        NAME
    }

    fn has_extension_property(&self) -> bool {
        self.has_extension_property
    }

    fn stop(&self) -> Stop {
        let mut stop = vec![self.end];
        let others = self.tokenizer.eos_token_ids().iter();
        stop.extend(others.filter(|&&token| token != self.end));
        Stop::Tokens(stop)
    }

    fn build_generation_prompt(&self, messages: &[Message], role: Role) -> Result<Vec<u32>> {
        if role != Role::Assistant {
            return Err(Error::UnsupportedRole {
                index: messages.len(),
                renderer: NAME,
                role,
            });
        }
        self.encode(&self.text(messages, true)?)
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
        refuse_others(NAME, messages, &selected, train_on)?;
        let text = self.text(messages, false)?;
        let mut tokens = self.encode(&text)?;
        let mut spans = Vec::new();
        let n_trained = selected.iter().filter(|is| **is).count();
        for index in (0..messages.len()).filter(|&index| selected[index]) {
            let prompt_text = self.text(&messages[..index], true)?;
            let prompt = self.encode(&prompt_text)?;
            if !tokens.starts_with(&prompt) {
                if n_trained > 1 || !text.starts_with(&prompt_text) {
                    return Err(Error::TemplatePrompt { index });
                }
                tokens = self.encode_after(&prompt, &prompt_text, &text)?;
            }
            let reply = &tokens[prompt.len()..];
            // No reply has the marker in it: as text it is encoded otherwise.
            let until_end = reply.iter().position(|&token| token == self.end);
            let n_reply = until_end.map_or(reply.len(), |at| at + 1);
            let until = prompt.len() + n_reply;
            if n_trained > 1 {
                // What later turns rewrite is not what the model has to learn to say.
                let as_said = self.encode(&self.text(&messages[..=index], false)?)?;
                if !as_said.starts_with(&tokens[..until]) {
                    return Err(Error::TemplatePrompt { index });
                }
            }
            spans.push(prompt.len()..until);
        }
        let mut weights = vec![0.0; tokens.len()];
        for span in spans {
            weights[span].fill(1.0);
        }
        let example = SupervisedExample { tokens, weights };
        example.check(train_on, messages.len())?;
        Ok(example)
    }

    /// Some templates write turns anew for some conversations only, such as those with a system message.
    fn build_supervised_examples(
        &self,
        messages: &[Message],
        train_on: TrainOnWhat,
    ) -> Result<Vec<SupervisedExample>> {
        match self.build_supervised_example(messages, train_on) {
            Err(Error::TemplatePrompt { .. }) if !train_on.is_single() => {
                one_per_turn(self, messages, train_on)
            }
            example => Ok(vec![example?]),
        }
    }

    fn parse_response(&self, tokens: &[u32]) -> Result<(Message, Termination)> {
        let (body, termination) = split_at_end(&self.tokenizer, tokens, self.end);
        let text = self.tokenizer.decode(body)?;
        let (before, after) = &self.around;
        let text = text.strip_prefix(before).unwrap_or(&text);
        let text = text.strip_suffix(after).unwrap_or(text);
        Ok((Message::assistant(text), termination))
    }
}

/// A compiled template with the names of the tokens that it writes.
#[derive(Debug)]
pub(crate) struct Template {
    environment: Environment<'static>,
    bos: Option<String>,
    eos: Option<String>,
}

impl Template {
    /// The template of a tokenizer.
    ///
    /// # Errors
    /// [`Error::NoTemplate`], or [`Error::Template`] if it is none in Jinja.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let source = tokenizer.chat_template().ok_or(Error::NoTemplate)?;
        let mut environment = Environment::new();
        // As `transformers` sets Jinja up.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(MOST_INSTRUCTIONS));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |reason: String| -> std::result::Result<Value, _> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason))
            },
        );
        environment
            .add_template_owned(TEMPLATE, source.to_owned())
            .map_err(|error| template_error(&error.to_string()))?;
        let spelled = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
        Ok(Self {
            environment,
            bos: spelled(tokenizer.bos_token_id()),
            eos: spelled(tokenizer.eos_token_ids().first().copied()),
        })
    }

    /// The text of a conversation, and of the beginning of a reply if one is to be `prompted`.
    ///
    /// # Errors
    /// [`Error::Template`] if the template has no place for a message, or fails.
    pub(crate) fn render(&self, messages: &[Message], prompted: bool) -> Result<String> {
        let messages: Vec<Value> = messages.iter().map(as_value).collect();
        let template = self.environment.get_template(TEMPLATE);
        let rendered = template.and_then(|template| {
            template.render(context! {
                messages,
                tools => (),
                documents => (),
                add_generation_prompt => prompted,
                bos_token => self.bos.as_deref().map_or(Value::UNDEFINED, Value::from),
                eos_token => self.eos.as_deref().map_or(Value::UNDEFINED, Value::from),
            })
        });
        rendered.map_err(|error| {
            let reason = error
                .detail()
                .map_or_else(|| error.to_string(), str::to_owned);
            template_error(&reason)
        })
    }
}

fn template_error(reason: &str) -> Error {
    Error::Template {
        reason: reason.to_owned(),
    }
}

/// A message as templates read it.
fn as_value(message: &Message) -> Value {
    let mut fields = vec![
        ("role", message.role.as_str()),
        ("content", message.content.as_str()),
    ];
    fields.extend(
        message
            .thinking
            .as_deref()
            .map(|text| ("reasoning_content", text)),
    );
    fields.into_iter().collect()
}
