//! Messages as server-sent events: a block begins, grows and ends before the next one.

use std::convert::Infallible;

use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{AnthropicError, Job, empty_block, stop_reason};
use crate::api_error::ApiResult;
use crate::inference::split::Part;
use crate::watchers::NewTokens;

type Sender = mpsc::UnboundedSender<Result<Event, Infallible>>;

/// Sends events; remembers which block is open.
struct Blocks {
    to: Sender,
    /// Type of the open block.
    open: Option<Value>,
    index: usize,
}

impl Blocks {
    /// False once nobody reads any more. An event is named by its type.
    fn send(&self, value: &Value) -> bool {
        let name = value["type"].as_str().unwrap_or_default();
        let event = Event::default().event(name).data(value.to_string());
        self.to.send(Ok(event)).is_ok()
    }

    fn add(&mut self, part: Part) -> bool {
        let block = empty_block(&part);
        let is_new = matches!(part, Part::Tool(_)) || self.open.as_ref() != Some(&block["type"]);
        if is_new {
            self.close();
            self.open = Some(block["type"].clone());
            self.send(&json!({
                "type": "content_block_start", "index": self.index, "content_block": block,
            }));
        }
        let delta = match part {
            Part::Text(text) => json!({"type": "text_delta", "text": text}),
            Part::Thinking(text) => json!({"type": "thinking_delta", "thinking": text}),
            Part::Tool(call) => {
                json!({"type": "input_json_delta", "partial_json": call.arguments.to_string()})
            }
        };
        self.send(&json!({"type": "content_block_delta", "index": self.index, "delta": delta}))
    }

    fn close(&mut self) {
        if self.open.take().is_some() {
            self.send(&json!({"type": "content_block_stop", "index": self.index}));
            self.index += 1;
        }
    }
}

impl Job {
    /// Answers with a stream once something was drawn: what is wrong before that has its status.
    pub(super) async fn answer_with_stream(mut self) -> Result<Response, AnthropicError> {
        let first = self.drawing.next().await;
        if first.is_none()
            && let Err(error) = self.drawing.end().await
        {
            return Err(error.into());
        }
        let (to, events) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut blocks = Blocks {
                to,
                open: None,
                index: 0,
            };
            if let Err(error) = self.send(first, &mut blocks).await {
                let error = AnthropicError(error);
                error.0.log();
                blocks.send(&error.body());
            }
        });
        let events = futures_util::stream::unfold(events, async |mut events| {
            let event = events.recv().await?;
            Some((event, events))
        });
        Ok(Sse::new(events).into_response())
    }

    async fn send(mut self, first: Option<NewTokens>, blocks: &mut Blocks) -> ApiResult<()> {
        blocks.send(&json!({"type": "message_start", "message": self.message(0)}));
        let mut next = first;
        while let Some(new) = next {
            for part in self.reply.push(&new.tokens)? {
                if !blocks.add(part) {
                    // Nobody reads; dropping the drawing cancels it.
                    return Ok(());
                }
            }
            next = self.drawing.next().await;
        }
        let (parts, turn) = self.ended().await?;
        for part in parts {
            blocks.add(part);
        }
        blocks.close();
        let (reason, stop) = stop_reason(&turn, &self.asked_stops);
        blocks.send(&json!({
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": stop},
            "usage": {"input_tokens": self.n_prompt_tokens, "output_tokens": turn.n_tokens},
        }));
        blocks.send(&json!({"type": "message_stop"}));
        Ok(())
    }
}
