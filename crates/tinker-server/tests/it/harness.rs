//! A server without a socket, over the fake backend, and the requests that tests send it.

use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request};
use prost::Message as _;
use serde_json::{Value, json};
use tinker_server::{ApiToken, App, AppOptions, Limits, Loader, router};
use tinker_types::{
    Datum, ForwardBackwardOutput, ForwardBackwardRequest, LossConfig, LossFn, ModelInput,
    SampleResponse, TensorData, proto,
};
use tower::ServiceExt as _;

pub(crate) const TOKEN: &str = "tml-test";
const BASE: &str = "/api/v1";

/// What came back: status and body.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) content_type: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// A header of the answer, empty if it is not there.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    /// The text of a refusal.
    pub(crate) fn detail(&self) -> String {
        self.json()["detail"].as_str().unwrap().to_owned()
    }
}

pub(crate) struct Harness {
    pub(crate) app: Arc<App>,
    router: Router,
}

/// Options over the fake backend, with short polls.
pub(crate) fn options(home: &Path) -> AppOptions {
    AppOptions {
        loader: Loader::new(crate::fake::load),
        limits: Limits {
            poll_hold: std::time::Duration::from_secs(20),
            snapshot_every: 4,
            ..Limits::default()
        },
        ..AppOptions::new(home.to_owned(), ApiToken::new(TOKEN).unwrap())
    }
}

impl Harness {
    pub(crate) fn open(home: &Path) -> Self {
        Self::with(options(home))
    }

    pub(crate) fn with(options: AppOptions) -> Self {
        Self::over(App::open(options).unwrap())
    }

    pub(crate) fn over(app: App) -> Self {
        let app = Arc::new(app);
        Self {
            router: router(Arc::clone(&app)),
            app,
        }
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let content_type = response
            .headers()
            .get("content-type")
            .map_or("", |v| v.to_str().unwrap())
            .to_owned();
        let headers = response.headers().clone();
        let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        Answer {
            status,
            content_type,
            headers,
            body: body.to_vec(),
        }
    }

    pub(crate) fn request(method: Method, path: &str) -> axum::http::request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("{BASE}{path}"))
            .header("host", "127.0.0.1")
            .header("x-api-key", TOKEN)
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(
            Self::request(Method::GET, path)
                .body(Body::empty())
                .unwrap(),
        )
        .await
    }

    /// The page of counters.
    pub(crate) async fn metrics(&self) -> String {
        let request = Request::get("/metrics")
            .header("host", "127.0.0.1")
            .header("x-api-key", TOKEN)
            .body(Body::empty());
        let answer = self.send(request.unwrap()).await;
        assert_eq!(answer.status, 200);
        let text = "text/plain; version=0.0.4; charset=utf-8";
        assert_eq!(answer.content_type, text);
        String::from_utf8(answer.body).unwrap()
    }

    /// Follows an address that the server gave, with other headers and without a key.
    pub(crate) async fn follow(&self, url: &str, headers: &[(&str, &str)]) -> Answer {
        let mut request = Request::builder().uri(url).header("host", "127.0.0.1");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(Body::empty()).unwrap()).await
    }

    /// Posts and leaves once the answer has begun; its status.
    pub(crate) async fn begin(&self, url: &str, body: &Value) -> u16 {
        let request = Request::builder()
            .method(Method::POST)
            .uri(url)
            .header("host", "127.0.0.1")
            .header("x-api-key", TOKEN)
            .body(Body::from(body.to_string()));
        let response = self.router.clone().oneshot(request.unwrap()).await.unwrap();
        response.status().as_u16()
    }

    pub(crate) async fn put(&self, path: &str, body: Value) -> Answer {
        let request = Self::request(Method::PUT, path)
            .header("content-type", "application/json")
            .body(Body::from(body.to_string()));
        self.send(request.unwrap()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(
            Self::request(Method::DELETE, path)
                .body(Body::empty())
                .unwrap(),
        )
        .await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        let request = Self::request(Method::POST, path)
            .header("content-type", "application/json")
            .body(Body::from(body.to_string()));
        self.send(request.unwrap()).await
    }

    pub(crate) async fn post_bytes(&self, path: &str, content_type: &str, body: Vec<u8>) -> Answer {
        let request = Self::request(Method::POST, path)
            .header("content-type", content_type)
            .body(Body::from(body));
        self.send(request.unwrap()).await
    }

    /// The request id that a submission was answered with.
    pub(crate) async fn submit(&self, path: &str, body: Value) -> String {
        let answer = self.post(path, body).await;
        assert_eq!(
            answer.status,
            200,
            "{}",
            String::from_utf8_lossy(&answer.body)
        );
        answer.json()["request_id"].as_str().unwrap().to_owned()
    }

    /// One poll for a result.
    pub(crate) async fn poll(&self, request_id: &str) -> Answer {
        let request = Self::request(Method::POST, "/retrieve_future")
            .header("accept", "application/x-protobuf, application/json")
            .body(Body::from(json!({"request_id": request_id}).to_string()));
        self.send(request.unwrap()).await
    }

    /// A result, polled for as clients do.
    pub(crate) async fn result(&self, request_id: &str) -> Answer {
        loop {
            let answer = self.poll(request_id).await;
            if answer.status != 408 {
                let text = String::from_utf8_lossy(&answer.body);
                assert_eq!(answer.status, 200, "{text}");
                return answer;
            }
        }
    }

    /// The text of an operation that failed through the caller's fault.
    pub(crate) async fn failure(&self, request_id: &str) -> String {
        let answer = self.result(request_id).await.json();
        assert_eq!(answer["category"], "user", "{answer}");
        answer["error"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn session(&self) -> String {
        let answer = self
            .post(
                "/create_session",
                json!({"tags": [], "user_metadata": {}, "sdk_version": "t"}),
            )
            .await;
        answer.json()["session_id"].as_str().unwrap().to_owned()
    }

    /// A new training run of rank 2 on the embedded model's name.
    pub(crate) async fn run(&self, session: &str, number: u64) -> String {
        let id = self
            .submit("/create_model", create_body(session, number))
            .await;
        self.result(&id).await.json()["model_id"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    pub(crate) async fn forward_backward(&self, run: &str, seq: u64, tokens: &[u32]) -> String {
        let answer = self.post_proto(&fb(run, seq, vec![datum(tokens)])).await;
        assert_eq!(
            answer.status,
            200,
            "{}",
            String::from_utf8_lossy(&answer.body)
        );
        answer.json()["request_id"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn post_proto(&self, request: &ForwardBackwardRequest) -> Answer {
        let message = proto::ForwardBackwardRequest::try_from(request).unwrap();
        let body = message.encode_to_vec();
        self.post_bytes("/forward_backward", "application/x-protobuf", body)
            .await
    }

    pub(crate) async fn optim_step(&self, run: &str, seq: u64) -> String {
        self.submit("/optim_step", optim(run, seq)).await
    }

    pub(crate) async fn output(&self, request_id: &str) -> ForwardBackwardOutput {
        let answer = self.result(request_id).await;
        assert_eq!(answer.content_type, "application/x-protobuf");
        let message = proto::ForwardBackwardOutput::decode(&answer.body[..]).unwrap();
        ForwardBackwardOutput::try_from(&message).unwrap()
    }

    pub(crate) async fn samples(&self, request_id: &str) -> SampleResponse {
        let answer = self.result(request_id).await;
        let text = String::from_utf8_lossy(&answer.body);
        assert_eq!(answer.content_type, "application/x-protobuf", "{text}");
        let message = proto::SampleResponse::decode(&answer.body[..]).unwrap();
        SampleResponse::try_from(&message).unwrap()
    }
}

/// Whether an operation that is told this only waits for others.
pub(crate) fn is_turn(reason: &str) -> bool {
    reason.starts_with("it has its turn") || reason.ends_with("sessions take turns")
}

pub(crate) fn create_body(session: &str, number: u64) -> Value {
    json!({"session_id": session, "model_seq_id": number, "base_model": "tinker/nano",
           "lora_config": {"rank": 2, "seed": 7}})
}

pub(crate) fn optim(run: &str, seq: u64) -> Value {
    json!({"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 0.01}})
}

/// A datum for cross-entropy that predicts the tokens shifted by one.
pub(crate) fn datum(tokens: &[u32]) -> Datum {
    let targets = tokens.iter().map(|t| (t + 1) % 32).collect();
    let weights = vec![1.0; tokens.len()];
    Datum::cross_entropy(ModelInput::from_tokens(tokens.to_vec()), targets, weights).unwrap()
}

/// A datum with other inputs.
pub(crate) fn raw_datum(tokens: &[u32], inputs: Vec<(&str, TensorData)>) -> Datum {
    let named = inputs
        .into_iter()
        .map(|(name, t)| (name.to_owned(), t))
        .collect();
    Datum::from_wire(ModelInput::from_tokens(tokens.to_vec()), named)
}

pub(crate) fn fb(run: &str, seq: u64, data: Vec<Datum>) -> ForwardBackwardRequest {
    ForwardBackwardRequest {
        model_id: run.parse().unwrap(),
        seq_id: seq,
        data,
        loss_fn: LossFn::CrossEntropy,
        loss_fn_config: LossConfig::new(),
        forward_only: false,
    }
}
