//! What the server says about itself: health, counters and the access log.

use std::io;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use serde_json::json;
use tinker_server::{ACCESS_LOG, AppOptions, KeyLimits, Limits, Loader, Scope, add_key};
use tracing_subscriber::EnvFilter;

use crate::fake::{Faults, load_with};
use crate::harness::{Harness, TOKEN, create_body, options};

/// Trains on three tokens, fails once, and draws two samples of two tokens from five.
async fn used(server: &Harness) -> String {
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let id = server.forward_backward(&run, 1, &[1, 2, 3]).await;
    server.output(&id).await;
    let body = json!({"model_id": run, "seq_id": 2, "adam_params": {"learning_rate": -1.0}});
    let id = server.submit("/optim_step", body).await;
    server.failure(&id).await;
    let body =
        json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinker/nano"});
    server.post("/create_sampling_session", body).await;
    let body = json!({"sampling_session_id": format!("{session}:sample:0"), "seq_id": 0,
        "num_samples": 2, "sampling_params": {"max_tokens": 2, "stop": []},
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3, 4, 5]}]}});
    let id = server.submit("/asample", body).await;
    server.samples(&id).await;
    session
}

#[tokio::test]
async fn weights_of_samplers_stay_loaded_by_the_memory_they_take() {
    let home = tempfile::tempdir().unwrap();
    // Two of them are above the limit, though their files are small.
    let large = Faults {
        adapter_bytes: 300 << 20,
        ..Faults::default()
    };
    let server = Harness::with(AppOptions {
        loader: load_with(large),
        ..options(home.path())
    });
    let session = server.session().await;
    for number in 0..3 {
        let run = server.run(&session, number).await;
        let body = json!({"model_id": run, "seq_id": 1, "sampling_session_seq_id": number});
        let id = server.submit("/save_weights_for_sampler", body).await;
        server.result(&id).await;
    }

    let page = server.metrics().await;

    let line = "tinker_adapters{use=\"sampling\"} 1";
    assert!(page.lines().any(|l| l == line), "{page}");
}

#[tokio::test]
async fn what_was_done_is_counted() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    used(&server).await;

    let page = server.metrics().await;

    for line in [
        "tinker_tokens_total{kind=\"trained\"} 3",
        "tinker_tokens_total{kind=\"prompt\"} 5",
        "tinker_tokens_total{kind=\"sampled\"} 4",
        "tinker_operations_total{type=\"forward_backward\",outcome=\"ok\"} 1",
        "tinker_operations_total{type=\"optim_step\",outcome=\"user_error\"} 1",
        "tinker_operations_total{type=\"sample\",outcome=\"ok\"} 1",
        "tinker_operation_seconds_count{type=\"sample\"} 1",
        "tinker_http_requests_total{route=\"/api/v1/asample\",status=\"200\"} 1",
        "tinker_http_request_seconds_count{route=\"/api/v1/asample\"} 1",
        "tinker_base_models 1",
        "tinker_adapters{use=\"training\"} 1",
    ] {
        assert!(page.lines().any(|l| l == line), "{line}\n{page}");
    }
    assert!(!page.contains("tinker_queue_length{"), "nothing is pending");
}

#[tokio::test]
async fn what_waits_is_a_queue() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;

    // Operation 1 is missing.
    server.optim_step(&run, 2).await;

    let page = server.metrics().await;
    let line = "tinker_queue_length{type=\"optim_step\",state=\"waiting\"} 1";
    assert!(page.contains(line), "{page}");
    let summary = server.app.observer().summary();
    assert_eq!((summary.n_waiting, summary.n_running), (1, 0));
}

#[tokio::test]
async fn counters_have_no_labels_that_requests_choose() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = used(&server).await;
    for path in ["/nothing-here-1", "/nothing-here-2", "/sessions/s-unknown"] {
        server.get(path).await;
    }

    let page = server.metrics().await;

    for text in ["nothing-here", "s-unknown", TOKEN, &session] {
        assert!(!page.contains(text), "{text}");
    }
    assert!(page.contains("tinker_http_requests_total{route=\"none\",status=\"404\"} 2"));
}

#[tokio::test]
async fn counters_need_the_key() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let request = Request::get("/metrics").header("host", "127.0.0.1");

    let refused = server.send(request.body(Body::empty()).unwrap()).await;

    assert_eq!(refused.status, 401);
    let line = "tinker_http_requests_total{route=\"/metrics\",status=\"401\"} 1";
    assert!(server.metrics().await.contains(line));
}

#[tokio::test]
async fn a_server_that_stops_says_so_to_those_who_ask_for_its_health() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    assert_eq!(
        server.get("/healthz").await.json(),
        json!({"status": "ok"}),
        "the only answer that clients take"
    );

    server.app.stop().unwrap();

    let answer = server.get("/healthz").await;
    assert_eq!(answer.status, 503);
    assert!(answer.detail().contains("stopping"));
}

#[tokio::test]
async fn what_waits_for_its_turn_is_told_so() {
    let home = tempfile::tempdir().unwrap();
    let (open, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let usual = options(home.path());
    let server = Harness::with(AppOptions {
        limits: Limits {
            poll_hold: Duration::from_millis(5),
            ..usual.limits
        },
        // Nothing is done until the base model is there.
        loader: Loader::new(move |dir, threads| {
            // An error opens it too: the test has ended.
            let _ = gate.lock().unwrap().recv();
            crate::fake::load(dir, threads)
        }),
        ..usual
    });
    let session = server.session().await;
    let running = server
        .submit("/create_model", create_body(&session, 0))
        .await;
    while server.app.observer().summary().n_running == 0 {
        server.poll(&running).await;
    }
    let waiting = server
        .submit("/create_model", create_body(&session, 1))
        .await;

    let told = server.poll(&waiting).await;
    let of_running = server.poll(&running).await.json();
    drop(open);

    assert_eq!(told.status, 408);
    assert_eq!(told.json()["queue_state"], "paused_capacity");
    let reason = "it has its turn when what runs now has ended";
    assert_eq!(told.json()["queue_state_reason"], reason);
    assert_eq!(of_running["queue_state"], "active");
    server.result(&waiting).await;
}

/// Log lines, kept.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl io::Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn the_access_log_has_requests_and_no_secrets() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let kept = Kept::default();
    let writer = kept.clone();
    let logging = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(format!("{ACCESS_LOG}=debug")))
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .finish();
    let _guard = tracing::subscriber::set_default(logging);

    server.get("/training_runs?key=tml-in-query").await;
    let name = "ann".parse().unwrap();
    let scopes = [Scope::Read].into();
    let key = add_key(home.path(), name, scopes, KeyLimits::default()).unwrap();
    let of_ann = Request::get("/api/v1/sessions")
        .header("host", "127.0.0.1")
        .header("x-api-key", key.expose());
    server.send(of_ann.body(Body::empty()).unwrap()).await;
    server
        .follow("/signed/files/r/weights/n/f?sig=tml-signature", &[])
        .await;

    let log = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 3, "{log}");
    let parts = [
        "key=\"own\"",
        "GET",
        "/api/v1/training_runs",
        "status=200",
        "duration_ms=",
    ];
    for part in parts {
        assert!(lines[0].contains(part), "{log}");
    }
    assert!(lines[1].contains("key=\"ann\""), "{log}");
    assert!(
        lines[2].contains("key=\"-\"") && lines[2].contains("status=403"),
        "{log}"
    );
    assert!(!log.contains("tml-"), "{log}");
}
