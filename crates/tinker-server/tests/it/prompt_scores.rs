//! What a sample says about its prompt: chosen tokens and drawn ones.

use serde_json::{Value, json};
use tinker_types::{SampleResponse, TensorValues};

use crate::harness::Harness;

/// A server with a sampler of the base model.
async fn sampler(home: &std::path::Path) -> (Harness, String) {
    let server = Harness::open(home);
    let session = server.session().await;
    let body = json!({"session_id": session, "sampling_session_seq_id": 0,
        "base_model": "tinker/nano"});
    let made = server.post("/create_sampling_session", body).await.json();
    let name = made["sampling_session_id"].as_str().unwrap().to_owned();
    (server, name)
}

/// A request with a prompt of four tokens and these fields.
fn request(sampler: &str, seq: u64, fields: Value) -> Value {
    let mut body = json!({"sampling_session_id": sampler, "seq_id": seq, "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [3, 4, 5, 6]}]},
        "sampling_params": {"max_tokens": 1}, "prompt_logprobs": true});
    let fields = fields.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(fields);
    body
}

async fn answered(server: &Harness, body: Value) -> SampleResponse {
    let id = server.submit("/asample", body).await;
    server.samples(&id).await
}

fn floats(values: &TensorValues) -> Vec<f32> {
    match values {
        TensorValues::Float32(values) => values.clone(),
        TensorValues::Int64(_) => panic!("not floats: {values:?}"),
    }
}

fn ints(values: &TensorValues) -> Vec<i64> {
    match values {
        TensorValues::Int64(values) => values.clone(),
        TensorValues::Float32(_) => panic!("not integers: {values:?}"),
    }
}

#[tokio::test]
async fn targets_are_scored_in_the_layout_they_came_in() {
    let home = tempfile::tempdir().unwrap();
    let (server, name) = sampler(home.path()).await;
    // Row i is about token i + 1 of the prompt.
    let dense = json!({"data": [4, 9, -1, -1, 6, 6], "dtype": "int64", "shape": [3, 2]});
    let sparse = json!({"data": [4, 9, 6], "dtype": "int64", "shape": [3, 2],
        "sparse_crow_indices": [0, 2, 2, 3], "sparse_col_indices": [0, 1, 1]});

    let asked = json!({"target_prompt_logprobs": dense, "topk_prompt_logprobs": 32});
    let first = answered(&server, request(&name, 0, asked)).await;
    let asked = json!({"target_prompt_logprobs": sparse});
    let second = answered(&server, request(&name, 1, asked)).await;

    let own = first.prompt_logprobs.unwrap();
    let top = first.topk_prompt_logprobs.unwrap();
    let nine = top[1]
        .as_ref()
        .unwrap()
        .iter()
        .find(|t| t.0 == 9)
        .unwrap()
        .1;
    let tensor = first.target_prompt_logprobs.unwrap();
    assert_eq!(tensor.shape(), [3, 2]);
    let (four, six) = (own[1].unwrap(), own[3].unwrap());
    assert_eq!(floats(tensor.values()), [four, nine, 0.0, 0.0, six, six]);
    let tensor = second.target_prompt_logprobs.unwrap();
    assert_eq!(floats(tensor.values()), [four, nine, six]);
    assert_eq!(tensor.sparse_index().unwrap().crow_indices, [0, 2, 2, 3]);
}

#[tokio::test]
async fn alternatives_are_drawn_at_each_position_and_repeat_with_their_seed() {
    let home = tempfile::tempdir().unwrap();
    let (server, name) = sampler(home.path()).await;
    let ask = |seq, seed: Value| {
        let params = json!({"max_tokens": 1, "seed": seed});
        let fields = json!({"prompt_alt_tokens_k": 50, "sampling_params": params,
            "topk_prompt_logprobs": 32});
        request(&name, seq, fields)
    };

    let first = answered(&server, ask(0, json!(7))).await;
    let again = answered(&server, ask(1, json!(7))).await;
    let other = answered(&server, ask(2, json!(8))).await;
    let unseeded = answered(&server, ask(3, json!(null))).await;

    let drawn = first.prompt_alt_tokens.unwrap();
    assert_eq!(drawn.tokens.shape(), [3, 50]);
    assert_eq!(drawn.logprobs.shape(), [3, 50]);
    let (tokens, logprobs) = (ints(drawn.tokens.values()), floats(drawn.logprobs.values()));
    let top = first.topk_prompt_logprobs.unwrap();
    for (i, (token, logprob)) in tokens.iter().zip(&logprobs).enumerate() {
        let row = top[i / 50 + 1].as_ref().unwrap();
        assert!(
            row.contains(&(*token as u32, *logprob)),
            "{token} {logprob}"
        );
    }
    assert_eq!(again.prompt_alt_tokens.as_ref(), Some(&drawn));
    assert_ne!(other.prompt_alt_tokens.as_ref(), Some(&drawn));
    assert_ne!(unseeded.prompt_alt_tokens, other.prompt_alt_tokens);
}

#[tokio::test]
async fn what_cannot_be_scored_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let (server, name) = sampler(home.path()).await;
    let target = |data: Value, dtype: &str, shape: Value| {
        let tensor = json!({"data": data, "dtype": dtype, "shape": shape});
        json!({"target_prompt_logprobs": tensor})
    };
    let many: Vec<i64> = vec![1; 3 * 1025];
    let cases = [
        (
            target(json!([1, 2, 3]), "int64", json!([3])),
            "target_prompt_logprobs of shape [3] for a prompt of 4 tokens: it must be [3, k]",
        ),
        (
            target(json!([1, 2, 3, 4]), "int64", json!([4, 1])),
            "target_prompt_logprobs of shape [4, 1] for a prompt of 4 tokens: it must be [3, k]",
        ),
        (
            target(json!([1.0, 2.0, 3.0]), "float32", json!([3, 1])),
            "target_prompt_logprobs must be int64, got float32",
        ),
        (
            target(json!([1, 32, 3]), "int64", json!([3, 1])),
            "target_prompt_logprobs asks for token 32 in row 1, outside the vocabulary of 32 tokens",
        ),
        (
            target(json!([1, -2, 3]), "int64", json!([3, 1])),
            "target_prompt_logprobs asks for token -2 in row 1, outside the vocabulary of 32 tokens",
        ),
        (
            target(json!([-1, -1, -1]), "int64", json!([3, 1])),
            "target_prompt_logprobs asks for no token: leave it out",
        ),
        (
            target(json!(many), "int64", json!([3, 1025])),
            "target_prompt_logprobs has 3075 cells for 3 positions: at most 1024 for each are taken",
        ),
        (
            json!({"prompt_alt_tokens_k": 101}),
            "prompt_alt_tokens_k 101 is above 100",
        ),
        (
            json!({"prompt_alt_tokens_k": 1, "prompt_logprobs": false,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": [3]}]}}),
            "prompt_alt_tokens_k 1 needs a prompt of 2 tokens at least",
        ),
    ];

    for (seq, (fields, expected)) in (0..).zip(cases) {
        let id = server.submit("/asample", request(&name, seq, fields)).await;
        assert_eq!(server.failure(&id).await, expected);
    }
}
