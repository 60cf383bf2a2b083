//! Text completions: prompts as they are, without a chat format.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tinker_chat::Tokenizer;
use tinker_types::StopReason;

use super::{Common, OpenAiError, Usage, created, done, event, failed, new_id, refuse_any};
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Body, blocking, parse_json};
use crate::inference::text::TextReader;
use crate::inference::{Ask, Drawing, Model, chat};
use crate::watchers::{DrawnToken, NewTokens};

/// Tokens that are drawn unless asked for otherwise, as OpenAI has it.
const DEFAULT_MAX_TOKENS: u32 = 16;
/// Most prompts of one request.
const MAX_PROMPTS: usize = 128;

#[derive(Debug, Deserialize)]
struct Request {
    #[serde(flatten)]
    common: Common,
    prompt: Prompt,
    #[serde(default)]
    max_tokens: Option<u32>,
    /// Most likely tokens to return for each one.
    #[serde(default)]
    logprobs: Option<u32>,
    #[serde(default)]
    echo: bool,
    #[serde(default)]
    best_of: Option<u32>,
    #[serde(default)]
    suffix: Option<String>,
}

/// One prompt or several, as text or tokens.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "prompt takes a string, a list of strings, a list of token ids, or a list of such lists"
)]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    ManyTokens(Vec<Vec<u32>>),
}

impl Prompt {
    fn into_tokens(self, tokenizer: &Tokenizer) -> ApiResult<Vec<Vec<u32>>> {
        let encode = |text: String| {
            let tokens = tokenizer.encode_with_template(&text);
            tokens.map_err(|e| ApiError::bad_request(format!("prompt: {e}")))
        };
        match self {
            Self::Text(text) => Ok(vec![encode(text)?]),
            Self::Texts(texts) => texts.into_iter().map(encode).collect(),
            Self::Tokens(tokens) => Ok(vec![tokens]),
            Self::ManyTokens(all) => Ok(all),
        }
    }
}

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    body: Body,
) -> Result<Response, OpenAiError> {
    let request: Request = parse_json(&body.bytes)?;
    let shared = Arc::clone(&app);
    let job = blocking(&app, move |_| begin(&shared, request)).await?;
    if job.stream {
        return job.stream().await;
    }
    Ok(Json(job.collect().await?).into_response())
}

/// A request that is being drawn.
struct Job {
    id: String,
    created: i64,
    model: Model,
    drawings: Vec<Drawing>,
    n: usize,
    n_prompt_tokens: usize,
    stops: Arc<[String]>,
    with_logprobs: bool,
    stream: bool,
    include_usage: bool,
}

fn begin(app: &Arc<App>, request: Request) -> ApiResult<Job> {
    let common = request.common;
    common.check()?;
    refuse_any(&[
        ("echo", request.echo),
        (
            "suffix",
            request.suffix.is_some_and(|text| !text.is_empty()),
        ),
        ("best_of", request.best_of.is_some_and(|n| n != common.n)),
    ])?;
    let include_usage = common.include_usage();
    let model = app.inference_model(&common.model)?;
    let prompts = request.prompt.into_tokens(&model.tokenizer)?;
    check_prompts(&prompts, common.stream)?;
    let asked = common
        .stop
        .map(super::OneOrMany::into_vec)
        .unwrap_or_default();
    let stops = chat::stops(&model.tokenizer, None, asked)?;
    let n_prompt_tokens = prompts.iter().map(Vec::len).sum();
    let draw = |prompt| {
        let ask = Ask {
            prompt,
            n: common.n,
            max_tokens: Some(request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS)),
            temperature: common.temperature.unwrap_or(1.0),
            top_p: common.top_p.unwrap_or(1.0),
            top_k: common.top_k.unwrap_or(-1),
            seed: common.seed,
            stops: stops.clone(),
            n_top: request.logprobs.unwrap_or(0),
        };
        app.draw(&model, ask)
    };
    let drawings = prompts.into_iter().map(draw).collect::<ApiResult<_>>()?;
    Ok(Job {
        id: new_id("cmpl"),
        created: created(),
        model,
        drawings,
        n: common.n as usize,
        n_prompt_tokens,
        stops: stops.into(),
        with_logprobs: request.logprobs.is_some(),
        stream: common.stream,
        include_usage,
    })
}

fn check_prompts(prompts: &[Vec<u32>], stream: bool) -> ApiResult<()> {
    let n = prompts.len();
    if n == 0 || n > MAX_PROMPTS {
        return Err(ApiError::bad_request(format!(
            "prompt has {n} entries: send 1 to {MAX_PROMPTS}"
        )));
    }
    if stream && n > 1 {
        return Err(ApiError::bad_request(
            "a stream takes one prompt: send a request for each",
        ));
    }
    Ok(())
}

/// One choice as it grows.
struct Choice {
    reader: TextReader,
    logprobs: Logprobs,
    n_tokens: usize,
}

/// The table of log-probabilities, a row for each token.
#[derive(Default)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Map<String, Value>>,
    text_offset: Vec<usize>,
    /// Characters so far.
    offset: usize,
}

impl Logprobs {
    fn push(&mut self, tokenizer: &Tokenizer, token: &DrawnToken) {
        let text = |id: u32| tokenizer.decode(&[id]).unwrap_or_default();
        let spelled = text(token.id);
        self.text_offset.push(self.offset);
        self.offset += spelled.chars().count();
        self.tokens.push(spelled);
        self.token_logprobs.push(token.logprob);
        let top = token.top.iter();
        self.top_logprobs.push(
            top.map(|(id, logprob)| (text(*id), json!(logprob)))
                .collect(),
        );
    }

    /// The rows so far, leaving none.
    fn take(&mut self) -> Value {
        let offset = self.offset;
        let rows = std::mem::take(self);
        self.offset = offset;
        json!({
            "tokens": rows.tokens, "token_logprobs": rows.token_logprobs,
            "top_logprobs": rows.top_logprobs, "text_offset": rows.text_offset,
        })
    }
}

fn finish_reason(reason: &StopReason) -> &'static str {
    match reason {
        StopReason::Length => "length",
        _ => "stop",
    }
}

impl Job {
    fn choices(&self) -> Vec<Choice> {
        let choice = || Choice {
            reader: TextReader::new(Arc::clone(&self.model.tokenizer), Arc::clone(&self.stops)),
            logprobs: Logprobs::default(),
            n_tokens: 0,
        };
        std::iter::repeat_with(choice).take(self.n).collect()
    }

    /// Adds tokens to their choice; the text that this shows.
    fn add(&self, choices: &mut [Choice], new: &NewTokens) -> ApiResult<String> {
        let Some(choice) = choices.get_mut(new.sample) else {
            return Ok(String::new());
        };
        let mut text = String::new();
        for token in &new.tokens {
            text.push_str(&choice.reader.push(token.id).map_err(undecodable)?);
            choice.n_tokens += 1;
            if self.with_logprobs {
                choice.logprobs.push(&self.model.tokenizer, token);
            }
        }
        Ok(text)
    }

    fn logprobs_of(&self, choice: &mut Choice) -> Value {
        if self.with_logprobs {
            choice.logprobs.take()
        } else {
            Value::Null
        }
    }

    async fn collect(mut self) -> ApiResult<Value> {
        let (mut rows, mut n_drawn) = (Vec::new(), 0);
        for (p, mut drawing) in std::mem::take(&mut self.drawings).into_iter().enumerate() {
            let mut choices = self.choices();
            let mut texts = vec![String::new(); self.n];
            while let Some(new) = drawing.next().await {
                let text = self.add(&mut choices, &new)?;
                texts[new.sample].push_str(&text);
            }
            let reasons = drawing.end().await?;
            for (i, (choice, reason)) in choices.iter_mut().zip(reasons).enumerate() {
                texts[i].push_str(&choice.reader.finish().map_err(undecodable)?);
                n_drawn += choice.n_tokens;
                rows.push(json!({
                    "index": p * self.n + i, "text": texts[i],
                    "logprobs": self.logprobs_of(choice), "finish_reason": finish_reason(&reason),
                }));
            }
        }
        let usage = Usage::new(self.n_prompt_tokens, n_drawn);
        Ok(json!({
            "id": self.id, "object": "text_completion", "created": self.created,
            "model": self.model.name, "choices": rows, "usage": usage,
        }))
    }

    /// Answers with a stream once something was drawn: what is wrong before that has its status.
    async fn stream(mut self) -> Result<Response, OpenAiError> {
        let drawing = self.drawings.pop();
        let mut drawing = drawing.ok_or_else(|| ApiError::bad_request("prompt is empty"))?;
        let first = drawing.next().await;
        if first.is_none()
            && let Err(error) = drawing.end().await
        {
            return Err(error.into());
        }
        let (to, events) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            if let Err(error) = self.send(drawing, first, &to).await {
                let _ = to.send(failed(error));
            }
        });
        Ok(Sse::new(into_stream(events)).into_response())
    }

    async fn send(
        self,
        mut drawing: Drawing,
        first: Option<NewTokens>,
        to: &Sender,
    ) -> ApiResult<()> {
        let mut choices = self.choices();
        let mut next = first;
        while let Some(new) = next {
            let text = self.add(&mut choices, &new)?;
            let choice = &mut choices[new.sample];
            if !text.is_empty() || self.with_logprobs {
                let logprobs = self.logprobs_of(choice);
                let chunk = self.chunk(new.sample, &text, &logprobs, None);
                if to.send(event(&chunk)).is_err() {
                    // Nobody reads; dropping the drawing cancels it.
                    return Ok(());
                }
            }
            next = drawing.next().await;
        }
        let reasons = drawing.end().await?;
        for (i, (choice, reason)) in choices.iter_mut().zip(reasons).enumerate() {
            let rest = choice.reader.finish().map_err(undecodable)?;
            let chunk = self.chunk(i, &rest, &Value::Null, Some(finish_reason(&reason)));
            let _ = to.send(event(&chunk));
        }
        if self.include_usage {
            let n_drawn = choices.iter().map(|c| c.n_tokens).sum();
            let mut chunk = self.empty_chunk();
            chunk["usage"] = json!(Usage::new(self.n_prompt_tokens, n_drawn));
            let _ = to.send(event(&chunk));
        }
        let _ = to.send(done());
        Ok(())
    }

    fn chunk(&self, index: usize, text: &str, logprobs: &Value, reason: Option<&str>) -> Value {
        let mut chunk = self.empty_chunk();
        chunk["choices"] = json!([{
            "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason,
        }]);
        chunk
    }

    fn empty_chunk(&self) -> Value {
        json!({
            "id": self.id, "object": "text_completion", "created": self.created,
            "model": self.model.name, "choices": [],
        })
    }
}

fn undecodable(error: tinker_chat::Error) -> ApiError {
    ApiError::internal("the tokens cannot be decoded", error.to_string())
}

/// Where the events of a stream go.
pub(super) type Sender = tokio::sync::mpsc::UnboundedSender<Result<Event, Infallible>>;

/// The events of a channel as a stream.
pub(super) fn into_stream(
    events: tokio::sync::mpsc::UnboundedReceiver<Result<Event, Infallible>>,
) -> impl Stream<Item = Result<Event, Infallible>> {
    futures_util::stream::unfold(events, async |mut events| {
        let event = events.recv().await?;
        Some((event, events))
    })
}
