//! The server that `cargo xtask bench client` measures clients against: it speaks the protocol over
//! bare HTTP/1.1 and computes nothing, so that it does not hold a client up.
//!
//! `bench_double --latency-ms N [--session-poller]` prints its address and serves until its standard
//! input ends. A sample is done N ms after it was accepted; polls are held until then. `GET /stats`
//! tells how many samples were in flight at once and what the server itself cost.
#![expect(clippy::print_stdout, reason = "the address is the program's output")]

use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message;
use serde_json::{Value, json};
use tinker_types::{PROTOBUF, proto};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep_until};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const JSON: &str = "application/json";
const N_TOKENS: usize = 64;
/// How long a poll of a session waits for the next sample.
const LONGEST_POLL: Duration = Duration::from_secs(20);

/// What all connections share.
struct Double {
    started: Instant,
    latency: Duration,
    session_poller: bool,
    n_futures: AtomicU64,
    in_flight: AtomicU64,
    peak_in_flight: AtomicU64,
    /// When each accepted sample is done, in order of acceptance; its place is its cursor.
    samples: Mutex<Vec<(u64, Duration)>>,
    sample: SampleResult,
}

/// A sample's result, whose first token is its number.
struct SampleResult {
    bytes: Vec<u8>,
    first_token: usize,
}

/// The data of a pass, not looked into.
#[derive(Clone, PartialEq, prost::Message)]
struct Pass {
    #[prost(bytes = "bytes", repeated, tag = "3")]
    data: Vec<prost::bytes::Bytes>,
}

/// Status, content type, body.
type Answer = (u16, &'static str, Vec<u8>);

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [flag, latency, options @ ..] = &arguments[..] else {
        return Err("usage: bench_double --latency-ms N [--session-poller]".into());
    };
    if flag != "--latency-ms" {
        return Err(format!("unknown option `{flag}`").into());
    }
    let latency = Duration::from_millis(latency.parse()?);
    let session_poller = options.iter().any(|o| o == "--session-poller");
    // One thread leaves the rest of a small machine to the client.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(latency, session_poller))
}

async fn serve(latency: Duration, session_poller: bool) -> Result<(), Failure> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("http://{}", listener.local_addr()?);
    let double = Arc::new(Double {
        started: Instant::now(),
        latency,
        session_poller,
        n_futures: AtomicU64::new(0),
        in_flight: AtomicU64::new(0),
        peak_in_flight: AtomicU64::new(0),
        samples: Mutex::default(),
        sample: SampleResult::new()?,
    });
    let input_ends = tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0]));
    let accept = async {
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let double = Arc::clone(&double);
            tokio::spawn(async move { double.converse(stream).await.ok() });
        }
    };
    tokio::select! {
        result = accept => result,
        _ = input_ends => Ok(()),
    }
}

impl Double {
    /// Answers the requests of one connection until it closes.
    async fn converse(&self, mut stream: TcpStream) -> Result<(), Failure> {
        let mut buffer = Vec::with_capacity(4096);
        loop {
            let head = loop {
                if let Some(end) = find(&buffer, b"\r\n\r\n") {
                    break end + 4;
                }
                if stream.read_buf(&mut buffer).await? == 0 {
                    return Ok(());
                }
            };
            let request = std::str::from_utf8(buffer.get(..head).unwrap_or_default())?;
            let route = request.split(' ').nth(1).unwrap_or_default().to_owned();
            let length = content_length(request);
            buffer.drain(..head);
            while buffer.len() < length {
                if stream.read_buf(&mut buffer).await? == 0 {
                    return Ok(());
                }
            }
            let (status, kind, body) = self.answer(&route, &buffer[..length]).await?;
            buffer.drain(..length);
            // A large upload should not stay in memory for as long as its connection.
            buffer.shrink_to(4096);
            let mut answer = format!(
                "HTTP/1.1 {status} -\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n",
                body.len()
            )
            .into_bytes();
            answer.extend_from_slice(&body);
            stream.write_all(&answer).await?;
        }
    }

    async fn answer(&self, route: &str, body: &[u8]) -> Result<Answer, Failure> {
        let ok = |value: Value| Ok((200, JSON, value.to_string().into_bytes()));
        match route.trim_start_matches("/api/v1/") {
            "client/config" => ok(json!({
                "sample_max_concurrent_requests": 2000,
                "sample_use_retrieve_futures": self.session_poller,
            })),
            "client/dynamic_config" => ok(json!({})),
            "create_session" => ok(json!({"session_id": "S1", "type": "create_session"})),
            "session_heartbeat" => ok(json!({"type": "session_heartbeat"})),
            "telemetry" => ok(json!({"status": "accepted"})),
            "create_sampling_session" => ok(json!({
                "sampling_session_id": "S1:sample:0", "type": "create_sampling_session"
            })),
            "create_model" => ok(json!({"request_id": "model-0"})),
            "get_info" => ok(json!({
                "model_id": "S1:train:0", "type": "get_info",
                "model_data": {"model_name": "tinker/nano"},
            })),
            "forward_backward" => ok(json!({"request_id": self.accept_pass(body)?})),
            "asample" => {
                let id = self.accept_sample(seq_id(body));
                ok(json!({"request_id": id, "sample_sequence_ids": [id]}))
            }
            "retrieve_future" => self.retrieve(body).await,
            "retrieve_futures" => self.retrieve_many(body).await,
            "cancel_future" | "sessions/S1/finish" => ok(json!({})),
            "/stats" => ok(self.stats()?),
            _ => Ok((404, JSON, b"{\"detail\": \"no such route\"}".to_vec())),
        }
    }

    fn accept_pass(&self, body: &[u8]) -> Result<String, Failure> {
        let n_data = Pass::decode(body)?.data.len();
        let n = self.n_futures.fetch_add(1, Ordering::Relaxed);
        Ok(format!("pass-{n}-{n_data}"))
    }

    fn accept_sample(&self, seq_id: u64) -> String {
        let in_flight = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        self.peak_in_flight.fetch_max(in_flight, Ordering::Relaxed);
        let done_at = self.started.elapsed() + self.latency;
        if self.session_poller {
            self.samples().push((seq_id, done_at));
        }
        format!("sample-{seq_id}-{}", done_at.as_micros())
    }

    async fn retrieve(&self, body: &[u8]) -> Result<Answer, Failure> {
        let request: Value = serde_json::from_slice(body)?;
        let id = request["request_id"].as_str().unwrap_or_default();
        let mut parts = id.split('-');
        Ok(match parts.next() {
            Some("sample") => {
                let seq_id: u64 = parts.next().unwrap_or_default().parse()?;
                let done_at = parts.next().unwrap_or_default().parse()?;
                sleep_until(self.started + Duration::from_micros(done_at)).await;
                self.in_flight.fetch_sub(1, Ordering::Relaxed);
                (200, PROTOBUF, self.sample.numbered(seq_id))
            }
            Some("pass") => {
                let n_data = parts.nth(1).unwrap_or_default().parse()?;
                (200, PROTOBUF, pass_result(n_data))
            }
            _ => {
                let created = json!({"model_id": "S1:train:0", "type": "create_model"});
                (200, JSON, created.to_string().into_bytes())
            }
        })
    }

    /// Waits until a sample behind the cursor is done, and names all that are.
    async fn retrieve_many(&self, body: &[u8]) -> Result<Answer, Failure> {
        let request: Value = serde_json::from_slice(body)?;
        let cursor = usize::try_from(request["prev_cursor"].as_u64().unwrap_or(0))?;
        let longest = match request["timeout"].as_f64() {
            Some(secs) => Duration::from_secs_f64(secs),
            None => LONGEST_POLL,
        };
        let until = self.started.elapsed() + longest;
        loop {
            let now = self.started.elapsed();
            let (done, next) = self.done_behind(cursor, now);
            if !done.is_empty() || now >= until {
                let cursor = cursor + done.len();
                let answer = json!({"completions": done, "cursor": cursor});
                return Ok((200, JSON, answer.to_string().into_bytes()));
            }
            // A sample that is accepted meanwhile is not done before this.
            let next = next.unwrap_or(now + self.latency).min(until);
            sleep_until(self.started + next).await;
        }
    }

    /// The samples behind the cursor that are done, and when the next one is.
    fn done_behind(&self, cursor: usize, now: Duration) -> (Vec<Value>, Option<Duration>) {
        let samples = self.samples();
        let rest = samples.get(cursor..).unwrap_or_default();
        let n_done = rest.partition_point(|(_, done_at)| *done_at <= now);
        let completion = |(n, done_at): &(u64, Duration)| {
            json!({
                "state": "finished", "request_id": format!("sample-{n}-{}", done_at.as_micros()),
                "response_payload_uncompressed_size": self.sample.bytes.len(),
            })
        };
        let done = rest[..n_done].iter().map(completion).collect();
        (done, rest.get(n_done).map(|(_, done_at)| *done_at))
    }

    fn stats(&self) -> Result<Value, Failure> {
        Ok(json!({
            "peak_in_flight": self.peak_in_flight.swap(0, Ordering::Relaxed),
            "cpu_seconds": cpu_seconds()?,
        }))
    }

    fn samples(&self) -> std::sync::MutexGuard<'_, Vec<(u64, Duration)>> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SampleResult {
    /// One sequence of 64 tokens with log-probabilities.
    fn new() -> Result<Self, Failure> {
        const FIRST: i32 = 0x7777_7777;
        let rest = 1000..1000 + N_TOKENS as i32 - 1;
        let tokens = std::iter::once(FIRST)
            .chain(rest)
            .flat_map(i32::to_le_bytes);
        let logprobs = (0..N_TOKENS).flat_map(|t| (-0.01 * t as f32).to_le_bytes());
        let sequence = proto::SampledSequence {
            stop_reason: proto::StopReason::Length.into(),
            tokens: tokens.collect(),
            logprobs: Some(logprobs.collect()),
            topk_sampled_logprobs: None,
        };
        let response = proto::SampleResponse {
            sequences: vec![sequence],
            ..proto::SampleResponse::default()
        };
        let bytes = response.encode_to_vec();
        let first_token = find(&bytes, &FIRST.to_le_bytes()).ok_or("a token was lost")?;
        Ok(Self { bytes, first_token })
    }

    fn numbered(&self, seq_id: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let token = (seq_id % (1 << 31)) as u32;
        bytes[self.first_token..self.first_token + 4].copy_from_slice(&token.to_le_bytes());
        bytes
    }
}

/// One number for each datum: a pass is measured up to the last byte sent.
fn pass_result(n_data: usize) -> Vec<u8> {
    let offsets = (0..=n_data).flat_map(|i| (4 * i as i64).to_le_bytes());
    let logprobs = proto::BatchedTensor {
        data: vec![0; 4 * n_data].into(),
        offsets: offsets.collect(),
        dtype: proto::DType::Float32.into(),
        trailing_shape: Vec::new(),
    };
    let record = proto::ArrayRecord {
        type_tag: "ArrayRecord".into(),
        fields: [("logprobs".to_owned(), logprobs)].into(),
        num_datums: n_data as i64,
    };
    let output = proto::ForwardBackwardOutput {
        loss_fn_output_type: "ArrayRecord".into(),
        loss_fn_outputs: vec![record],
        metrics: [("loss:sum".to_owned(), 1.0)].into(),
    };
    output.encode_to_vec()
}

/// The number of a sample; 0 if it has none.
fn seq_id(body: &[u8]) -> u64 {
    let name = b"\"seq_id\":";
    let rest = find(body, name).and_then(|at| body.get(at + name.len()..));
    let digits = rest.unwrap_or_default().iter().skip_while(|b| **b == b' ');
    digits
        .take_while(|b| b.is_ascii_digit())
        .fold(0, |n, digit| n * 10 + u64::from(digit - b'0'))
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes
        .windows(pattern.len())
        .position(|part| part == pattern)
}

fn content_length(head: &str) -> usize {
    let value = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then_some(value)
    });
    value.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

/// Processor time of this process's threads so far, as Linux counts it.
fn cpu_seconds() -> Result<f64, Failure> {
    let text = std::fs::read_to_string("/proc/self/schedstat")?;
    let first = text.split_whitespace().next().ok_or("empty schedstat")?;
    Ok(first.parse::<f64>()? / 1e9)
}
