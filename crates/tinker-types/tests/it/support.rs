//! Fixtures, base64, and equality of JSON up to what the wire leaves open.

use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Text of a file below `fixtures/wire`.
pub(crate) fn fixture(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../fixtures/wire")
        .join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A body of a recorded request or response.
#[derive(Debug, Deserialize)]
pub(crate) struct Body {
    pub(crate) json: Option<Value>,
    pub(crate) message: Option<String>,
    pub(crate) protobuf: Option<String>,
    /// The recording cut this body short.
    #[serde(default)]
    pub(crate) truncated: bool,
}

/// One or several equal exchanges of the recording.
#[derive(Debug, Deserialize)]
pub(crate) struct Record {
    pub(crate) times: u32,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) request: Option<Body>,
    pub(crate) status: u16,
    pub(crate) response: Option<Body>,
}

/// The whole recording.
pub(crate) fn records() -> Vec<Record> {
    fixture("recorded.jsonl")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Bytes of base64 text, read by the type that reads images.
pub(crate) fn base64(text: &str) -> Vec<u8> {
    let chunk: tinker_types::Chunk = decode(&serde_json::json!({"type": "dmel", "dmel": text}));
    match chunk {
        tinker_types::Chunk::Dmel { dmel } => dmel.to_vec(),
        other => panic!("not a dmel chunk: {other:?}"),
    }
}

/// Decodes JSON, naming the type and the text when that fails.
pub(crate) fn decode<T: DeserializeOwned>(json: &Value) -> T {
    serde_json::from_str(&json.to_string())
        .unwrap_or_else(|error| panic!("{}: {error} in {json}", std::any::type_name::<T>()))
}

/// `json` without the keys that hold null, which mean the same as absent ones.
pub(crate) fn without_nulls(json: &Value) -> Value {
    match json {
        Value::Object(map) => map
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key.clone(), without_nulls(value)))
            .collect(),
        Value::Array(items) => items.iter().map(without_nulls).collect(),
        // 1 and 1.0 are the same number in JSON.
        Value::Number(number) if !number.is_f64() => number
            .as_i64()
            .filter(|n| n.unsigned_abs() < 1 << 53)
            .map_or_else(|| json.clone(), |n| Value::from(n as f64)),
        other => other.clone(),
    }
}
