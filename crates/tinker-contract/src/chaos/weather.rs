//! What happens between client and server: faults that follow from a seed, and a record of what was
//! sent, acknowledged and delivered.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message as _;
use serde_json::{Value, json};
use tinker_types::proto;

use crate::faults::{Fault, FaultServer, Seen};

/// Of so many requests one is disturbed.
const ONE_IN: u64 = 5;
/// Data of one request: a pass of three takes two, which overtake each other.
const CHUNK_LEN: u64 = 2;

/// Random numbers that follow from a seed (`SplitMix64`, Steele et al. 2014).
#[derive(Debug)]
pub struct Draws(u64);

impl Draws {
    /// Numbers that follow from `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `n`, which is not 0.
    pub const fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// What was seen between client and server.
#[derive(Debug, Clone, Default)]
pub struct Wire {
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Requests that arrived.
    pub n_requests: u64,
    /// Numbers of the training operations by route.
    pub numbers: BTreeMap<String, BTreeSet<u64>>,
    /// Routes and numbers of training operations that were sent again with other bytes.
    pub changed: BTreeSet<(String, u64)>,
    /// Samples whose acknowledgement reached the client.
    pub acknowledged_samples: BTreeSet<String>,
    /// Futures whose result reached the client.
    pub delivered_results: BTreeSet<String>,
    bodies: HashMap<(String, u64), Vec<u8>>,
}

/// Puts the weather of `seed` over a wire: fair if absent. What is seen of it.
#[must_use]
pub fn over(proxy: &FaultServer, seed: Option<u64>) -> Arc<Mutex<Wire>> {
    let wire = Arc::new(Mutex::new(Wire::default()));
    let (seen, counted) = (Arc::clone(&wire), Arc::clone(&wire));
    proxy.observe(move |event| lock(&seen).note(event));
    let mut draws = seed.map(Draws::new);
    proxy.decide(move |path| {
        if path == "/api/v1/client/config" {
            let config = json!({
                "fwdbwd_max_chunk_len": CHUNK_LEN, "parallel_fwdbwd_chunks": true,
            });
            return Fault::Raw(answer("200 OK", &config.to_string()));
        }
        let Some((kind, fault)) = draws.as_mut().and_then(draw) else {
            return Fault::None;
        };
        *lock(&counted).faults.entry(kind).or_default() += 1;
        fault
    });
    wire
}

fn lock(wire: &Mutex<Wire>) -> std::sync::MutexGuard<'_, Wire> {
    wire.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refusals, and what they are called where the server has done what was asked all the same.
const REFUSALS: [(&str, &str, &str); 5] = [
    ("408", "408 after delivery", "408 Request Timeout"),
    ("429", "429 after delivery", "429 Too Many Requests"),
    ("500", "500 after delivery", "500 Internal Server Error"),
    ("502", "502 after delivery", "502 Bad Gateway"),
    ("503", "503 after delivery", "503 Service Unavailable"),
];

/// What happens to the next request, if anything does.
fn draw(draws: &mut Draws) -> Option<(&'static str, Fault)> {
    if draws.below(ONE_IN) > 0 {
        return None;
    }
    let n_bytes = draws.below(60) as usize;
    let n_refusals = REFUSALS.len() as u64;
    Some(match draws.below(2 * n_refusals + 8) {
        0 => ("reset before delivery", Fault::ResetBefore),
        1 => ("reset after delivery", Fault::ResetAfter),
        2 => ("truncated", Fault::CutBody(n_bytes)),
        3 => ("reset midway", Fault::ResetBody(n_bytes)),
        4 => ("stalled", Fault::StallBody(n_bytes)),
        5 => ("delivered twice", Fault::DeliverTwice),
        6 => ("delivered twice and reset", Fault::DeliverTwiceAndReset),
        7 => (
            "held back",
            Fault::Hold(Duration::from_millis(1 + draws.below(15))),
        ),
        n => {
            let (before, after, status) = REFUSALS[(n % n_refusals) as usize];
            let bytes = refusal(status);
            if n < 8 + n_refusals {
                (before, Fault::Raw(bytes))
            } else {
                (after, Fault::RawAfter(bytes))
            }
        }
    })
}

fn refusal(status: &str) -> Vec<u8> {
    answer(status, r#"{"detail":"weather"}"#)
}

fn answer(status: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
         connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

impl Wire {
    fn note(&mut self, seen: Seen<'_>) {
        match seen {
            Seen::Arrived(path, body) => self.arrived(path, body),
            Seen::Answered(path, request, answer) => self.answered(path, request, answer),
        }
    }

    fn arrived(&mut self, path: &str, body: &[u8]) {
        self.n_requests += 1;
        let Some(number) = number_of(path, body) else {
            return;
        };
        let route = path.trim_start_matches("/api/v1/").to_owned();
        self.numbers
            .entry(route.clone())
            .or_default()
            .insert(number);
        let key = (route, number);
        let first = self
            .bodies
            .entry(key.clone())
            .or_insert_with(|| body.to_owned());
        if first != body {
            self.changed.insert(key);
        }
    }

    fn answered(&mut self, path: &str, request: &[u8], answer: &[u8]) {
        let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap_or_default();
        match path.trim_start_matches("/api/v1/") {
            "asample" => {
                let id = json(answer)["request_id"].as_str().map(str::to_owned);
                self.acknowledged_samples.extend(id);
            }
            "retrieve_future" if json(answer)["type"] != "try_again" => {
                let id = json(request)["request_id"].as_str().map(str::to_owned);
                self.delivered_results.extend(id);
            }
            _ => {}
        }
    }
}

/// The number of a training operation.
fn number_of(path: &str, body: &[u8]) -> Option<u64> {
    match path.trim_start_matches("/api/v1/") {
        "forward_backward" => {
            let message = proto::ForwardBackwardRequest::decode(body).ok()?;
            u64::try_from(message.seq_id).ok()
        }
        "optim_step" | "save_weights" | "save_weights_for_sampler" => {
            serde_json::from_slice::<Value>(body).ok()?["seq_id"].as_u64()
        }
        _ => None,
    }
}
