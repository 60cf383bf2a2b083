//! The Anthropic-compatible endpoints: messages and the counting of their tokens.

mod request;
mod stream;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tinker_types::StopReason;

use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Body, blocking, parse_json};
use crate::inference::reply::{Reply, Turn};
use crate::inference::split::Part;
use crate::inference::{Ask, Drawing, chat};
use request::{Conversation, Request};

/// A refusal in the form of this API.
#[derive(Debug)]
pub(crate) struct AnthropicError(ApiError);

impl From<ApiError> for AnthropicError {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl AnthropicError {
    fn body(&self) -> Value {
        let kind = match self.0.status().as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        };
        json!({"type": "error", "error": {"type": kind, "message": self.0.message()}})
    }
}

impl IntoResponse for AnthropicError {
    fn into_response(self) -> Response {
        self.0.log();
        (self.0.status(), Json(self.body())).into_response()
    }
}

pub(crate) async fn messages(
    State(app): State<Arc<App>>,
    body: Body,
) -> Result<Response, AnthropicError> {
    let request: Request = parse_json(&body.bytes)?;
    let is_stream = request.stream;
    let shared = Arc::clone(&app);
    let job = blocking(&app, move |_| begin(&shared, request)).await?;
    if is_stream {
        return job.answer_with_stream().await;
    }
    Ok(Json(job.collect().await?).into_response())
}

pub(crate) async fn count_tokens(
    State(app): State<Arc<App>>,
    body: Body,
) -> Result<Json<Value>, AnthropicError> {
    let request: Request = parse_json(&body.bytes)?;
    let n = blocking(&app, move |app| Ok(prompt_of(app, request)?.tokens.len())).await?;
    Ok(Json(json!({"input_tokens": n})))
}

/// What a request comes down to.
struct Rendered {
    model: crate::inference::Model,
    tokens: Vec<u32>,
    stops: Vec<String>,
    with_tools: bool,
}

fn prompt_of(app: &App, request: Request) -> ApiResult<Rendered> {
    let model = app.inference_model(&request.model)?;
    let renderer = model.renderer()?;
    let asked = request.stop_sequences.clone();
    let Conversation {
        messages,
        tools,
        prefill,
    } = request.into_conversation()?;
    let stops = chat::stops(&model.tokenizer, Some(renderer.as_ref()), asked)?;
    let tokens = chat::prompt(
        renderer.as_ref(),
        &model.tokenizer,
        messages,
        &tools,
        prefill.as_deref(),
    )?;
    Ok(Rendered {
        tokens,
        stops,
        with_tools: !tools.is_empty(),
        model,
    })
}

/// A request that is being drawn.
struct Job {
    id: String,
    model: String,
    drawing: Drawing,
    reply: Reply,
    n_prompt_tokens: usize,
    /// The stops of the request, which answers name; the others are the chat format's.
    asked_stops: Vec<String>,
}

fn begin(app: &Arc<App>, request: Request) -> ApiResult<Job> {
    let Some(max_tokens) = request.max_tokens else {
        return Err(ApiError::bad_request("max_tokens is missing"));
    };
    let (temperature, top_p) = (request.temperature, request.top_p);
    let top_k = request.top_k.unwrap_or(-1);
    let asked_stops = request.stop_sequences.clone();
    let rendered = prompt_of(app, request)?;
    let n_prompt_tokens = rendered.tokens.len();
    let ask = Ask {
        prompt: rendered.tokens,
        n: 1,
        max_tokens: Some(max_tokens),
        temperature: temperature.unwrap_or(1.0),
        top_p: top_p.unwrap_or(1.0),
        top_k,
        seed: None,
        stops: rendered.stops.clone(),
        n_top: 0,
    };
    let drawing = app.draw(&rendered.model, ask)?;
    let stops = rendered.stops.into();
    let mut replies = Reply::several(&rendered.model, stops, rendered.with_tools, 1);
    let reply = replies.pop();
    Ok(Job {
        id: new_id("msg"),
        model: rendered.model.name,
        drawing,
        reply: reply.ok_or_else(|| ApiError::internal("no reply", "no reply was made"))?,
        n_prompt_tokens,
        asked_stops,
    })
}

fn new_id(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::new_v4().simple())
}

/// How a message ended, and by which of the request's stops.
fn stop_reason(turn: &Turn, asked: &[String]) -> (&'static str, Option<String>) {
    let named = turn.stop.clone().filter(|stop| asked.contains(stop));
    let reason = match turn {
        Turn { n_calls: 1.., .. } => "tool_use",
        Turn {
            reason: StopReason::Length,
            ..
        } => "max_tokens",
        _ if named.is_some() => "stop_sequence",
        _ => "end_turn",
    };
    (reason, named)
}

/// An empty block that a part begins.
fn empty_block(part: &Part) -> Value {
    match part {
        Part::Text(_) => json!({"type": "text", "text": ""}),
        Part::Thinking(_) => json!({"type": "thinking", "thinking": "", "signature": ""}),
        Part::Tool(call) => {
            json!({"type": "tool_use", "id": new_id("toolu"), "name": call.name, "input": {}})
        }
    }
}

/// Adds a part to the blocks so far; text joins the block before it.
fn add(blocks: &mut Vec<Value>, part: Part) {
    let kind = |block: Option<&mut Value>| block.map(|b| b["type"].clone());
    let joins = match &part {
        Part::Text(_) => kind(blocks.last_mut()) == Some(json!("text")),
        Part::Thinking(_) => kind(blocks.last_mut()) == Some(json!("thinking")),
        Part::Tool(_) => false,
    };
    if !joins {
        blocks.push(empty_block(&part));
    }
    let Some(block) = blocks.last_mut() else {
        return;
    };
    let append = |value: &mut Value, more: &str| {
        *value = format!("{}{more}", value.as_str().unwrap_or_default()).into();
    };
    match part {
        Part::Text(text) => append(&mut block["text"], &text),
        Part::Thinking(text) => append(&mut block["thinking"], &text),
        Part::Tool(call) => block["input"] = call.arguments,
    }
}

impl Job {
    async fn collect(mut self) -> ApiResult<Value> {
        let mut blocks = Vec::new();
        while let Some(new) = self.drawing.next().await {
            let parts = self.reply.push(&new.tokens)?;
            parts.into_iter().for_each(|part| add(&mut blocks, part));
        }
        let turn = self.finish(&mut blocks).await?;
        let (reason, stop) = stop_reason(&turn, &self.asked_stops);
        let mut message = self.message(turn.n_tokens);
        message["content"] = blocks.into();
        message["stop_reason"] = reason.into();
        message["stop_sequence"] = stop.into();
        Ok(message)
    }

    async fn finish(&mut self, blocks: &mut Vec<Value>) -> ApiResult<Turn> {
        let (parts, turn) = self.ended().await?;
        parts.into_iter().for_each(|part| add(blocks, part));
        Ok(turn)
    }

    /// The rest of the reply.
    async fn ended(&mut self) -> ApiResult<(Vec<Part>, Turn)> {
        let reasons = self.drawing.end().await?;
        let reason = reasons.into_iter().next().unwrap_or(StopReason::Length);
        self.reply.finish(reason)
    }

    /// The message without its content.
    fn message(&self, n_tokens: usize) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model,
            "content": [], "stop_reason": null, "stop_sequence": null,
            "usage": {"input_tokens": self.n_prompt_tokens, "output_tokens": n_tokens},
        })
    }
}
