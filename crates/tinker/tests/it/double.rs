//! A server that says what a test wants it to say, and remembers what it was asked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// A request that came.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// Such as `GET /api/v1/training_runs`.
    pub(crate) route: String,
    pub(crate) headers: HeaderMap,
    /// Null where there was none.
    pub(crate) body: Value,
}

impl Asked {
    /// A header's value, or nothing.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

/// Answers by route; everything else is not there.
pub(crate) type Answers = BTreeMap<&'static str, (u16, String)>;

/// The server; it ends with this value.
pub(crate) struct Double {
    pub(crate) url: String,
    shared: Arc<Shared>,
    _runtime: tokio::runtime::Runtime,
}

struct Shared {
    answers: Answers,
    asked: Mutex<Vec<Asked>>,
}

/// What every client asks first, and an empty list of runs.
pub(crate) fn answers() -> Answers {
    let runs = json!({
        "training_runs": [],
        "cursor": {"offset": 0, "limit": 20, "total_count": 0},
    });
    [
        ("POST /api/v1/client/config", json!({})),
        ("POST /api/v1/client/dynamic_config", json!({})),
        ("GET /api/v1/training_runs", runs),
        (
            "POST /api/v1/create_session",
            json!({"type": "create_session", "session_id": "S1"}),
        ),
    ]
    .map(|(route, answer)| (route, (200, answer.to_string())))
    .into()
}

impl Double {
    pub(crate) fn start(answers: Answers) -> Self {
        let shared = Arc::new(Shared {
            answers,
            asked: Mutex::default(),
        });
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&shared));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listening = tokio::net::TcpListener::bind("127.0.0.1:0");
        let listener = runtime.block_on(listening).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(axum::serve(listener, router).into_future());
        Self {
            url,
            shared,
            _runtime: runtime,
        }
    }

    /// The requests so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// The requests to one route.
    pub(crate) fn asked_for(&self, route: &str) -> Vec<Asked> {
        let all = self.asked().into_iter();
        all.filter(|asked| asked.route == route).collect()
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20)
        .await
        .unwrap_or_else(|_| Bytes::new());
    let route = format!("{} {}", head.method, head.uri.path());
    let (status, text) = match shared.answers.get(route.as_str()) {
        Some((status, text)) => (*status, text.clone()),
        None => (404, r#"{"detail":"Not Found"}"#.to_owned()),
    };
    shared.asked.lock().unwrap().push(Asked {
        route,
        headers: head.headers,
        body: serde_json::from_slice(&body).unwrap_or_default(),
    });
    let status = StatusCode::from_u16(status).unwrap();
    // What a test lets fail is not to be repeated for minutes.
    let headers = [
        (header::CONTENT_TYPE.as_str(), "application/json"),
        ("x-should-retry", "false"),
    ];
    (status, headers, text).into_response()
}
