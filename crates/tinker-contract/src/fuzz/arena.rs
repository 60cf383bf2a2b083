//! The server that mutated requests are sent to: no socket, a tiny model, and something of everything.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Method, Request};
use serde_json::{Value, json};
use tempfile::TempDir;
use tinker_server::{ApiToken, App, AppOptions, Limits, router};
use tower::ServiceExt as _;

use super::mutate::Mutated;
use crate::target::tiny_model;

const KEY: &str = "tml-fuzz";
/// The most of an answer that is read: streams and archives are longer than is of interest.
const MAX_ANSWER: usize = 64 << 20;

/// A server with a session, a trained run, a sampler, checkpoints of every kind and an upload.
pub(super) struct Arena {
    app: Arc<App>,
    router: Router,
    home: TempDir,
    /// Names of the recording, and what stands for them here.
    pub(super) names: Vec<(String, String)>,
    /// Number of the run's next operation.
    pub(super) next_seq: u64,
    /// Signed addresses, by their file.
    pub(super) links: Vec<(String, String)>,
    /// The files of an export.
    pub(super) files: Vec<(String, Vec<u8>)>,
}

/// What came back.
pub(super) struct Answer {
    pub(super) status: u16,
    is_poll: bool,
    body: Vec<u8>,
}

impl Answer {
    /// Whether no request should be answered so, however bad it is.
    pub(super) fn is_fault(&self) -> bool {
        match self.status {
            408 => !self.is_poll,
            409 | 500.. => true,
            400..500 => self.body.is_empty(),
            // A future whose operation broke the engine.
            _ => self.text().contains("the engine failed"),
        }
    }

    pub(super) fn text(&self) -> String {
        let end = self.body.len().min(2000);
        String::from_utf8_lossy(&self.body[..end]).into_owned()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

impl Arena {
    /// Starts a server on an empty directory and puts something of everything into it.
    pub(super) async fn open() -> Self {
        let home = TempDir::new().expect("a temporary directory");
        let model = tiny_model(&home.path().join("model"));
        let token = ApiToken::new(KEY).expect("a key");
        let options = AppOptions {
            models: vec![model.clone()],
            threads: 1,
            limits: Limits {
                poll_hold: Duration::from_millis(20),
                max_body_bytes: 16 << 20,
                ..Limits::default()
            },
            ..AppOptions::new(home.path().to_owned(), token)
        };
        let app = Arc::new(App::open(options).expect("a server"));
        let mut arena = Self {
            router: router(Arc::clone(&app)),
            app,
            home,
            names: vec![("Qwen/Qwen3-8B".to_owned(), model.display().to_string())],
            next_seq: 1,
            links: Vec::new(),
            files: Vec::new(),
        };
        arena.furnish().await;
        arena
    }

    /// Ends the server; what it still computes is given up.
    pub(super) async fn close(self) {
        let app = self.app;
        drop(self.router);
        let stopped = tokio::task::spawn_blocking(move || app.stop()).await;
        stopped.expect("an end").expect("an orderly end");
    }

    async fn furnish(&mut self) {
        let session = json!({"sdk_version": "0.38.0", "tags": [], "user_metadata": {}});
        let session = self.call("create_session", &session).await["session_id"].clone();
        let session = session.as_str().expect("a session").to_owned();
        self.names.push(("S1".to_owned(), session.clone()));
        let model = self.names[0].1.clone();
        let created = json!({
            "session_id": session, "model_seq_id": 0, "base_model": model,
            "lora_config": {"rank": 4, "seed": 3},
        });
        self.call("create_model", &created).await;
        let run = format!("{session}:train:0");
        for (route, path) in [
            ("save_weights", "0001"),
            ("save_weights_for_sampler", "s1"),
            ("save_weights_external", "x1"),
        ] {
            let saved = json!({"model_id": run, "path": path, "seq_id": self.next_seq});
            self.next_seq += 1;
            self.call(route, &saved).await;
        }
        self.settle(self.next_seq - 1).await;
        let sampler = json!({
            "session_id": session, "sampling_session_seq_id": 0, "base_model": model,
        });
        self.call("create_sampling_session", &sampler).await;
        let upload = json!({
            "base_model": model, "lora_config": {"rank": 4, "seed": 3},
        });
        let upload = self.call("external_weights_upload_start", &upload).await;
        for (file, link) in upload["urls"].as_object().into_iter().flatten() {
            self.links
                .push((file.clone(), link.as_str().unwrap_or_default().to_owned()));
        }
        assert_eq!(self.links.len(), 2, "a link for each file: {upload}");
        let id = upload["upload_id"].as_str().expect("an upload");
        self.names.push(("UPLOAD".to_owned(), id.to_owned()));
        self.files = export_files(self.home.path());
    }

    /// Waits for the run's operation of a number.
    async fn settle(&self, seq: u64) {
        let run = format!("{}:train:0", self.names[1].1);
        let poll = json!({"request_id": format!("{run}:op:{seq}")});
        let begun = std::time::Instant::now();
        while self.call("retrieve_future", &poll).await["type"] == "try_again" {
            assert!(begun.elapsed() < super::PATIENCE, "the engine hangs");
        }
    }

    async fn call(&self, route: &str, body: &Value) -> Value {
        let request = request(Method::POST, &format!("/api/v1/{route}"))
            .body(Body::from(body.to_string()))
            .expect("a request");
        let answer = self.answer(request).await;
        // A poll is answered by 408 where there is no result yet.
        let is_well = answer.status == 200 || answer.is_poll && answer.status == 408;
        assert!(is_well, "{route}: {} {}", answer.status, answer.json());
        answer.json()
    }

    /// Sends what is a request at all.
    pub(super) async fn send(&mut self, mutated: Mutated) -> Option<Answer> {
        let method = Method::from_bytes(mutated.method.as_bytes()).ok()?;
        let mut builder = request(method, &mutated.target);
        for (name, value) in &mutated.headers {
            builder = builder.header(name, value);
        }
        let request = builder.body(Body::from(mutated.body)).ok()?;
        let answer = self.answer(request).await;
        // Only what was accepted has taken the number.
        let id = answer.json()["request_id"].as_str().map(str::to_owned);
        if answer.status == 200
            && id.is_some_and(|id| id.ends_with(&format!(":op:{}", self.next_seq)))
        {
            self.next_seq += 1;
        }
        Some(answer)
    }

    async fn answer(&self, request: Request<Body>) -> Answer {
        let is_poll = request.uri().path().contains("retrieve_future");
        // A panic of a handler is seen by the hook, and ends its task alone.
        let router = self.router.clone();
        let answered = tokio::spawn(async move {
            let response = router.oneshot(request).await.expect("never fails");
            let status = response.status().as_u16();
            let body = to_bytes(response.into_body(), MAX_ANSWER).await;
            (status, body.map(|bytes| bytes.to_vec()).unwrap_or_default())
        });
        let (status, body) = answered.await.unwrap_or((500, Vec::new()));
        Answer {
            status,
            is_poll,
            body,
        }
    }
}

fn request(method: Method, target: &str) -> axum::http::request::Builder {
    Request::builder()
        .method(method)
        .uri(target)
        .header("host", "127.0.0.1")
        .header("x-api-key", KEY)
}

/// What an export consists of, as files to bring in again.
fn export_files(home: &std::path::Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut dirs = vec![home.join("server/checkpoints")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.display().to_string().contains("/external_weights/") {
                let name = entry.file_name().to_string_lossy().into_owned();
                found.push((name, fs::read(&path).expect("a readable file")));
            }
        }
    }
    found.sort();
    found
}
