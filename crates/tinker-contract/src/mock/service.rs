//! The double's own part: the smallest service that the whole flow runs against.

use std::collections::HashMap;

use serde_json::{Value, json};
use tinker_types::{
    ForwardBackwardOutput, ForwardBackwardRequest, LossFnOutput, SampleResponse, SampledSequence,
    StopReason, TensorData, loss_input, proto,
};
use wiremock::ResponseTemplate;

use super::replies::{self, Reply};
use super::seen::Seen;

/// Base model of everything the double creates.
const BASE_MODEL: &str = "test/base";

/// State of the double's own part.
#[derive(Debug, Default)]
pub(super) struct Service {
    client_config: Value,
    n_futures: u64,
    results: HashMap<String, Reply>,
}

impl Service {
    pub(super) fn new(client_config: Value) -> Self {
        Self {
            client_config,
            ..Self::default()
        }
    }

    /// The answer to a request that no script claimed.
    pub(super) fn answer(&mut self, seen: &Seen) -> ResponseTemplate {
        let reply = match seen.path.trim_start_matches("/api/v1/") {
            "forward_backward" => self.forward_backward(seen),
            "asample" => self.sample(&seen.json()),
            "retrieve_future" => self.result(&seen.json()),
            "create_model"
            | "optim_step"
            | "save_weights"
            | "load_weights"
            | "save_weights_for_sampler" => self.submit(seen),
            other => self.immediate(other, seen),
        };
        match reply {
            Reply::Template(template) => *template,
            Reply::LostConnection => ResponseTemplate::new(500),
        }
    }

    fn immediate(&self, path: &str, seen: &Seen) -> Reply {
        let body = seen.json();
        let answer = match path {
            "client/config" => self.client_config.clone(),
            "client/dynamic_config" | "session_heartbeat" | "cancel_future" => json!({}),
            "telemetry" => json!({ "status": "accepted" }),
            "auth/token" => json!({ "jwt": "eyJh.e30.x" }),
            "healthz" => json!({ "status": "ok" }),
            "get_server_capabilities" => {
                json!({ "supported_models": [{ "model_name": BASE_MODEL }] })
            }
            "create_session" => json!({ "session_id": "S1" }),
            "get_info" => json!({
                "model_id": body["model_id"],
                "model_data": { "model_name": BASE_MODEL },
                "is_lora": true, "lora_rank": 8,
            }),
            "weights_info" => json!({ "base_model": BASE_MODEL, "is_lora": true, "lora_rank": 8 }),
            "create_sampling_session" => json!({ "sampling_session_id": sampler_id(&body) }),
            "training_runs" => json!({
                "training_runs": [],
                "cursor": { "offset": 0, "limit": 20, "total_count": 0 },
            }),
            "checkpoints" => json!({
                "checkpoints": [],
                "cursor": { "offset": 0, "limit": 100, "total_count": 0 },
            }),
            other => match other.split('/').collect::<Vec<_>>()[..] {
                ["samplers", id] => json!({ "sampler_id": id, "base_model": BASE_MODEL }),
                ["sessions", _, "finish"] => return replies::empty(200),
                ["training_runs", _, "checkpoints", _, _] if seen.method == "DELETE" => {
                    return replies::empty(204);
                }
                _ => return replies::refusal(404, &format!("the double has no {path}")),
            },
        };
        replies::json(200, &answer)
    }

    /// Accepts an operation whose result is JSON and already known.
    fn submit(&mut self, seen: &Seen) -> Reply {
        let body = seen.json();
        let (session, model) = (&body["session_id"], &body["model_id"]);
        let created = format!("{}:train:{}", text(session), body["model_seq_id"]);
        let operation = seen.path.trim_start_matches("/api/v1/");
        let checkpoint = |segment| {
            body["path"]
                .as_str()
                .map(|name| format!("tinker://{}/{segment}/{name}", text(model)))
        };
        let result = match operation {
            "create_model" => json!({ "model_id": created }),
            "load_weights" => {
                let id = if model.is_null() {
                    json!(created)
                } else {
                    model.clone()
                };
                json!({ "path": body["path"], "model_id": id })
            }
            "save_weights" => json!({ "path": checkpoint("weights") }),
            "save_weights_for_sampler" => match checkpoint("sampler_weights") {
                Some(path) => json!({ "path": path }),
                None => json!({ "path": null, "sampling_session_id": sampler_id(&body) }),
            },
            _ => json!({ "metrics": { "grad_norm": 0.5 } }),
        };
        let id = self.future(operation, replies::json(200, &result));
        replies::json(200, &json!({ "request_id": id }))
    }

    fn forward_backward(&mut self, seen: &Seen) -> Reply {
        let output = forward_backward_output(&seen.forward_backward());
        let result = replies::proto(&proto::ForwardBackwardOutput::from(&output));
        let id = self.future("forward_backward", result);
        replies::json(200, &json!({ "request_id": id }))
    }

    fn sample(&mut self, body: &Value) -> Reply {
        let result = replies::proto(&proto::SampleResponse::from(&sample_response(body)));
        let n = body["num_samples"].as_u64().unwrap_or(1);
        let names: Vec<String> = (0..n).map(|i| format!("{}-{i}", body["seq_id"])).collect();
        let id = self.future("sample", result);
        replies::json(
            200,
            &json!({ "request_id": id, "sample_sequence_ids": names }),
        )
    }

    fn future(&mut self, operation: &str, result: Reply) -> String {
        self.n_futures += 1;
        let id = format!("{operation}-{}", self.n_futures);
        self.results.insert(id.clone(), result);
        id
    }

    fn result(&self, body: &Value) -> Reply {
        let id = text(&body["request_id"]);
        let known = self.results.get(id).cloned();
        known.unwrap_or_else(|| replies::refusal(404, &format!("no future {id}")))
    }
}

/// What the double answers: the log-probability of every target is minus the datum's first token,
/// and the loss is the number of data.
#[must_use]
pub fn forward_backward_output(request: &ForwardBackwardRequest) -> ForwardBackwardOutput {
    let outputs = request.data.iter().map(|datum| {
        let first = datum
            .model_input
            .tokens()
            .and_then(|tokens| tokens.first().copied());
        let targets = datum.loss_fn_inputs().get(loss_input::TARGET_TOKENS);
        let n = targets.map_or(0, |targets| targets.values().len());
        let logprob = -(first.unwrap_or_default() as f32);
        LossFnOutput::from([("logprobs".to_owned(), TensorData::floats(vec![logprob; n]))])
    });
    ForwardBackwardOutput {
        loss_fn_output_type: "TorchLossReturn".into(),
        loss_fn_outputs: outputs.collect(),
        metrics: [("loss:sum".to_owned(), request.data.len() as f64)].into(),
    }
}

/// What the double answers: every sample is the tokens 1, 2, 3, or fewer if fewer were asked for,
/// and every log-probability is -1.
#[must_use]
pub fn sample_response(request: &Value) -> SampleResponse {
    let n_samples = request["num_samples"].as_u64().unwrap_or(1);
    let n_tokens = request["sampling_params"]["max_tokens"]
        .as_u64()
        .unwrap_or(3)
        .min(3);
    let chunks = request["prompt"]["chunks"].as_array();
    let n_prompt: usize = chunks
        .into_iter()
        .flatten()
        .filter_map(|c| c["tokens"].as_array())
        .map(Vec::len)
        .sum();
    let sequence = SampledSequence {
        stop_reason: StopReason::Length,
        tokens: (1..=n_tokens as u32).collect(),
        logprobs: Some(vec![-1.0; n_tokens as usize]),
        topk_logprobs: None,
        sequence_id: None,
    };
    let prompt_logprobs = (request["prompt_logprobs"] == json!(true) && n_prompt > 0).then(|| {
        std::iter::once(None)
            .chain(vec![Some(-1.0); n_prompt - 1])
            .collect()
    });
    SampleResponse {
        sequences: vec![sequence; n_samples as usize],
        prompt_logprobs,
        ..SampleResponse::default()
    }
}

fn sampler_id(body: &Value) -> String {
    let session = body["session_id"]
        .as_str()
        .or_else(|| text(&body["model_id"]).split(':').next());
    format!(
        "{}:sample:{}",
        session.unwrap_or_default(),
        body["sampling_session_seq_id"]
    )
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
