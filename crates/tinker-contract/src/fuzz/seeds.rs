//! The valid requests: what was recorded of the official SDK, and what the recording lacks.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use prost::Message as _;
use serde_json::{Value, json};
use tinker_types::proto;

use super::arena::Arena;

/// What a request carries.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Nothing,
    Json(Value),
    /// A pass, whose number is set when it is sent.
    Pass(proto::ForwardBackwardRequest),
    /// A file.
    Bytes(Vec<u8>),
}

/// A valid request.
#[derive(Debug, Clone)]
pub(super) struct Seed {
    pub(super) method: String,
    /// Path and query.
    pub(super) target: String,
    pub(super) content: Content,
}

/// All of them by route, so that each route has its share of the cases.
pub(super) fn seeds(arena: &Arena) -> Vec<Vec<Seed>> {
    let mut routes: BTreeMap<(String, String), Vec<Seed>> = BTreeMap::new();
    let mut add = |seed: Seed| {
        let path = seed.target.split('?').next().unwrap_or_default().to_owned();
        let route = (seed.method.clone(), path);
        routes.entry(route).or_default().push(seed);
    };
    recorded(arena).into_iter().for_each(&mut add);
    by_hand(arena).into_iter().for_each(&mut add);
    files(arena).into_iter().for_each(&mut add);
    routes.into_values().collect()
}

fn recorded(arena: &Arena) -> Vec<Seed> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/wire/recorded.jsonl");
    let text = std::fs::read_to_string(path).expect("the recording");
    let records = text
        .lines()
        .filter(|line| !line.contains("\"truncated\""))
        .map(|line| serde_json::from_str::<Value>(&renamed(line, arena)).expect("a record"));
    records.map(|record| seed_of(&record, arena)).collect()
}

/// What the recording calls by its own names, by those of the arena.
fn renamed(text: &str, arena: &Arena) -> String {
    let names = arena.names.iter();
    names.fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

fn seed_of(record: &Value, arena: &Arena) -> Seed {
    let text = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
    let request = &record["request"];
    let content = if let Some(encoded) = request["protobuf"].as_str() {
        let bytes = BASE64_STANDARD.decode(encoded).expect("base64");
        let mut pass = proto::ForwardBackwardRequest::decode(&bytes[..]).expect("a message");
        pass.model_id = renamed(&pass.model_id, arena);
        Content::Pass(pass)
    } else if request["json"].is_null() {
        Content::Nothing
    } else {
        Content::Json(request["json"].clone())
    };
    let target = match text("query") {
        query if query.is_empty() => text("path"),
        query => format!("{}?{query}", text("path")),
    };
    Seed {
        method: text("method"),
        target,
        content,
    }
}

fn by_hand(arena: &Arena) -> Vec<Seed> {
    let (model, session) = (&arena.names[0].1, &arena.names[1].1);
    let run = format!("{session}:train:0");
    let turns = json!([{"role": "user", "content": "What is 2 plus 3?"}]);
    let tool =
        json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}});
    let posts = [
        (
            "/oai/api/v1/completions",
            json!({"model": model, "prompt": "one", "max_tokens": 3, "n": 2, "logprobs": 2, "stop": ["x"]}),
        ),
        (
            "/oai/api/v1/chat/completions",
            json!({"model": "tinker/nano", "messages": turns, "max_tokens": 3, "stream": true,
                "tools": [tool], "logprobs": true, "top_logprobs": 2}),
        ),
        (
            "/anthropic/api/v1/messages",
            json!({"model": "tinker/nano", "messages": turns, "max_tokens": 3, "system": "be kind",
                "stream": true, "stop_sequences": ["x"]}),
        ),
        (
            "/anthropic/api/v1/messages/count_tokens",
            json!({"model": "tinker/nano", "messages": turns}),
        ),
        (
            "/api/v1/external_weights_upload_start",
            json!({"session_id": session, "name": "again"}),
        ),
        (
            "/api/v1/external_weights_upload_finish",
            json!({"upload_id": arena.names[2].1}),
        ),
        (
            "/api/v1/asample",
            json!({"sampling_session_id": format!("{session}:sample:0"), "seq_id": 7, "num_samples": 2,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
                "sampling_params": {"max_tokens": 3, "stop": [9], "top_p": 0.5},
                "prompt_logprobs": true, "topk_prompt_logprobs": 2, "topk_sample_logprobs": 2,
                "target_prompt_logprobs": {"data": [5, -1], "dtype": "int64", "shape": [2, 1]},
                "prompt_alt_tokens_k": 2}),
        ),
        (
            "/api/v1/retrieve_future",
            json!({"request_id": format!("{run}:op:1"), "allow_metadata_only": true}),
        ),
        (
            "/api/v1/checkpoints/search",
            json!({"limit": 5, "owner": {"type": "own"}}),
        ),
        (
            "/api/v1/extensions/zero_grad",
            json!({"model_id": run, "seq_id": 1}),
        ),
        (
            "/api/v1/extensions/gradient_stats",
            json!({"model_id": run, "seq_id": 1}),
        ),
        ("/api/v1/unload_model", json!({"model_id": run})),
        ("/api/v1/create_custom_loss", custom_loss()),
    ];
    let posts = posts.into_iter().map(|(path, body)| Seed {
        method: "POST".to_owned(),
        target: path.to_owned(),
        content: Content::Json(body),
    });
    let gets = [
        "/metrics",
        "/api/v1/healthz",
        "/oai/api/v1/models",
        "/signed/traces/x?signature=0",
    ];
    let gets = gets.into_iter().map(|path| Seed {
        method: "GET".to_owned(),
        target: path.to_owned(),
        content: Content::Nothing,
    });
    posts.chain(gets).collect()
}

/// The first program of the fixtures, as it is uploaded.
fn custom_loss() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/losses/graphs.json");
    let text = std::fs::read_to_string(path).expect("the programs");
    let graphs: Value = serde_json::from_str(&text).expect("JSON");
    first_graph(&graphs).unwrap_or(graphs)
}

/// The first object in there that has nodes.
fn first_graph(value: &Value) -> Option<Value> {
    match value {
        Value::Object(fields) if fields.contains_key("nodes") => Some(value.clone()),
        Value::Object(fields) => fields.values().find_map(first_graph),
        Value::Array(items) => items.iter().find_map(first_graph),
        _ => None,
    }
}

/// The files of an export, to be received at their signed addresses.
fn files(arena: &Arena) -> Vec<Seed> {
    let links = arena.links.iter();
    let seeds = links.filter_map(|(name, link)| {
        let (_, bytes) = arena.files.iter().find(|(file, _)| file == name)?;
        let path = link.find("/signed/").and_then(|at| link.get(at..))?;
        Some(Seed {
            method: "PUT".to_owned(),
            target: path.to_owned(),
            content: Content::Bytes(bytes.clone()),
        })
    });
    let seeds: Vec<Seed> = seeds.collect();
    assert_eq!(seeds.len(), arena.links.len(), "a file for each link");
    seeds
}
