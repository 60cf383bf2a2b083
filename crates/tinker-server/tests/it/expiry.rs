//! Sessions whose client fell silent: what ends, what stays, and how it comes back.

use std::path::Path;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request};
use serde_json::{Value, json};
use tinker_server::{AppOptions, Clock, KeyLimits, Scope, add_key};

use crate::harness::{Answer, Harness, options};

/// Longer than a client may be silent, and less than what is idle may stay in memory.
const SILENCE: Duration = Duration::from_secs(5 * 60);

fn open(home: &Path, clock: &Clock) -> Harness {
    Harness::with(AppOptions {
        clock: clock.clone(),
        ..options(home)
    })
}

/// Adapters in memory for training and for sampling, after the engine has tidied up.
pub(crate) async fn loaded(server: &Harness) -> (u64, u64) {
    server.app.tidy_up();
    let page = server.metrics().await;
    let of = |kind: &str| {
        let start = format!("tinker_adapters{{use=\"{kind}\"}} ");
        let mut lines = page.lines();
        let n = lines.find_map(|line| line.strip_prefix(&start));
        n.unwrap().parse().unwrap()
    };
    (of("training"), of("sampling"))
}

async fn beat(server: &Harness, session: &str) -> Answer {
    let beat = json!({ "session_id": session });
    server.post("/session_heartbeat", beat).await
}

async fn finish(server: &Harness, session: &str) {
    let how = json!({"reason": {"type": "success"}, "detail": null});
    let path = format!("/sessions/{session}/finish");
    assert_eq!(server.post(&path, how).await.status, 204);
}

/// A sampler without a name of a run's weights, which are loaded; its id.
async fn sampler(server: &Harness, run: &str, seq: u64) -> String {
    let body = json!({"model_id": run, "seq_id": seq, "sampling_session_seq_id": 0});
    let id = server.submit("/save_weights_for_sampler", body).await;
    let saved = server.result(&id).await.json();
    saved["sampling_session_id"].as_str().unwrap().to_owned()
}

async fn drawn(server: &Harness, sampler: &str, seq: u64) -> Vec<u32> {
    let body = json!({"sampling_session_id": sampler, "seq_id": seq,
        "sampling_params": {"max_tokens": 4, "seed": 5, "stop": []},
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}});
    let id = server.submit("/asample", body).await;
    server.samples(&id).await.sequences.remove(0).tokens
}

#[tokio::test]
async fn a_silent_session_leaves_memory_and_comes_back_as_it_was() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let server = open(home.path(), &clock);
    let (silent, alive) = (server.session().await, server.session().await);
    let (run, other) = (server.run(&silent, 0).await, server.run(&alive, 0).await);
    for run in [&run, &other] {
        let id = server.forward_backward(run, 1, &[1, 2, 3]).await;
        server.output(&id).await;
    }
    let sampler = sampler(&server, &run, 2).await;
    let before = drawn(&server, &sampler, 0).await;
    assert_eq!(loaded(&server).await, (2, 1));

    clock.put_forward(SILENCE - Duration::from_secs(60));
    assert_eq!(loaded(&server).await, (2, 1), "it may still be heard of");
    beat(&server, &alive).await;
    clock.put_forward(Duration::from_secs(90));
    assert_eq!(loaded(&server).await, (1, 0));

    // Its gradient was not lost: the step is that of the run that stayed.
    let step = async |id: String| server.result(&id).await.json()["metrics"].clone();
    let back = step(server.optim_step(&run, 3).await).await;
    let stayed = step(server.optim_step(&other, 2).await).await;
    assert_eq!(back, stayed);
    assert!(back["grad_norm"].as_f64().unwrap() > 0.0);
    assert_eq!(drawn(&server, &sampler, 1).await, before);
    assert_eq!(loaded(&server).await, (2, 1));
    assert_eq!(beat(&server, &silent).await.status, 200);
}

#[tokio::test]
async fn what_waits_for_a_silent_session_is_done_before_it_leaves_memory() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let server = open(home.path(), &clock);
    let run = server.run(&server.session().await, 0).await;
    let behind_a_gap = server.optim_step(&run, 2).await;
    clock.put_forward(SILENCE);

    assert_eq!(loaded(&server).await.0, 0, "a gap needs no memory");
    let id = server.optim_step(&run, 1).await;

    for (id, step) in [(id, 1.0), (behind_a_gap, 2.0)] {
        assert_eq!(server.result(&id).await.json()["metrics"]["step"], step);
    }
}

#[tokio::test]
async fn a_session_that_was_ended_leaves_memory_and_takes_heartbeats_only_while_worked_in() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let server = open(home.path(), &clock);
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    finish(&server, &session).await;

    assert_eq!(loaded(&server).await.0, 0);
    let over = beat(&server, &session).await;
    assert_eq!(over.status, 410);
    assert_eq!(over.detail(), format!("session {session} was ended"));

    let step = server.optim_step(&run, 1).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
    assert_eq!(beat(&server, &session).await.status, 200);
    drop(server);

    let server = open(home.path(), &clock);
    assert_eq!(
        beat(&server, &session).await.status,
        200,
        "it was forgotten"
    );
    finish(&server, &session).await;
    assert_eq!(beat(&server, &session).await.status, 410);
}

#[tokio::test]
async fn a_silent_session_counts_against_no_limit_until_it_is_worked_in() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let server = open(home.path(), &clock);
    let limits = KeyLimits {
        sessions: 1,
        ..KeyLimits::default()
    };
    let scopes = [Scope::Read, Scope::Train].into();
    let key = add_key(home.path(), "ann".parse().unwrap(), scopes, limits).unwrap();
    let post = |path: &str, body: Value| {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("/api/v1{path}"))
            .header("host", "127.0.0.1")
            .header("x-api-key", key.expose())
            .header("content-type", "application/json");
        server.send(request.body(Body::from(body.to_string())).unwrap())
    };
    let create = json!({"tags": [], "user_metadata": {}, "sdk_version": "t"});
    let first = post("/create_session", create.clone()).await.json();
    let refused = post("/create_session", create.clone()).await;
    assert_eq!(refused.status, 429);

    clock.put_forward(SILENCE);
    let second = post("/create_session", create).await;
    assert_eq!(second.status, 200);

    let session = first["session_id"].as_str().unwrap();
    let body = crate::harness::create_body(session, 0);
    let worked_in = post("/create_model", body.clone()).await;
    assert_eq!(worked_in.status, 429, "one is open already");
    clock.put_forward(SILENCE);
    assert_eq!(post("/create_model", body).await.status, 200);
}
