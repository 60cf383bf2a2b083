//! Those who do not use the client library: other APIs, bad requests, and connections that break.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::super::Place;
use super::{Client, demand, text};

/// A future is polled this often at most.
const MAX_POLLS: u32 = 100;

/// What a server said.
pub(super) struct Answer {
    status: u16,
    body: String,
}

impl Answer {
    fn json(&self) -> Result<Value, String> {
        serde_json::from_str(&self.body).map_err(|_| format!("no JSON: {}", self.body))
    }

    /// The body of a success.
    pub(super) fn success(self) -> Result<Self, String> {
        let is_success = self.status == 200;
        demand(is_success, || format!("{}: {}", self.status, self.body))?;
        Ok(self)
    }
}

/// A connection with one request on its way.
async fn send(place: &Place, method: &str, path: &str, body: &str) -> Result<TcpStream, String> {
    let host = place.base_url.trim_start_matches("http://");
    let mut stream = TcpStream::connect(host).await.map_err(text)?;
    let (key, length) = (&place.api_key, body.len());
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {host}\r\nx-api-key: {key}\r\nconnection: close\r\n\
         content-type: application/json\r\naccept: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    let request = [head.as_bytes(), body.as_bytes()].concat();
    stream.write_all(&request).await.map_err(text)?;
    Ok(stream)
}

/// The answer, up to the end of the connection.
async fn receive(mut stream: TcpStream) -> Result<Answer, String> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.map_err(text)?;
    let answer = String::from_utf8_lossy(&bytes);
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("half an answer")?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Ok(Answer {
        status: status.ok_or("an answer without a status")?,
        body: body.to_owned(),
    })
}

pub(super) async fn call(place: &Place, path: &str, body: &Value) -> Result<Answer, String> {
    receive(send(place, "POST", path, &body.to_string()).await?).await
}

impl Client {
    /// A sampler of the base model in a session of its own, made by hand.
    async fn plain_sampler(&self) -> Result<String, String> {
        let session = json!({"sdk_version": "0.38.0", "tags": [], "user_metadata": {}});
        let made = call(&self.place, "/api/v1/create_session", &session).await?;
        let session = made.success()?.json()?["session_id"].clone();
        let sampler = json!({
            "session_id": session, "sampling_session_seq_id": 0,
            "base_model": self.place.base_model,
        });
        let made = call(&self.place, "/api/v1/create_sampling_session", &sampler).await?;
        let id = &made.success()?.json()?["sampling_session_id"];
        id.as_str()
            .map(str::to_owned)
            .ok_or("no sampler".to_owned())
    }

    /// Leaves a poll without reading its answer, twice, and gets the result all the same.
    pub(super) async fn disconnect(&mut self) -> Result<(), String> {
        let sampler = self.plain_sampler().await?;
        let prompt = self.tokens(8);
        let sample = json!({
            "sampling_session_id": sampler, "seq_id": 0, "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
            "sampling_params": {"max_tokens": 100, "stop": []},
        });
        let asked = call(&self.place, "/api/v1/asample", &sample).await?;
        let poll = json!({"request_id": asked.success()?.json()?["request_id"]}).to_string();
        for _ in 0..2 {
            let left = send(&self.place, "POST", "/api/v1/retrieve_future", &poll).await?;
            drop(left);
        }
        for _ in 0..MAX_POLLS {
            let asked = send(&self.place, "POST", "/api/v1/retrieve_future", &poll).await?;
            let answer = receive(asked).await?;
            if answer.status == 408 {
                continue;
            }
            let answer = answer.success()?.json()?;
            if answer["type"] != "try_again" {
                let n = answer["sequences"][0]["tokens"].as_array().map(Vec::len);
                return demand(n == Some(100), || format!("no 100 tokens: {answer}"));
            }
        }
        Err("a sample without an end".to_owned())
    }

    /// Completions, chats and messages, whole, streamed, and left midway.
    pub(super) async fn speak_other_apis(&mut self) -> Result<(), String> {
        let model = &self.place.base_model;
        let text = format!("What is {} plus 3?", self.draws.below(100));
        let turns = json!([{"role": "user", "content": text}]);
        let (path, mut body) = match self.n_done % 3 {
            0 => (
                "/oai/api/v1/completions",
                json!({"model": model, "prompt": text, "max_tokens": 12, "n": 2}),
            ),
            1 => (
                "/oai/api/v1/chat/completions",
                json!({"model": model, "messages": turns, "max_tokens": 12}),
            ),
            _ => (
                "/anthropic/api/v1/messages",
                json!({"model": model, "messages": turns, "max_tokens": 12}),
            ),
        };
        call(&self.place, path, &body).await?.success()?;
        body["stream"] = json!(true);
        let streamed = call(&self.place, path, &body).await?.success()?;
        let is_stream = streamed.body.contains("data: ");
        demand(is_stream, || format!("no stream: {}", streamed.body))?;
        body["max_tokens"] = json!(300);
        let mut left = send(&self.place, "POST", path, &body.to_string()).await?;
        // Until something has come.
        let mut some = [0; 64];
        left.read(&mut some).await.map(drop).map_err(super::text)
    }

    /// Requests that are refused for good, each with a text.
    pub(super) async fn err(&mut self) -> Result<(), String> {
        let bad: [(&str, &str, String); 8] = [
            ("POST", "/api/v1/create_session", "{".to_owned()),
            ("POST", "/api/v1/nowhere", "{}".to_owned()),
            ("PUT", "/api/v1/asample", "{}".to_owned()),
            (
                "POST",
                "/api/v1/retrieve_future",
                json!({"request_id": "nobody:op:7"}).to_string(),
            ),
            (
                "POST",
                "/api/v1/optim_step",
                json!({"model_id": "nobody:train:0", "seq_id": 1, "adam_params": {}}).to_string(),
            ),
            (
                "POST",
                "/api/v1/create_model",
                json!({"session_id": "nobody", "model_seq_id": 0, "base_model": "none"})
                    .to_string(),
            ),
            (
                "POST",
                "/oai/api/v1/completions",
                json!({"model": "none", "prompt": "x"}).to_string(),
            ),
            ("GET", "/api/v1/training_runs/nobody:train:0", String::new()),
        ];
        for (method, path, body) in bad {
            let answer = receive(send(&self.place, method, path, &body).await?).await?;
            let is_refusal = matches!(answer.status, 400 | 404 | 405 | 410 | 422);
            demand(is_refusal && !answer.body.is_empty(), || {
                format!("{method} {path}: {} {}", answer.status, answer.body)
            })?;
        }
        let stranger = Place {
            api_key: "tml-of-nobody".to_owned(),
            ..self.place.clone()
        };
        let answer = call(&stranger, "/api/v1/create_session", &json!({})).await?;
        demand(answer.status == 401, || {
            format!("{}: a wrong key", answer.status)
        })
    }
}
