//! Work that there is no memory for: refused before it begins, with what it takes and what to do.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tinker_server::{AppOptions, Limits, Loader, Memory};

use crate::fake::{Faults, load_with};
use crate::harness::{Harness, create_body, datum, fb, options};

const MB: u64 = 1 << 20;

/// A server whose machine has as much memory as is said at the time.
fn open(home: &Path, free: &Arc<AtomicU64>, model: u64, work: [u64; 3]) -> Harness {
    let faults = Faults {
        work_bytes: work,
        ..Faults::default()
    };
    open_with(home, free, model, faults)
}

fn open_with(home: &Path, free: &Arc<AtomicU64>, model: u64, faults: Faults) -> Harness {
    let free = Arc::clone(free);
    let faults = Faults {
        adapter_bytes: MB as usize,
        ..faults
    };
    Harness::with(AppOptions {
        loader: Loader {
            estimate: Arc::new(move |_| Ok(model)),
            ..load_with(faults)
        },
        memory: Memory::told_by(move || Some(free.load(Ordering::SeqCst))),
        limits: Limits {
            poll_hold: Duration::from_millis(10),
            fault_pause: Duration::ZERO,
            snapshot_every: 3,
            ..Limits::default()
        },
        ..options(home)
    })
}

/// A server with 4 MB, whose samples can be as long as they like.
fn open_endless(home: &Path, work: [u64; 3]) -> Harness {
    let faults = Faults {
        work_bytes: work,
        context: Some(1 << 30),
        ..Faults::default()
    };
    open_with(home, &free(4 * MB), 0, faults)
}

/// A sampler of the base model.
async fn sampler(server: &Harness, session: &str) -> String {
    let body =
        json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinker/nano"});
    server.post("/create_sampling_session", body).await;
    format!("{session}:sample:0")
}

/// Asks for so many tokens.
async fn draw(server: &Harness, sampler: &str, seq: u64, max_tokens: u64) -> String {
    let body = json!({"sampling_session_id": sampler, "seq_id": seq,
        "sampling_params": {"max_tokens": max_tokens, "stop": []},
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}});
    server.submit("/asample", body).await
}

/// A sample that does not end by itself.
const ENDLESS: u64 = 1 << 20;

async fn cancel(server: &Harness, id: &str) {
    let answer = server.post("/cancel_future", json!({"request_id": id}));
    assert_eq!(answer.await.status, 204);
}

/// Memory that is promised, once the engine has done what it was at.
async fn promised(server: &Harness) -> f64 {
    server.app.tidy_up();
    let page = server.metrics().await;
    let mut lines = page.lines();
    let value = lines.find_map(|l| l.strip_prefix("tinker_promised_memory_bytes "));
    value.unwrap().parse().unwrap()
}

/// What a sampler of these weights draws.
async fn sample_of(server: &Harness, session: &str, number: u64, path: &Value) -> String {
    let body =
        json!({"session_id": session, "sampling_session_seq_id": number, "model_path": path});
    server.post("/create_sampling_session", body).await;
    let body = json!({"sampling_session_id": format!("{session}:sample:{number}"), "seq_id": 0,
        "sampling_params": {"max_tokens": 2, "stop": []},
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}});
    server.submit("/asample", body).await
}

#[tokio::test]
async fn weights_to_sample_from_take_less_than_an_adapter_and_the_place_of_others() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(10 * MB));
    let server = open(home.path(), &free, 0, [5 * MB, 0, 0]);
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let mut paths = Vec::new();
    for (seq, name) in [(1, "a"), (2, "b")] {
        let body = json!({"model_id": run, "seq_id": seq, "path": name});
        let id = server.submit("/save_weights_for_sampler", body).await;
        paths.push(server.result(&id).await.json()["path"].clone());
    }
    drop(server);
    let server = open(home.path(), &free, 0, [5 * MB, 0, 0]);

    free.store(2 * MB - 1, Ordering::SeqCst);
    let refused = sample_of(&server, &session, 0, &paths[0]).await;
    let why = server.failure(&refused).await;
    free.store(2 * MB, Ordering::SeqCst);
    let taken = sample_of(&server, &session, 1, &paths[0]).await;
    server.samples(&taken).await;
    free.store(MB, Ordering::SeqCst);
    let other = sample_of(&server, &session, 2, &paths[1]).await;
    server.samples(&other).await;

    assert!(
        why.starts_with("sampling from weights of rank 2 would take about 2.0 MB"),
        "{why}"
    );
}

fn free(bytes: u64) -> Arc<AtomicU64> {
    Arc::new(AtomicU64::new(bytes))
}

#[tokio::test]
async fn a_base_model_that_does_not_fit_is_refused_and_taken_once_it_does() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(4 * MB));
    let server = open(home.path(), &free, 5 * MB, [0; 3]);
    let session = server.session().await;

    let id = server
        .submit("/create_model", create_body(&session, 0))
        .await;
    let why = server.failure(&id).await;
    assert!(
        why.starts_with(
            "base model tinker/nano would take about 5.0 MB of memory, and 4.0 MB are available"
        ),
        "{why}"
    );
    assert!(why.contains("--weights int8 or nf4"), "{why}");
    let body =
        json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinker/nano"});
    server.post("/create_sampling_session", body).await;
    let sample = |seq: u64| {
        let body = json!({"sampling_session_id": format!("{session}:sample:0"), "seq_id": seq,
            "sampling_params": {"max_tokens": 2, "stop": []},
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}});
        server.submit("/asample", body)
    };
    let why = server.failure(&sample(0).await).await;
    assert!(
        why.starts_with("base model tinker/nano would take"),
        "{why}"
    );

    free.store(5 * MB, Ordering::SeqCst);

    server.run(&session, 1).await;
    server.samples(&sample(1).await).await;
}

#[tokio::test]
async fn an_adapter_that_does_not_fit_is_refused_and_another_run_is_made_later() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(MB));
    let server = open(home.path(), &free, 0, [2 * MB, 0, 0]);
    let session = server.session().await;

    let id = server
        .submit("/create_model", create_body(&session, 0))
        .await;
    let why = server.failure(&id).await;
    assert!(
        why.starts_with("an adapter of rank 2 with its optimizer would take about 2.0 MB"),
        "{why}"
    );
    assert!(why.contains("lower rank"), "{why}");
    let step = server.optim_step(&format!("{session}:train:0"), 1).await;
    assert!(server.failure(&step).await.contains("an adapter of rank 2"));

    free.store(2 * MB, Ordering::SeqCst);

    server.run(&session, 1).await;
}

#[tokio::test]
async fn a_pass_that_does_not_fit_is_refused_and_changes_nothing() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(10 * MB));
    let server = open(home.path(), &free, 0, [0, 20 * MB, 0]);
    let session = server.session().await;
    let (run, other) = (server.run(&session, 0).await, server.run(&session, 1).await);

    let refused = server.forward_backward(&run, 1, &[1, 2, 3]).await;
    let why = server.failure(&refused).await;
    assert!(
        why.starts_with(
            "a pass over 1 sequences, the longest of 3 tokens, would take about 20.0 MB"
        ),
        "{why}"
    );
    assert!(
        why.contains("--training-memory") && why.contains("shorter"),
        "{why}"
    );

    free.store(20 * MB, Ordering::SeqCst);
    let mut steps = Vec::new();
    for (run, seq) in [(&run, 2), (&other, 1)] {
        let pass = server.forward_backward(run, seq, &[1, 2, 3]).await;
        server.output(&pass).await;
        let step = server.optim_step(run, seq + 1).await;
        steps.push(server.result(&step).await.json()["metrics"].clone());
    }

    assert_eq!(steps[0], steps[1], "the refused pass left something behind");
}

/// Polls until the operation is held back for want of memory for `what`.
async fn held_back(server: &Harness, id: &str, what: &str) {
    told(server, id, &format!("{what} would take about")).await;
}

/// Polls until an operation that waits for memory is told so.
async fn told(server: &Harness, id: &str, why: &str) {
    loop {
        let answer = server.poll(id).await;
        assert_eq!(answer.status, 408, "{:?}", answer.json());
        let body = answer.json();
        let reason = body["queue_state_reason"].as_str().unwrap_or_default();
        if reason.contains(why) {
            assert_eq!(body["queue_state"], "paused_capacity");
            return;
        }
    }
}

/// Makes a run and takes a step.
async fn stepped(server: &Harness, session: &str, number: u64) -> String {
    let run = server.run(session, number).await;
    let pass = server.forward_backward(&run, 1, &[1, 2, 3]).await;
    server.output(&pass).await;
    let step = server.optim_step(&run, 2).await;
    server.result(&step).await;
    run
}

#[tokio::test]
async fn operations_wait_for_the_memory_that_their_run_takes_when_it_comes_back() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(10 * MB));
    let server = open(home.path(), &free, MB, [4 * MB, 0, 0]);
    let session = server.session().await;
    let run = stepped(&server, &session, 0).await;
    let other = stepped(&server, &session, 1).await;
    drop(server);

    free.store(0, Ordering::SeqCst);
    let server = open(home.path(), &free, MB, [4 * MB, 0, 0]);
    let mut steps = Vec::new();
    for run in [&run, &other] {
        let pass = server.forward_backward(run, 3, &[3, 2, 1]).await;
        let step = server.optim_step(run, 4).await;
        if steps.is_empty() {
            held_back(&server, &pass, "base model tinker/nano").await;
            free.store(2 * MB, Ordering::SeqCst);
            held_back(&server, &pass, "an adapter of rank 2 with its optimizer").await;
            free.store(10 * MB, Ordering::SeqCst);
        }
        server.output(&pass).await;
        steps.push(server.result(&step).await.json()["metrics"].clone());
    }

    assert_eq!(steps[0]["step"], 2.0);
    assert_eq!(steps[0], steps[1], "an operation was lost");
}

#[tokio::test]
async fn a_young_run_that_is_made_again_waits_for_memory_too() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(10 * MB));
    let server = open(home.path(), &free, 0, [4 * MB, 0, 0]);
    let run = server.run(&server.session().await, 0).await;
    // There is no snapshot yet.
    let pass = server.forward_backward(&run, 1, &[1, 2, 3]).await;
    server.output(&pass).await;
    drop(server);

    free.store(0, Ordering::SeqCst);
    let server = open(home.path(), &free, 0, [4 * MB, 0, 0]);
    let step = server.optim_step(&run, 2).await;
    held_back(&server, &step, "an adapter of rank 2 with its optimizer").await;
    free.store(10 * MB, Ordering::SeqCst);

    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn a_pass_that_was_done_is_repeated_whatever_it_takes() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(20 * MB));
    let server = open(home.path(), &free, 0, [0, 20 * MB, 0]);
    let run = server.run(&server.session().await, 0).await;
    let pass = server.forward_backward(&run, 1, &[1, 2, 3]).await;
    server.output(&pass).await;
    drop(server);

    free.store(10 * MB, Ordering::SeqCst);
    let server = open(home.path(), &free, 0, [0, 20 * MB, 0]);
    let step = server.optim_step(&run, 2).await;

    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn samples_that_do_not_fit_are_refused_alone() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(MB));
    let server = open(home.path(), &free, 0, [0, 0, 3 * MB]);
    let session = server.session().await;
    let body =
        json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinker/nano"});
    server.post("/create_sampling_session", body).await;
    let body = json!({"sampling_session_id": format!("{session}:sample:0"), "seq_id": 0, "num_samples": 100,
        "sampling_params": {"max_tokens": 5, "stop": []},
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}});

    let id = server.submit("/asample", body).await;

    let why = server.failure(&id).await;
    let start = "64 samples of 5 tokens after a prompt of 3 would take about 3.0 MB of memory, and 1.0 MB are available";
    assert!(why.starts_with(start), "{why}");
}

#[tokio::test]
async fn a_real_model_is_measured_before_it_is_loaded() {
    let home = tempfile::tempdir().unwrap();
    let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/numerics/llama");
    let model = model.canonicalize().unwrap();
    let defaults = AppOptions::new(home.path().to_owned(), options(home.path()).token);
    let server = Harness::with(AppOptions {
        models: vec![model.clone()],
        memory: Memory::told_by(|| Some(100_000)),
        ..defaults
    });
    let mut body = create_body(&server.session().await, 0);
    body["base_model"] = json!(model.display().to_string());

    let id = server.submit("/create_model", body).await;

    let why = server.failure(&id).await;
    assert!(why.contains("and 0.1 MB are available"), "{why}");
}

#[tokio::test]
async fn samples_wait_for_the_memory_that_others_were_promised() {
    let home = tempfile::tempdir().unwrap();
    let server = open_endless(home.path(), [0, 0, 3 * MB]);
    let sessions = [server.session().await, server.session().await];
    let samplers = [
        sampler(&server, &sessions[0]).await,
        sampler(&server, &sessions[1]).await,
    ];

    let endless = draw(&server, &samplers[0], 0, ENDLESS).await;
    let second = draw(&server, &samplers[0], 1, 2).await;
    let third = draw(&server, &samplers[1], 0, 2).await;
    let why = "1 samples of 2 tokens after a prompt of 1 would take about 3.0 MB of memory, and 1.0 MB are neither taken nor promised";
    told(&server, &second, why).await;
    told(&server, &third, "samples that came before wait for memory").await;
    assert_eq!(promised(&server).await, (3 * MB) as f64);
    cancel(&server, &endless).await;

    server.samples(&second).await;
    server.samples(&third).await;
    assert_eq!(promised(&server).await, 0.0);
}

#[tokio::test]
async fn a_sample_that_waits_for_memory_outlives_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let server = open_endless(home.path(), [0, 0, 3 * MB]);
    let sampler = sampler(&server, &server.session().await).await;
    let endless = draw(&server, &sampler, 0, ENDLESS).await;
    let second = draw(&server, &sampler, 1, 2).await;
    let what = "1 samples of 2 tokens after a prompt of 1";
    held_back(&server, &second, what).await;
    drop(server);

    let server = open_endless(home.path(), [0, 0, 3 * MB]);
    held_back(&server, &second, what).await;
    cancel(&server, &endless).await;

    server.samples(&second).await;
}

#[tokio::test]
async fn many_samples_that_fit_one_by_one_are_all_drawn() {
    let home = tempfile::tempdir().unwrap();
    let server = open_endless(home.path(), [0, 0, 3 * MB / 2]);
    let sampler = sampler(&server, &server.session().await).await;

    let mut ids = Vec::new();
    for seq in 0..64 {
        ids.push(draw(&server, &sampler, seq, 5).await);
    }

    for id in &ids {
        server.samples(id).await;
    }
    assert_eq!(promised(&server).await, 0.0);
}

#[tokio::test]
async fn a_sample_that_is_given_up_while_it_waits_holds_up_nobody() {
    let home = tempfile::tempdir().unwrap();
    let server = open_endless(home.path(), [0, 0, 3 * MB]);
    let sampler = sampler(&server, &server.session().await).await;
    let endless = draw(&server, &sampler, 0, ENDLESS).await;
    let [second, third, fourth] = [
        draw(&server, &sampler, 1, ENDLESS).await,
        draw(&server, &sampler, 2, ENDLESS).await,
        draw(&server, &sampler, 3, 2).await,
    ];
    held_back(
        &server,
        &second,
        "1 samples of 1048576 tokens after a prompt of 1",
    )
    .await;

    for id in [&third, &second, &endless] {
        cancel(&server, id).await;
        assert_eq!(server.failure(id).await, "the sample was cancelled");
    }

    server.samples(&fourth).await;
}

#[tokio::test]
async fn operations_wait_for_samples_and_come_before_later_ones() {
    let home = tempfile::tempdir().unwrap();
    let server = open_endless(home.path(), [2 * MB, 2 * MB, MB]);
    let session = server.session().await;
    let sampler = sampler(&server, &session).await;
    let mut endless = Vec::new();
    for seq in 0..3 {
        endless.push(draw(&server, &sampler, seq, ENDLESS).await);
    }
    let created = server
        .submit("/create_model", create_body(&session, 0))
        .await;
    held_back(&server, &created, "an adapter of rank 2 with its optimizer").await;

    // There would be room for one more.
    let later = draw(&server, &sampler, 3, 2).await;
    held_back(&server, &later, "1 samples of 2 tokens after a prompt of 1").await;
    cancel(&server, &endless[0]).await;
    let run = server.result(&created).await.json()["model_id"].clone();
    let run = run.as_str().unwrap();
    server.samples(&later).await;

    let pass = server.forward_backward(run, 1, &[1, 2, 3]).await;
    held_back(
        &server,
        &pass,
        "a pass over 1 sequences, the longest of 3 tokens,",
    )
    .await;
    cancel(&server, &endless[1]).await;
    server.output(&pass).await;
    cancel(&server, &endless[2]).await;
}

#[tokio::test]
async fn what_an_adapter_is_to_grow_by_is_promised_when_it_is_made() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(5 * MB));
    let server = open(home.path(), &free, 0, [3 * MB, 0, 0]);
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    server.run(&session, 1).await;

    // Each has taken one of the three that it is going to.
    let id = server
        .submit("/create_model", create_body(&session, 2))
        .await;
    let why = server.failure(&id).await;
    let start = "an adapter of rank 2 with its optimizer would take about 3.0 MB of memory, and 1.0 MB are available";
    assert!(why.starts_with(start), "{why}");
    let unloaded = server
        .submit("/unload_model", json!({"model_id": run}))
        .await;
    server.result(&unloaded).await;

    server.run(&session, 3).await;
    assert_eq!(promised(&server).await, (6 * MB) as f64);
}

#[tokio::test]
async fn a_pass_without_gradient_is_measured_too() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(10 * MB));
    let faults = Faults {
        forward_bytes: 20 * MB,
        ..Faults::default()
    };
    let server = open_with(home.path(), &free, 0, faults);
    let run = server.run(&server.session().await, 0).await;
    let mut request = fb(&run, 1, vec![datum(&[1, 2, 3])]);
    request.forward_only = true;

    let id = server.post_proto(&request).await.json()["request_id"].clone();
    let why = server.failure(id.as_str().unwrap()).await;

    let start = "a pass over 1 sequences, the longest of 3 tokens, would take about 20.0 MB";
    assert!(why.starts_with(start), "{why}");
    assert!(!why.contains("--training-memory"), "{why}");
    let trained = server.forward_backward(&run, 2, &[1, 2, 3]).await;
    server.output(&trained).await;
}

#[tokio::test]
async fn memory_is_given_back_where_an_operation_fails() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(10 * MB));
    let faults = Faults {
        refused: Some(vec![1, 2, 3]),
        work_bytes: [0, 10 * MB, 0],
        ..Faults::default()
    };
    let server = open_with(home.path(), &free, 0, faults);
    let run = server.run(&server.session().await, 0).await;

    let refused = server.forward_backward(&run, 1, &[1, 2, 3]).await;
    server.failure(&refused).await;
    let taken = server.forward_backward(&run, 2, &[3, 2, 1]).await;
    server.output(&taken).await;

    assert_eq!(promised(&server).await, 0.0);
}

#[tokio::test]
async fn cached_prompts_go_before_anybody_waits() {
    let home = tempfile::tempdir().unwrap();
    let faults = Faults {
        work_bytes: [0, 0, 3 * MB],
        // A prompt of a few tokens is not worth keeping.
        slot_bytes: Some(2 * MB as usize),
        ..Faults::default()
    };
    let free = free(4 * MB);
    let server = open_with(home.path(), &free, 0, faults);
    let sampler = sampler(&server, &server.session().await).await;
    let first = draw(&server, &sampler, 0, 30).await;
    server.samples(&first).await;

    free.store(2 * MB, Ordering::SeqCst);
    let second = draw(&server, &sampler, 1, 2).await;

    server.samples(&second).await;
}

#[tokio::test]
async fn a_model_that_the_first_device_does_not_take_is_measured_for_the_second() {
    let (home, free) = (tempfile::tempdir().unwrap(), free(4 * MB));
    let told = Arc::clone(&free);
    let no_gpu = |_: &Path, _| {
        Err(tinker_engine::Error::Device(
            "it has too little memory".into(),
        ))
    };
    let server = Harness::with(AppOptions {
        loader: Loader::new(no_gpu),
        second_loader: Some(Loader {
            estimate: Arc::new(|_| Ok(5 * MB)),
            ..load_with(Faults::default())
        }),
        memory: Memory::told_by(move || Some(told.load(Ordering::SeqCst))),
        ..options(home.path())
    });
    let session = server.session().await;

    let id = server
        .submit("/create_model", create_body(&session, 0))
        .await;
    let why = server.failure(&id).await;
    free.store(5 * MB, Ordering::SeqCst);

    assert!(
        why.starts_with("base model tinker/nano would take about 5.0 MB of memory"),
        "{why}"
    );
    server.run(&session, 1).await;
}
