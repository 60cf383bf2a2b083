//! One long poll for all samples of a sampler's client, and clients that share a sampler.

use serde_json::{Value, json};
use tinker_server::{ApiToken, AppOptions};

use crate::durability::image;
use crate::harness::{Answer, Harness, TOKEN};

async fn sampler(server: &Harness) -> String {
    let session = server.session().await;
    let body =
        json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinker/nano"});
    let answer = server.post("/create_sampling_session", body).await;
    answer.json()["sampling_session_id"]
        .as_str()
        .unwrap()
        .to_owned()
}

async fn submit(server: &Harness, sampler: &str, seq: u64, max_tokens: i64) -> String {
    let body = json!({"sampling_session_id": sampler, "seq_id": seq, "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [3]}]},
        "sampling_params": {"max_tokens": max_tokens, "stop": [], "top_k": if max_tokens == 0 { 0 } else { -1 }}});
    server.submit("/asample", body).await
}

async fn ask(server: &Harness, sampler: &str, client: u64, cursor: u64, rest: Value) -> Answer {
    let mut body = json!({"prev_cursor": cursor, "target": {"type": "sampling_session",
        "sampling_session_id": sampler, "cloned_sampler_id": client}});
    body.as_object_mut()
        .unwrap()
        .extend(rest.as_object().unwrap().clone());
    server.post("/retrieve_futures", body).await
}

/// Ids with states, and the cursor.
fn read(answer: &Answer) -> (Vec<(String, String)>, u64) {
    let answer = answer.json();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    let rows = answer["completions"].as_array().unwrap();
    let mut found: Vec<_> = rows
        .iter()
        .map(|row| (text(row, "request_id"), text(row, "state")))
        .collect();
    found.sort();
    (found, answer["cursor"].as_u64().unwrap())
}

fn row(id: &str, state: &str) -> (String, String) {
    (id.to_owned(), state.to_owned())
}

/// Asks until `n` samples are done.
async fn until(
    server: &Harness,
    sampler: &str,
    client: u64,
    n: usize,
) -> (Vec<(String, String)>, u64) {
    loop {
        let found = read(&ask(server, sampler, client, 0, json!({})).await);
        if found.0.len() >= n {
            return found;
        }
    }
}

#[tokio::test]
async fn one_poll_tells_of_every_sample_of_its_client_and_of_no_other() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let name = sampler(&server).await;
    let good = submit(&server, &name, 0, 3).await;
    let bad = submit(&server, &name, 1, 0).await;
    let other = submit(&server, &name, 4_000_000_001, 3).await;

    let (found, cursor) = until(&server, &name, 0, 2).await;
    let of_other = until(&server, &name, 4, 1).await.0;

    assert_eq!(found, [row(&good, "finished"), row(&bad, "failed")]);
    assert_eq!(of_other, [row(&other, "finished")]);
    assert_eq!(server.samples(&good).await.sequences[0].tokens.len(), 3);
    let none = ask(&server, &name, 0, cursor, json!({"timeout": 0})).await;
    assert_eq!(read(&none), (Vec::new(), cursor));
}

#[tokio::test]
async fn a_restart_announces_again_what_may_not_have_been_fetched() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let name = sampler(&server).await;
    let first = submit(&server, &name, 0, 2).await;
    let (_, cursor) = until(&server, &name, 0, 1).await;
    let copy = image(home.path());
    drop(server);

    let again = Harness::open(copy.path());
    let second = submit(&again, &name, 1, 2).await;
    again.samples(&second).await;
    let answer = ask(&again, &name, 0, cursor, json!({"timeout": 0})).await;

    let (found, next) = read(&answer);
    // The second one was fetched.
    assert_eq!(found, [row(&first, "finished")]);
    assert!(next > cursor);
    let fetched = json!({"timeout": 0, "retrieved_request_ids": [first]});
    assert_eq!(read(&ask(&again, &name, 0, cursor, fetched).await).0, []);
}

#[tokio::test]
async fn polls_that_make_no_sense_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let name = sampler(&server).await;

    let unknown = ask(&server, "nobody:sample:0", 0, 0, json!({})).await;
    let negative = ask(&server, &name, 0, 0, json!({"timeout": -1})).await;

    assert_eq!(unknown.status, 404);
    assert!(unknown.detail().contains("nobody:sample:0"));
    assert_eq!(negative.status, 400);
    assert!(negative.detail().contains("timeout -1"));
}

#[tokio::test]
async fn every_client_that_joins_has_another_number_even_after_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let name = sampler(&server).await;
    let body = || json!({"sampling_session_id": name});
    let mut numbers = Vec::new();
    for _ in 0..2 {
        let joined = server.post("/join_sampling_session", body()).await.json();
        numbers.push(joined["client_counter"].as_u64().unwrap());
    }
    drop(server);

    let again = Harness::open(home.path());
    let joined = again.post("/join_sampling_session", body()).await.json();
    numbers.push(joined["client_counter"].as_u64().unwrap());

    assert_eq!(numbers, [1, 2, 3]);
    let unknown = json!({"sampling_session_id": "nobody:sample:0"});
    assert_eq!(
        again.post("/join_sampling_session", unknown).await.status,
        404
    );
}

#[tokio::test]
async fn a_cancelled_sample_ends_before_its_time_and_is_told_as_failed() {
    let home = tempfile::tempdir().unwrap();
    // The real engine draws slowly enough that the sample cannot be over by then.
    let server = Harness::with(AppOptions {
        threads: 2,
        ..AppOptions::new(home.path().to_owned(), ApiToken::new(TOKEN).unwrap())
    });
    let name = sampler(&server).await;
    let body = json!({"sampling_session_id": name, "seq_id": 0, "num_samples": 64,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [3]}]},
        "sampling_params": {"max_tokens": 400, "stop": []}});
    let long = server.submit("/asample", body).await;

    let cancelled = json!({"request_id": long});
    assert_eq!(server.post("/cancel_future", cancelled).await.status, 204);

    let told = until(&server, &name, 0, 1).await.0;
    assert_eq!(told, [row(&long, "failed")]);
    assert!(server.failure(&long).await.contains("cancelled"));
}
