//! A server that takes everything, and clients that do not wait long.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prost::Message;
use serde_json::{Value, json};
use tinker_api::{
    Datum, ForwardBackwardOutput, LoraConfig, ModelInput, PollPolicy, RetryPolicy, ServiceClient,
    ServiceClientBuilder, TrainingClient,
};
use tinker_http::machine::Backoff;
use tinker_types::{ForwardBackwardRequest, PROTOBUF, proto};
use wiremock::matchers::{any, method, path};
use wiremock::{Mock, MockServer, Request, Respond, ResponseTemplate};

/// Answers every endpoint of training and sampling; futures carry what they will bring.
fn default_answer(request: &Request) -> ResponseTemplate {
    static N_FUTURES: AtomicU64 = AtomicU64::new(0);
    let future = |kind: &str| {
        let n = N_FUTURES.fetch_add(1, Ordering::Relaxed);
        ok(json!({"request_id": format!("{kind}-{n}")}))
    };
    match request.url.path().trim_start_matches("/api/v1/") {
        "client/config" => ok(json!({})),
        "create_session" => ok(json!({"session_id": "S1"})),
        "create_model" | "load_weights" => future("model"),
        "get_info" => ok(json!({
            "model_id": body(request)["model_id"],
            "model_data": {"model_name": "tinker/nano"},
        })),
        "forward_backward" => future(&format!("pass:{}", pass(request).data.len())),
        "optim_step" => future("step"),
        "save_weights" => future("save"),
        "save_weights_for_sampler" => future("sampler"),
        "create_sampling_session" => ok(json!({"sampling_session_id": "S1:sample:0"})),
        "samplers/S1:sample:0" => {
            ok(json!({"sampler_id": "S1:sample:0", "base_model": "tinker/nano"}))
        }
        "asample" => future("sample"),
        "retrieve_future" => result(body(request)["request_id"].as_str().unwrap()),
        _ => ResponseTemplate::new(404),
    }
}

/// The result that a future's name promises.
pub(crate) fn result(request_id: &str) -> ResponseTemplate {
    let kind = request_id.split('-').next().unwrap();
    match kind.split_once(':').unwrap_or((kind, "")) {
        ("model", _) => ok(json!({"model_id": "S1:train:0"})),
        ("pass", n) => pass_result(n.parse().unwrap()),
        ("step", _) => ok(json!({"metrics": {"grad_norm": 1.0}})),
        ("save", _) => ok(json!({"path": "tinker://S1:train:0/weights/0001"})),
        ("sampler", _) => ok(json!({
            "path": "tinker://S1:train:0/sampler_weights/0001",
            "sampling_session_id": "S1:sample:0",
        })),
        ("sample", _) => sample_result(1),
        other => panic!("no result for {other:?}"),
    }
}

fn pass_result(n_data: usize) -> ResponseTemplate {
    let output = ForwardBackwardOutput {
        loss_fn_output_type: "ArrayRecord".into(),
        loss_fn_outputs: vec![
            [(
                "logprobs".to_owned(),
                tinker_api::TensorData::floats(vec![-1.0])
            )]
            .into();
            n_data
        ],
        metrics: [("loss:sum".to_owned(), n_data as f64)].into(),
    };
    protobuf(proto::ForwardBackwardOutput::from(&output).encode_to_vec())
}

/// `n` sequences of two tokens, and log-probabilities of a prompt of two.
pub(crate) fn sample_result(n: usize) -> ResponseTemplate {
    let sequence = json!({"stop_reason": "stop", "tokens": [5, 6], "logprobs": [-0.5, -0.25]});
    let response = json!({"sequences": vec![sequence; n], "prompt_logprobs": [null, -0.5]});
    let response: tinker_api::SampleResponse = serde_json::from_value(response).unwrap();
    protobuf(proto::SampleResponse::from(&response).encode_to_vec())
}

fn protobuf(bytes: Vec<u8>) -> ResponseTemplate {
    ResponseTemplate::new(200).set_body_raw(bytes, PROTOBUF)
}

pub(crate) fn ok(body: Value) -> ResponseTemplate {
    ResponseTemplate::new(200).set_body_json(body)
}

pub(crate) fn refusal(code: u16) -> ResponseTemplate {
    ResponseTemplate::new(code).set_body_json(json!({"detail": "refused"}))
}

pub(crate) async fn server() -> MockServer {
    let server = MockServer::start().await;
    Mock::given(any())
        .respond_with(default_answer)
        .with_priority(9)
        .mount(&server)
        .await;
    server
}

/// Answers one route otherwise; `n_times` bounds how often.
pub(crate) async fn answer_with(
    server: &MockServer,
    route: &str,
    n_times: Option<u64>,
    responder: impl Respond + 'static,
) {
    let mock = Mock::given(method("POST"))
        .and(path(format!("/api/v1/{route}")))
        .respond_with(responder)
        .with_priority(1);
    match n_times {
        Some(n) => mock.up_to_n_times(n).mount(server).await,
        None => mock.mount(server).await,
    }
}

/// The requests to a route, in order of arrival.
pub(crate) async fn requests(server: &MockServer, route: &str) -> Vec<Request> {
    let all = server.received_requests().await.unwrap();
    all.into_iter()
        .filter(|request| request.url.path() == format!("/api/v1/{route}"))
        .collect()
}

/// Routes and `seq_id`s of the training operations, in order of arrival.
pub(crate) async fn operations(server: &MockServer) -> Vec<(String, u64)> {
    let all = server.received_requests().await.unwrap();
    all.iter()
        .filter_map(|request| {
            let route = request.url.path().trim_start_matches("/api/v1/");
            match route {
                "forward_backward" => Some((route.to_owned(), pass(request).seq_id)),
                "optim_step" | "save_weights" | "save_weights_for_sampler" => {
                    Some((route.to_owned(), body(request)["seq_id"].as_u64().unwrap()))
                }
                _ => None,
            }
        })
        .collect()
}

pub(crate) fn body(request: &Request) -> Value {
    serde_json::from_slice(&request.body).unwrap()
}

pub(crate) fn pass(request: &Request) -> ForwardBackwardRequest {
    let message = proto::ForwardBackwardRequest::decode(&request.body[..]).unwrap();
    ForwardBackwardRequest::try_from(&message).unwrap()
}

pub(crate) fn builder(server: &MockServer) -> ServiceClientBuilder {
    let backoff = Backoff {
        base_delay: Duration::from_millis(1),
        max_delay: Duration::from_millis(4),
        jitter: 0.0,
    };
    ServiceClient::builder(server.uri())
        .api_key("tml-secret".parse().unwrap())
        .retry_policy(RetryPolicy {
            max_attempts: 4,
            backoff: backoff.clone(),
            ..RetryPolicy::default()
        })
        .poll_policy(PollPolicy {
            backoff,
            min_interval: Duration::from_millis(1),
            ..PollPolicy::default()
        })
}

pub(crate) fn service(server: &MockServer) -> ServiceClient {
    builder(server).build().unwrap()
}

pub(crate) async fn trainer(server: &MockServer) -> TrainingClient {
    service(server)
        .create_lora_training_client("tinker/nano", LoraConfig::default())
        .await
        .unwrap()
}

pub(crate) fn datum() -> Datum {
    Datum::cross_entropy(ModelInput::from_tokens(vec![1]), vec![2], vec![1.0]).unwrap()
}
