//! What came back from a sampler, as text and as JSON.

use serde_json::{Value, json};
use tinker_chat::Renderer;
use tinker_types::{SampleResponse, SampledSequence};

use crate::failure::Result;
use crate::output::Output;
use crate::speaker::{Speaker, without_stop};

/// The sequences drawn for one prompt.
#[derive(Debug)]
pub(super) struct Answer {
    model: String,
    prompt: Vec<Spelled>,
    pub(super) sequences: Vec<Sequence>,
}

/// One continuation with its text.
#[derive(Debug)]
pub(super) struct Sequence {
    /// What it says, without markers and stop texts.
    pub(super) text: String,
    pub(super) sampled: SampledSequence,
    tokens: Vec<Spelled>,
}

/// A token, what it spells, and its log-probability where it has one.
#[derive(Debug)]
struct Spelled {
    token: u32,
    text: String,
    logprob: Option<f32>,
}

impl Answer {
    /// Decodes `response` to a prompt of `tokens`, as a reply where there is a `renderer`.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub(super) fn read(
        speaker: &Speaker,
        renderer: Option<&dyn Renderer>,
        tokens: Vec<u32>,
        response: SampleResponse,
        stops: &[String],
    ) -> Result<Self> {
        let mut sequences = Vec::with_capacity(response.sequences.len());
        for sampled in response.sequences {
            let text = text_of(speaker, renderer, &sampled.tokens)?;
            let logprobs = sampled.logprobs.iter().flatten().map(|&p| Some(p));
            sequences.push(Sequence {
                text: without_stop(text, stops),
                tokens: spell(speaker, &sampled.tokens, logprobs)?,
                sampled,
            });
        }
        let prompt_logprobs = response.prompt_logprobs.unwrap_or_default();
        Ok(Self {
            model: speaker.label.clone(),
            prompt: spell(speaker, &tokens, prompt_logprobs.into_iter())?,
            sequences,
        })
    }

    /// The texts; with a table of log-probabilities below where they were asked for.
    ///
    /// # Errors
    /// The sequences cannot be written as JSON.
    pub(super) fn output(&self, logprobs: bool, prompt_logprobs: bool) -> Result<Output> {
        let mut text = String::new();
        if prompt_logprobs {
            text += &listing(&self.prompt);
            text += "\n";
        }
        for (i, sequence) in self.sequences.iter().enumerate() {
            if self.sequences.len() > 1 {
                text += &format!("--- {} of {} ---\n", i + 1, self.sequences.len());
            }
            text += sequence.text.trim_end_matches('\n');
            text.push('\n');
            if logprobs {
                text.push('\n');
                text += &listing(&sequence.tokens);
            }
        }
        Ok(Output::text(text, self.json(prompt_logprobs)?))
    }

    /// Tinkex's keys, with the model, the prompt's tokens and the texts beside them.
    pub(super) fn json(&self, prompt_logprobs: bool) -> Result<Value> {
        let mut sequences = Vec::with_capacity(self.sequences.len());
        for sequence in &self.sequences {
            let mut row = serde_json::to_value(&sequence.sampled)?;
            row["text"] = json!(sequence.text);
            sequences.push(row);
        }
        let tokens: Vec<u32> = self.prompt.iter().map(|t| t.token).collect();
        let of_prompt: Vec<Option<f32>> = self.prompt.iter().map(|t| t.logprob).collect();
        Ok(json!({
            "type": "sample",
            "model": self.model,
            "prompt_tokens": tokens,
            "prompt_logprobs": prompt_logprobs.then_some(of_prompt),
            "sequences": sequences,
        }))
    }
}

fn text_of(speaker: &Speaker, renderer: Option<&dyn Renderer>, tokens: &[u32]) -> Result<String> {
    let text = match renderer {
        Some(renderer) => renderer
            .parse_response(tokens)
            .map(|(message, _)| message.content),
        None => speaker.model.tokenizer.decode_without_special(tokens),
    };
    Ok(text.map_err(anyhow::Error::new)?)
}

fn spell(
    speaker: &Speaker,
    tokens: &[u32],
    logprobs: impl Iterator<Item = Option<f32>>,
) -> Result<Vec<Spelled>> {
    let mut logprobs = logprobs;
    let mut spelled = Vec::with_capacity(tokens.len());
    for &token in tokens {
        let text = speaker.model.tokenizer.decode(&[token]);
        spelled.push(Spelled {
            token,
            text: text.map_err(anyhow::Error::new)?,
            logprob: logprobs.next().flatten(),
        });
    }
    Ok(spelled)
}

/// A line per token: log-probability, id, and what it spells.
fn listing(tokens: &[Spelled]) -> String {
    let mut text = String::new();
    for token in tokens {
        let logprob = token
            .logprob
            .map_or_else(|| "-".to_owned(), |p| format!("{p:.4}"));
        text += &format!("{logprob:>9} {:>7}  {:?}\n", token.token, token.text);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_show_what_tokens_spell() {
        let tokens = [
            Spelled {
                token: 7,
                text: " a\n".to_owned(),
                logprob: Some(-0.25),
            },
            Spelled {
                token: 1023,
                text: "b".to_owned(),
                logprob: None,
            },
        ];

        assert_eq!(
            listing(&tokens),
            "  -0.2500       7  \" a\\n\"\n        -    1023  \"b\"\n"
        );
    }
}
