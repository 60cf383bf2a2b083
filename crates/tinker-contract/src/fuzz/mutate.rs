//! Changes to valid requests: of their structure, of their bytes, of how they travel.

use std::fmt;
use std::sync::LazyLock;

use prost::Message as _;
use serde_json::{Value, json};

use super::arena::Arena;
use super::seeds::{Content, Seed};
use crate::chaos::weather::Draws;

/// A request that may be anything.
#[derive(Debug, Clone)]
pub(super) struct Mutated {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl fmt::Display for Mutated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.body.len().min(1500);
        write!(
            f,
            "{} {} {:?}, {} bytes: {}",
            self.method,
            self.target,
            self.headers,
            self.body.len(),
            self.body[..end].escape_ascii()
        )
    }
}

/// Hundreds of megabytes in a few kilobytes.
static BOMB: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let spaces = vec![b' '; 300 << 20];
    zstd::encode_all(&spaces[..], 1).expect("memory")
});

/// Makes what takes memory of its own, before any is measured.
pub(super) fn prepare() {
    LazyLock::force(&BOMB);
}

/// A request that differs from `seed` in none to a few places.
pub(super) fn mutated(seed: &Seed, arena: &Arena, draws: &mut Draws) -> Mutated {
    let mut headers = Vec::new();
    let mut header = |name: &str, value: &str| headers.push((name.to_owned(), value.to_owned()));
    // One more than the last, mostly, so that it is executed.
    let seq = arena.next_seq + u64::from(draws.below(8) == 0) * draws.below(4);
    let mut body = match &seed.content {
        Content::Nothing => Vec::new(),
        Content::Bytes(bytes) => bytes.clone(),
        Content::Pass(pass) => {
            header("content-type", "application/x-protobuf");
            let mut pass = pass.clone();
            pass.seq_id = i32::try_from(seq).unwrap_or(i32::MAX);
            pass.encode_to_vec()
        }
        Content::Json(value) => {
            header("content-type", "application/json");
            let mut value = value.clone();
            if let Some(number) = value.get_mut("seq_id") {
                *number = json!(seq);
            }
            for _ in 0..draws.below(4) {
                change_json(&mut value, draws);
            }
            value.to_string().into_bytes()
        }
    };
    // Bytes of JSON are rarely worth changing: what is no JSON is refused at once.
    let n_changes = match &seed.content {
        Content::Json(_) => draws.below(5).saturating_sub(3),
        _ => draws.below(4),
    };
    for _ in 0..n_changes {
        change_bytes(&mut body, draws);
    }
    match draws.below(400) {
        0..20 => {
            header("content-encoding", "zstd");
            body = zstd::encode_all(&body[..], 1).expect("memory");
            if draws.below(2) == 0 {
                change_bytes(&mut body, draws);
            }
        }
        20 => {
            header("content-encoding", "zstd");
            body.clone_from(&BOMB);
        }
        21..25 => header(
            "content-encoding",
            ["zstd", "gzip", "br", "identity"][draws.below(4) as usize],
        ),
        25..30 => header(
            "content-type",
            [
                "text/plain",
                "application/x-protobuf",
                "multipart/form-data",
            ][draws.below(3) as usize],
        ),
        30..34 => header("accept", "application/x-protobuf"),
        34..38 => header(
            "range",
            ["bytes=5-1", "bytes=0-99999999999999999999", "bytes=-1", "x"][draws.below(4) as usize],
        ),
        _ => {}
    }
    let mut target = seed.target.clone();
    if draws.below(12) == 0 {
        change_target(&mut target, draws);
    }
    Mutated {
        method: seed.method.clone(),
        target,
        headers,
        body,
    }
}

/// Numbers that are on the edge of something.
const NUMBERS: [i64; 14] = [
    0,
    1,
    -1,
    2,
    127,
    255,
    256,
    65_536,
    i32::MAX as i64,
    i32::MIN as i64,
    1 << 32,
    1 << 53,
    i64::MAX,
    i64::MIN,
];

/// Something else of any kind.
fn any_value(draws: &mut Draws) -> Value {
    match draws.below(14) {
        0 => Value::Null,
        1 => json!(true),
        2..5 => json!(NUMBERS[draws.below(NUMBERS.len() as u64) as usize]),
        5 => json!(u64::MAX),
        6 => json!([1e308, -1e308, 1e-320, 0.5, -0.0][draws.below(5) as usize]),
        7 => json!(""),
        8 => json!("x".repeat(1 + draws.below(100_000) as usize)),
        9 => json!(
            [
                "tinker://",
                "../../etc",
                "a\u{0}b",
                "\u{1F600}",
                "NaN",
                "S:train:0",
                "-1"
            ][draws.below(7) as usize]
        ),
        10 => json!([]),
        11 => json!({}),
        12 => json!(vec![draws.below(300); 1 + draws.below(5000) as usize]),
        _ => (0..draws.below(300)).fold(json!(1), |inner, _| json!([inner])),
    }
}

fn n_nodes(value: &Value) -> u64 {
    1 + match value {
        Value::Array(items) => items.iter().map(n_nodes).sum(),
        Value::Object(fields) => fields.values().map(n_nodes).sum(),
        _ => 0,
    }
}

/// The node of a number, in the order in which they are met.
fn node_of<'a>(value: &'a mut Value, number: &mut u64) -> Option<&'a mut Value> {
    if *number == 0 {
        return Some(value);
    }
    *number -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| node_of(item, number)),
        Value::Object(fields) => fields.values_mut().find_map(|field| node_of(field, number)),
        _ => None,
    }
}

fn change_json(value: &mut Value, draws: &mut Draws) {
    let mut number = draws.below(n_nodes(value));
    let Some(node) = node_of(value, &mut number) else {
        return;
    };
    let any = any_value(draws);
    match node {
        Value::Object(fields) if draws.below(2) == 0 => {
            let keys: Vec<String> = fields.keys().cloned().collect();
            let key = keys.get(draws.below(1 + keys.len() as u64) as usize);
            match key {
                Some(key) => drop(fields.remove(key)),
                None => drop(fields.insert("unheard_of".to_owned(), any)),
            }
        }
        Value::Array(items) if draws.below(2) == 0 => {
            let at = draws.below(1 + items.len() as u64) as usize;
            match items.get(at).cloned() {
                Some(_) if draws.below(2) == 0 => drop(items.remove(at)),
                Some(item) => items.extend(vec![item; 1 + draws.below(40) as usize]),
                None => items.push(any),
            }
        }
        Value::String(text) if draws.below(2) == 0 => {
            let mut bytes = std::mem::take(text).into_bytes();
            change_bytes(&mut bytes, draws);
            *text = String::from_utf8_lossy(&bytes).into_owned();
        }
        _ => *node = any,
    }
}

/// One change anywhere: of a bit, of a number, of the length.
fn change_bytes(bytes: &mut Vec<u8>, draws: &mut Draws) {
    let n = bytes.len() as u64;
    let at = draws.below(n + 1) as usize;
    let len = 1 + draws.below(16) as usize;
    let end = (at + len).min(bytes.len());
    match draws.below(8) {
        0 | 1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << draws.below(8);
            }
        }
        2 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = [0, 1, 0x7f, 0x80, 0xff][draws.below(5) as usize];
            }
        }
        3 => drop(bytes.drain(at..end)),
        4 => bytes.truncate(at),
        5 => {
            let copy = bytes[at..end].to_vec();
            drop(bytes.splice(at..at, copy));
        }
        6 => {
            let number = NUMBERS[draws.below(NUMBERS.len() as u64) as usize].to_le_bytes();
            let end = (at + 8).min(bytes.len());
            drop(bytes.splice(at..end, number));
        }
        _ => {
            let noise: Vec<u8> = (0..len).map(|_| draws.below(256) as u8).collect();
            drop(bytes.splice(at..at, noise));
        }
    }
}

/// A path or query that may name anything; what is no address is not sent.
fn change_target(target: &mut String, draws: &mut Draws) {
    let mut parts: Vec<String> = target.split('/').map(str::to_owned).collect();
    let at = draws.below(parts.len() as u64) as usize;
    let other = [
        "..",
        "%00",
        "%2e%2e%2f",
        "-1",
        "99999999999999999999",
        "%F0%9F%98%80",
        "%FF",
        "x?limit=-1",
        "x?offset=1e9",
        "",
    ];
    parts[at] = other[draws.below(other.len() as u64) as usize].to_owned();
    *target = parts.join("/");
}
