//! The OpenAI- and Anthropic-compatible endpoints over the embedded model.

use std::path::Path;

use axum::body::Body;
use axum::http::{Method, Request};
use serde_json::{Value, json};
use tinker_server::{ApiToken, AppOptions};

use crate::harness::{Answer, Harness, TOKEN};

const OPENAI: &str = "/oai/api/v1";
const ANTHROPIC: &str = "/anthropic/api/v1";

fn open(home: &Path) -> Harness {
    Harness::with(AppOptions {
        threads: 2,
        ..AppOptions::new(home.to_owned(), ApiToken::new(TOKEN).unwrap())
    })
}

async fn post(server: &Harness, url: &str, body: &Value) -> Answer {
    let request = Request::builder()
        .method(Method::POST)
        .uri(url)
        .header("host", "127.0.0.1")
        .header("authorization", format!("Bearer {TOKEN}"))
        .header("content-type", "application/json")
        .body(Body::from(body.to_string()));
    server.send(request.unwrap()).await
}

async fn posted(server: &Harness, url: &str, body: Value) -> Value {
    let answer = post(server, url, &body).await;
    assert_eq!(
        answer.status,
        200,
        "{}",
        String::from_utf8_lossy(&answer.body)
    );
    answer.json()
}

/// The data of the events of a stream, without OpenAI's last one.
async fn streamed(server: &Harness, url: &str, body: Value) -> Vec<Value> {
    let answer = post(server, url, &body).await;
    let text = String::from_utf8(answer.body).unwrap();
    assert_eq!(
        (answer.status, answer.content_type.as_str()),
        (200, "text/event-stream"),
        "{text}"
    );
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    let data = data.filter(|line| *line != "[DONE]");
    data.map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn with(mut body: Value, more: Value) -> Value {
    let fields = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(fields);
    body
}

fn completion(more: Value) -> Value {
    let body = json!({"model": "tinker/nano", "prompt": "one two three", "max_tokens": 12,
        "seed": 5});
    with(body, more)
}

fn chat(more: Value) -> Value {
    let body = json!({"model": "tinker/nano", "max_tokens": 16, "seed": 5,
        "messages": [{"role": "user", "content": "What is 2 plus 3?"}]});
    with(body, more)
}

#[tokio::test]
async fn models_and_samplers_are_listed_and_sampled_by_any_of_their_names() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let body = json!({"model_id": run, "seq_id": 1, "path": "a"});
    let id = server.submit("/save_weights_for_sampler", body).await;
    let path = server.result(&id).await.json()["path"]
        .as_str()
        .unwrap()
        .to_owned();

    let key = [("x-api-key", TOKEN)];
    let list = server.follow("/oai/api/v1/models", &key).await.json();
    let ids: Vec<&str> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["tinker/nano", &path]);
    let one = server
        .follow("/oai/api/v1/models/tinker/nano", &key)
        .await
        .json();
    assert_eq!(one["id"], "tinker/nano");
    for name in [
        "tinker/nano:peft:512".to_owned(),
        path.clone(),
        format!("tinker/nano;{path}"),
    ] {
        let answer = posted(
            &server,
            &format!("{OPENAI}/completions"),
            completion(json!({"model": name})),
        )
        .await;
        assert_eq!(answer["model"], name);
    }
    let unknown = post(
        &server,
        &format!("{OPENAI}/completions"),
        &completion(json!({"model": "gpt"})),
    )
    .await;
    assert_eq!(unknown.status, 404);
    let message = unknown.json()["error"]["message"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        message.contains("gpt") && message.contains("tinker/nano"),
        "{message}"
    );
}

#[tokio::test]
async fn a_streamed_completion_is_the_whole_one_in_pieces() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let url = format!("{OPENAI}/completions");

    let whole = posted(&server, &url, completion(json!({"n": 2, "logprobs": 2}))).await;
    let chunks = streamed(
        &server,
        &url,
        completion(json!({"n": 2, "logprobs": 2, "stream": true,
        "stream_options": {"include_usage": true}})),
    )
    .await;

    for i in 0..2 {
        let choice = &whole["choices"][i];
        let of_choice = |key: &'static str| {
            let rows = chunks.iter().filter_map(|c| c["choices"].get(0));
            rows.filter(|row| row["index"] == i)
                .map(move |row| row[key].clone())
        };
        let text: String = of_choice("text")
            .map(|t| t.as_str().unwrap().to_owned())
            .collect();
        assert_eq!(choice["text"], text);
        let tokens: Vec<Value> = of_choice("logprobs")
            .filter_map(|l| l["tokens"].as_array().cloned())
            .flatten()
            .collect();
        assert_eq!(choice["logprobs"]["tokens"], json!(tokens));
        assert_eq!(
            choice["logprobs"]["top_logprobs"][0]
                .as_object()
                .unwrap()
                .len(),
            2
        );
        assert_eq!(
            of_choice("finish_reason").next_back(),
            Some(choice["finish_reason"].clone())
        );
    }
    assert_ne!(whole["choices"][0]["text"], whole["choices"][1]["text"]);
    assert_eq!(chunks.last().unwrap()["usage"], whole["usage"]);
    assert_eq!(whole["usage"]["completion_tokens"], 24);
}

#[tokio::test]
async fn a_stop_ends_the_text_before_itself() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let url = format!("{OPENAI}/completions");
    let free = posted(
        &server,
        &url,
        completion(json!({"temperature": 0, "max_tokens": 24})),
    )
    .await;
    let text = free["choices"][0]["text"].as_str().unwrap();
    // From the middle of a word on, so that it does not begin with a token.
    let start = text.len() / 2;
    let stop = &text[start..start + 3];

    let body = completion(json!({"temperature": 0, "max_tokens": 24, "stop": [stop, "@@"]}));
    let whole = posted(&server, &url, body.clone()).await;
    let chunks = streamed(&server, &url, with(body, json!({"stream": true}))).await;

    let expected = &text[..text.find(stop).unwrap()];
    assert_eq!(whole["choices"][0]["text"], expected);
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let pieces: String = chunks
        .iter()
        .map(|c| c["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(pieces, expected);
}

#[tokio::test]
async fn several_prompts_have_choices_of_their_own() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let url = format!("{OPENAI}/completions");

    let body = completion(json!({"prompt": ["one two three", "red and"], "temperature": 0}));
    let both = posted(&server, &url, body).await;
    let alone = posted(
        &server,
        &url,
        completion(json!({"prompt": "red and", "temperature": 0})),
    )
    .await;

    let indices: Vec<&Value> = both["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| &c["index"])
        .collect();
    assert_eq!(indices, [0, 1]);
    assert_eq!(both["choices"][1]["text"], alone["choices"][0]["text"]);
}

#[tokio::test]
async fn a_streamed_chat_is_the_whole_one_in_pieces() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let url = format!("{OPENAI}/chat/completions");

    let whole = posted(
        &server,
        &url,
        chat(json!({"logprobs": true, "top_logprobs": 3})),
    )
    .await;
    let chunks = streamed(&server, &url, chat(json!({"stream": true}))).await;

    let choice = &whole["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(!text.is_empty() && !text.contains("<|im_end|>"), "{text:?}");
    let rows = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(rows.len(), whole["usage"]["completion_tokens"]);
    assert_eq!(rows[0]["top_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let pieces: String = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(pieces, text);
    let last = &chunks.last().unwrap()["choices"][0];
    assert_eq!(last["finish_reason"], choice["finish_reason"]);
}

#[tokio::test]
async fn tools_are_part_of_the_prompt_and_their_results_have_a_place() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let url = format!("{OPENAI}/chat/completions");
    let tools = json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]);
    let messages = json!([
        {"role": "user", "content": "What is 2 plus 3?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 2}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "5"}]);

    let plain = posted(&server, &url, chat(json!({}))).await;
    let offered = posted(&server, &url, chat(json!({"tools": tools}))).await;
    let declined = posted(
        &server,
        &url,
        chat(json!({"tools": tools, "tool_choice": "none"})),
    )
    .await;
    let answered = posted(
        &server,
        &url,
        chat(json!({"tools": tools, "messages": messages})),
    )
    .await;

    let n = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(n(&offered) > n(&plain) + 50 && n(&answered) > n(&offered) + 10);
    assert_eq!(n(&declined), n(&plain));
    let forced = post(
        &server,
        &url,
        &chat(json!({"tools": tools, "tool_choice": "required"})),
    )
    .await;
    assert_eq!(forced.status, 400);
}

#[tokio::test]
async fn what_cannot_be_honoured_is_refused_by_name_before_anything_is_drawn() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let cases = [
        (json!({"presence_penalty": 0.5}), "presence_penalty"),
        (json!({"logit_bias": {"5": 1}}), "logit_bias"),
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
        ),
        (json!({"messages": []}), "messages is empty"),
        (json!({"n": 5000}), "num_samples 5000"),
        (json!({"n": 4_000_000_000_u32}), "num_samples 4000000000"),
        (json!({"temperature": -1}), "temperature -1"),
        (json!({"temperature": -1, "stream": true}), "temperature -1"),
        (json!({"stop": [""]}), "stop 0 is empty"),
    ];
    for (more, name) in cases {
        let url = format!("{OPENAI}/chat/completions");
        let answer = post(&server, &url, &chat(more)).await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, 400, "{text}");
        let message = answer.json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(message.contains(name), "{message}");
    }
}

fn message(more: Value) -> Value {
    let body = json!({"model": "tinker/nano", "max_tokens": 12, "temperature": 0,
        "messages": [{"role": "user", "content": "What is 2 plus 3?"}]});
    with(body, more)
}

#[tokio::test]
async fn a_streamed_message_is_the_whole_one_in_pieces() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let url = format!("{ANTHROPIC}/messages");

    let whole = posted(&server, &url, message(json!({"system": "Be brief."}))).await;
    let events = streamed(
        &server,
        &url,
        message(json!({"system": "Be brief.", "stream": true})),
    )
    .await;
    let counted = posted(
        &server,
        &format!("{url}/count_tokens"),
        message(json!({"system": "Be brief."})),
    )
    .await;

    assert_eq!(whole["content"].as_array().unwrap().len(), 1);
    let pieces: String = events
        .iter()
        .filter_map(|e| e["delta"]["text"].as_str())
        .collect();
    assert_eq!(whole["content"][0], json!({"type": "text", "text": pieces}));
    assert_eq!(counted["input_tokens"], whole["usage"]["input_tokens"]);
    let kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(kinds[..2], ["message_start", "content_block_start"]);
    assert_eq!(
        kinds[kinds.len() - 3..],
        ["content_block_stop", "message_delta", "message_stop"]
    );
    let end = &events[events.len() - 2];
    assert_eq!(end["delta"]["stop_reason"], whole["stop_reason"]);
    assert_eq!(
        end["usage"]["output_tokens"],
        whole["usage"]["output_tokens"]
    );
}

#[tokio::test]
async fn a_message_may_be_begun_and_says_which_stop_ended_it() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let url = format!("{ANTHROPIC}/messages");
    let story = json!([{"role": "user", "content": "Tell me a story."}]);
    let free = posted(&server, &url, message(json!({"messages": story}))).await;
    let text = free["content"][0]["text"].as_str().unwrap();
    assert!(text.is_ascii() && text.len() > 6, "{text:?}");
    let (begin, rest) = text.split_at(text.len() / 2);
    let stop = &rest[..2];

    let with_begin = json!({"messages": [story[0], {"role": "assistant", "content": begin}]});
    let begun = posted(&server, &url, message(with_begin)).await;
    let with_stop = json!({"messages": story, "stop_sequences": [stop]});
    let stopped = posted(&server, &url, message(with_stop)).await;
    let without_length = json!({"model": "tinker/nano", "messages": story});
    let refused = post(&server, &url, &without_length).await;

    let n = |answer: &Value| answer["usage"]["input_tokens"].as_u64().unwrap();
    assert!(n(&begun) > n(&free));
    assert_eq!(stopped["stop_reason"], "stop_sequence");
    assert_eq!(stopped["stop_sequence"], stop);
    let shown = stopped["content"][0]["text"].as_str().unwrap_or_default();
    assert_eq!(shown, &text[..text.find(stop).unwrap()]);
    assert_eq!(refused.status, 400);
    assert_eq!(refused.json()["type"], "error");
}

#[tokio::test]
async fn a_reader_that_leaves_cancels_what_is_drawn_for_it() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let body = completion(json!({"max_tokens": 400, "n": 64, "stream": true}));

    let status = server.begin(&format!("{OPENAI}/completions"), &body).await;
    assert_eq!(status, 200);

    // The hidden session's first sampler: its one request ends as a failure that says so.
    let session = server.get("/sessions").await.json()["sessions"][0]
        .as_str()
        .unwrap()
        .to_owned();
    let trace = server
        .get(&format!("/sessions/{session}/trace_export"))
        .await
        .json();
    let url = trace["url"].as_str().unwrap();
    loop {
        let trace = server.follow(url, &[]).await.json();
        let events = trace["traceEvents"].as_array().unwrap().clone();
        let state = events.last().unwrap()["args"]["state"].clone();
        if state != "pending" {
            assert_eq!(state, "failed", "it was drawn to its end for nobody");
            break;
        }
        tokio::task::yield_now().await;
    }
}
