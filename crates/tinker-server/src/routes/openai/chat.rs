//! Chat completions: requests and whole answers.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use tinker_chat::{Message, Role, Tokenizer};
use tinker_types::StopReason;

use super::{Common, OpenAiError, Usage, created, new_id, refuse_any};
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Body, blocking, parse_json};
use crate::inference::chat::{Tool, prompt, stops, with_calls};
use crate::inference::reply::{Reply, Turn};
use crate::inference::split::{Part, ToolCall};
use crate::inference::{Ask, Drawing, Model};
use crate::watchers::DrawnToken;

#[derive(Debug, Deserialize)]
struct Request {
    #[serde(flatten)]
    common: Common,
    messages: Vec<RawMessage>,
    #[serde(default)]
    max_tokens: Option<u32>,
    #[serde(default)]
    max_completion_tokens: Option<u32>,
    #[serde(default)]
    logprobs: bool,
    #[serde(default)]
    top_logprobs: Option<u32>,
    #[serde(default)]
    tools: Vec<RawTool>,
    #[serde(default)]
    tool_choice: Option<Value>,
    #[serde(default)]
    response_format: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct RawMessage {
    role: RawRole,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    reasoning_content: Option<String>,
    #[serde(default)]
    tool_calls: Vec<RawCall>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawRole {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "content takes a string or a list of text parts")]
enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ContentPart {
    Text { text: String },
}

#[derive(Debug, Deserialize)]
struct RawCall {
    function: RawFunctionCall,
}

#[derive(Debug, Deserialize)]
struct RawFunctionCall {
    name: String,
    /// JSON in a string.
    #[serde(default)]
    arguments: String,
}

#[derive(Debug, Deserialize)]
struct RawTool {
    function: RawFunction,
}

#[derive(Debug, Deserialize)]
struct RawFunction {
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    parameters: Value,
}

impl RawMessage {
    fn into_message(self) -> ApiResult<Message> {
        let text = match self.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => parts
                .into_iter()
                .map(|ContentPart::Text { text }| text)
                .collect(),
        };
        let role = match self.role {
            RawRole::System | RawRole::Developer => Role::System,
            RawRole::User => Role::User,
            RawRole::Assistant => Role::Assistant,
            RawRole::Tool => Role::Tool,
        };
        let calls: ApiResult<Vec<ToolCall>> = self
            .tool_calls
            .into_iter()
            .map(RawCall::into_call)
            .collect();
        let message = Message::new(role, with_calls(&text, &calls?));
        Ok(message.with_thinking(self.reasoning_content.unwrap_or_default()))
    }
}

impl RawCall {
    fn into_call(self) -> ApiResult<ToolCall> {
        let RawFunctionCall { name, arguments } = self.function;
        let arguments = serde_json::from_str(&arguments).map_err(|error| {
            ApiError::bad_request(format!(
                "arguments of the call of {name} are not JSON: {error}"
            ))
        })?;
        Ok(ToolCall { name, arguments })
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
        return job.answer_with_stream().await;
    }
    Ok(Json(job.collect().await?).into_response())
}

/// A request that is being drawn.
pub(super) struct Job {
    pub(super) id: String,
    pub(super) created: i64,
    pub(super) model: Model,
    pub(super) drawing: Drawing,
    pub(super) replies: Vec<Reply>,
    pub(super) n_prompt_tokens: usize,
    pub(super) with_logprobs: bool,
    pub(super) include_usage: bool,
    stream: bool,
}

fn begin(app: &Arc<App>, request: Request) -> ApiResult<Job> {
    let common = request.common;
    common.check()?;
    let format = request
        .response_format
        .as_ref()
        .map(|format| &format["type"]);
    refuse_any(&[
        ("response_format", format.is_some_and(|kind| kind != "text")),
        (
            "top_logprobs without logprobs",
            request.top_logprobs.is_some() && !request.logprobs,
        ),
    ])?;
    let include_usage = common.include_usage();
    let tools = tools(request.tools, request.tool_choice.as_ref())?;
    let model = app.inference_model(&common.model)?;
    let renderer = model.renderer()?;
    let messages: ApiResult<Vec<Message>> = request
        .messages
        .into_iter()
        .map(RawMessage::into_message)
        .collect();
    let prompt = prompt(renderer.as_ref(), &model.tokenizer, messages?, &tools, None)?;
    let asked = common
        .stop
        .map(super::OneOrMany::into_vec)
        .unwrap_or_default();
    let stops = stops(&model.tokenizer, Some(renderer.as_ref()), asked)?;
    let n_prompt_tokens = prompt.len();
    let ask = Ask {
        prompt,
        n: common.n,
        max_tokens: request.max_completion_tokens.or(request.max_tokens),
        temperature: common.temperature.unwrap_or(1.0),
        top_p: common.top_p.unwrap_or(1.0),
        top_k: common.top_k.unwrap_or(-1),
        seed: common.seed,
        stops: stops.clone(),
        n_top: request.top_logprobs.unwrap_or(0),
    };
    // The number of replies is checked there.
    let drawing = app.draw(&model, ask)?;
    let replies = Reply::several(&model, stops.into(), !tools.is_empty(), common.n);
    Ok(Job {
        id: new_id("chatcmpl"),
        created: created(),
        drawing,
        model,
        replies,
        n_prompt_tokens,
        with_logprobs: request.logprobs,
        include_usage,
        stream: common.stream,
    })
}

/// The tools that the model is told of.
fn tools(tools: Vec<RawTool>, choice: Option<&Value>) -> ApiResult<Vec<Tool>> {
    match choice {
        Some(choice) if choice == "none" => return Ok(Vec::new()),
        Some(choice) if choice != "auto" && !choice.is_null() => {
            return Err(ApiError::bad_request(format!(
                "tool_choice {choice} is not supported: this server cannot force a call, take auto or none"
            )));
        }
        _ => {}
    }
    let tool = |RawTool { function }| Tool {
        name: function.name,
        description: function.description,
        parameters: function.parameters,
    };
    Ok(tools.into_iter().map(tool).collect())
}

/// A row of the table of log-probabilities.
pub(super) fn logprob_row(tokenizer: &Tokenizer, token: &DrawnToken) -> Value {
    let row = |id: u32, logprob: f32| {
        let text = tokenizer.decode(&[id]).unwrap_or_default();
        json!({"token": text, "logprob": logprob, "bytes": text.as_bytes()})
    };
    let mut whole = row(token.id, token.logprob);
    let top = token.top.iter().map(|(id, logprob)| row(*id, *logprob));
    whole["top_logprobs"] = top.collect();
    whole
}

/// A call with its number within the message.
pub(super) fn call_row(call: &ToolCall) -> Value {
    json!({
        "id": new_id("call"), "type": "function",
        "function": {"name": call.name, "arguments": call.arguments.to_string()},
    })
}

pub(super) fn finish_reason(turn: &Turn) -> &'static str {
    match turn.reason {
        _ if turn.n_calls > 0 => "tool_calls",
        StopReason::Length => "length",
        _ => "stop",
    }
}

impl Job {
    async fn collect(mut self) -> ApiResult<Value> {
        let n = self.replies.len();
        let mut messages: Vec<MessageSoFar> = vec![MessageSoFar::default(); n];
        while let Some(new) = self.drawing.next().await {
            let parts = self.replies[new.sample].push(&new.tokens)?;
            let message = &mut messages[new.sample];
            parts.into_iter().for_each(|part| message.add(part));
            let rows = new
                .tokens
                .iter()
                .map(|t| logprob_row(&self.model.tokenizer, t));
            message.logprobs.extend(rows.filter(|_| self.with_logprobs));
        }
        let reasons = self.drawing.end().await?;
        let mut choices = Vec::new();
        let mut n_drawn = 0;
        for (i, reason) in reasons.into_iter().enumerate() {
            let (parts, turn) = self.replies[i].finish(reason)?;
            parts.into_iter().for_each(|part| messages[i].add(part));
            n_drawn += turn.n_tokens;
            choices.push(self.choice(i, std::mem::take(&mut messages[i]), &turn));
        }
        let usage = Usage::new(self.n_prompt_tokens, n_drawn);
        Ok(json!({
            "id": self.id, "object": "chat.completion", "created": self.created,
            "model": self.model.name, "choices": choices, "usage": usage,
        }))
    }

    fn choice(&self, index: usize, message: MessageSoFar, turn: &Turn) -> Value {
        let is_call_alone = message.text.is_empty() && !message.calls.is_empty();
        let mut row = json!({
            "role": "assistant", "content": (!is_call_alone).then_some(message.text),
        });
        if !message.thinking.is_empty() {
            row["reasoning_content"] = message.thinking.into();
        }
        if !message.calls.is_empty() {
            row["tool_calls"] = message.calls.into();
        }
        let logprobs = self
            .with_logprobs
            .then(|| json!({"content": message.logprobs}));
        json!({
            "index": index, "message": row, "logprobs": logprobs,
            "finish_reason": finish_reason(turn),
        })
    }
}

#[derive(Debug, Clone, Default)]
struct MessageSoFar {
    text: String,
    thinking: String,
    calls: Vec<Value>,
    logprobs: Vec<Value>,
}

impl MessageSoFar {
    fn add(&mut self, part: Part) {
        match part {
            Part::Text(text) => self.text.push_str(&text),
            Part::Thinking(text) => self.thinking.push_str(&text),
            Part::Tool(call) => self.calls.push(call_row(&call)),
        }
    }
}
