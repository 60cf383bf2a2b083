//! Chat completions as server-sent events.

use axum::response::sse::Sse;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::chat::{Job, call_row, finish_reason, logprob_row};
use super::completions::{Sender, into_stream};
use super::{OpenAiError, Usage, done, event, failed};
use crate::api_error::ApiResult;
use crate::inference::split::Part;
use crate::watchers::NewTokens;

impl Job {
    /// Answers with a stream once something was drawn: what is wrong before that has its status.
    pub(super) async fn answer_with_stream(mut self) -> Result<Response, OpenAiError> {
        let first = self.drawing.next().await;
        if first.is_none()
            && let Err(error) = self.drawing.end().await
        {
            return Err(error.into());
        }
        let (to, events) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            if let Err(error) = self.send(first, &to).await {
                let _ = to.send(failed(error));
            }
        });
        Ok(Sse::new(into_stream(events)).into_response())
    }

    async fn send(mut self, first: Option<NewTokens>, to: &Sender) -> ApiResult<()> {
        for index in 0..self.replies.len() {
            let begin = json!({"role": "assistant", "content": ""});
            let _ = to.send(event(&self.chunk(index, &begin, None)));
        }
        let mut n_calls = vec![0; self.replies.len()];
        let mut next = first;
        while let Some(new) = next {
            let parts = self.replies[new.sample].push(&new.tokens)?;
            let mut rows = Vec::new();
            if self.with_logprobs {
                let tokenizer = &self.model.tokenizer;
                rows.extend(new.tokens.iter().map(|t| logprob_row(tokenizer, t)));
            }
            let n = &mut n_calls[new.sample];
            for mut chunk in self.chunks(new.sample, parts, rows, n) {
                chunk["usage"] = Value::Null;
                if to.send(event(&chunk)).is_err() {
                    // Nobody reads; dropping the drawing cancels it.
                    return Ok(());
                }
            }
            next = self.drawing.next().await;
        }
        self.send_end(n_calls, to).await
    }

    async fn send_end(&mut self, mut n_calls: Vec<usize>, to: &Sender) -> ApiResult<()> {
        let mut n_drawn = 0;
        for (i, reason) in self.drawing.end().await?.into_iter().enumerate() {
            let (parts, turn) = self.replies[i].finish(reason)?;
            n_drawn += turn.n_tokens;
            for chunk in self.chunks(i, parts, Vec::new(), &mut n_calls[i]) {
                let _ = to.send(event(&chunk));
            }
            let last = self.chunk(i, &json!({}), Some(finish_reason(&turn)));
            let _ = to.send(event(&last));
        }
        if self.include_usage {
            let mut chunk = self.chunk(0, &json!({}), None);
            chunk["choices"] = json!([]);
            chunk["usage"] = json!(Usage::new(self.n_prompt_tokens, n_drawn));
            let _ = to.send(event(&chunk));
        }
        let _ = to.send(done());
        Ok(())
    }

    /// One chunk for each part, the log-probabilities with the first.
    fn chunks(
        &self,
        index: usize,
        parts: Vec<Part>,
        mut rows: Vec<Value>,
        n_calls: &mut usize,
    ) -> Vec<Value> {
        let mut deltas: Vec<Value> = Vec::new();
        for part in parts {
            deltas.push(match part {
                Part::Text(text) => json!({"content": text}),
                Part::Thinking(text) => json!({"reasoning_content": text}),
                Part::Tool(call) => {
                    let mut row = call_row(&call);
                    row["index"] = json!(*n_calls);
                    *n_calls += 1;
                    json!({"tool_calls": [row]})
                }
            });
        }
        if deltas.is_empty() && !rows.is_empty() {
            deltas.push(json!({"content": ""}));
        }
        let mut chunks = Vec::new();
        for delta in deltas {
            let mut chunk = self.chunk(index, &delta, None);
            if !rows.is_empty() {
                let logprobs = json!({"content": std::mem::take(&mut rows)});
                chunk["choices"][0]["logprobs"] = logprobs;
            }
            chunks.push(chunk);
        }
        chunks
    }

    fn chunk(&self, index: usize, delta: &Value, reason: Option<&str>) -> Value {
        json!({
            "id": self.id, "object": "chat.completion.chunk", "created": self.created,
            "model": self.model.name,
            "choices": [{
                "index": index, "delta": delta, "logprobs": null, "finish_reason": reason,
            }],
        })
    }
}
