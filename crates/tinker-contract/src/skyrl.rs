//! A double of SkyRL's server (main of August 2026 and its releases), in its dialect: results in
//! JSON, failures as 400, no names of samples, sampler paths without a kind, prompt log-probabilities
//! without the first token's, and the words of `FastAPI` for what it lacks.
//!
//! Facts: NovaSky-AI/SkyRL `skyrl/tinker/api.py` at a9564572, read and run.

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use crate::mock::{Mock, Reply, Seen, empty, json as reply, refusal};

/// The one base model; its rank is 32 at most.
pub const BASE_MODEL: &str = "test/base";
/// The token that every log-probability and every sample comes from.
const TOKEN: u32 = 7;

/// Which of its versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Takes passes in protobuf.
    Main,
    /// Takes passes in JSON only.
    Release,
}

/// Starts a double.
pub async fn start(version: Version) -> Mock {
    let mut state = State {
        version,
        n_futures: 0,
        results: HashMap::new(),
        submitted: HashMap::new(),
        checkpoints: HashSet::new(),
        models: Vec::new(),
    };
    let mock = Mock::start().await;
    mock.speak(move |seen| state.answer(seen));
    mock
}

struct State {
    version: Version,
    n_futures: u64,
    results: HashMap<String, Reply>,
    /// Body and future of each (model, number).
    submitted: HashMap<(String, u64), (Vec<u8>, String)>,
    /// `model/weights/name` and `model/sampler_weights/name`.
    checkpoints: HashSet<String>,
    models: Vec<String>,
}

impl State {
    fn answer(&mut self, seen: &Seen) -> Reply {
        let path = seen.path.trim_start_matches("/api/v1/");
        let body = seen.json();
        match (seen.method.as_str(), &path.split('/').collect::<Vec<_>>()[..]) {
            ("POST", ["client", "config"]) => reply(200, &json!({})),
            ("POST", ["create_session"]) => reply(200, &json!({ "session_id": "sess" })),
            ("POST", ["session_heartbeat"]) => reply(200, &json!({ "type": "session_heartbeat" })),
            ("POST", ["telemetry"]) => reply(200, &json!({ "status": "accepted" })),
            ("GET", ["healthz"]) => reply(200, &json!({ "status": "ok" })),
            ("GET", ["get_server_capabilities"]) => reply(
                200,
                &json!({ "supported_models": [{ "model_name": BASE_MODEL }] }),
            ),
            ("POST", ["create_model"]) => self.create_model(&body),
            ("POST", ["get_info"]) => reply(
                200,
                &json!({
                    "model_id": body["model_id"], "status": "ready",
                    "model_data": { "base_model": BASE_MODEL, "model_name": BASE_MODEL },
                }),
            ),
            ("POST", ["unload_model"]) => self.future(Ok(json!({ "model_id": body["model_id"] }))),
            ("POST", ["forward_backward" | "forward"]) => self.pass(seen, &body),
            ("POST", ["optim_step"]) => self.once(seen, &body, |_| {
                Ok(json!({ "metrics": { "skyrl.ai/grad_norm": 0.5, "skyrl.ai/learning_rate": 1e-4 } }))
            }),
            ("POST", ["save_weights"]) => self.save("weights", &body),
            ("POST", ["save_weights_for_sampler"]) => self.save("sampler_weights", &body),
            ("POST", ["load_weights"]) => load(&body),
            ("POST", ["weights_info"]) => reply(
                200,
                &json!({ "base_model": BASE_MODEL, "is_lora": true, "lora_rank": 16 }),
            ),
            ("POST", ["create_sampling_session"]) => reply(
                200,
                &json!({ "sampling_session_id": format!("sampling_{}", self.n_futures) }),
            ),
            ("GET", ["samplers", id]) => {
                reply(200, &json!({ "sampler_id": id, "base_model": BASE_MODEL }))
            }
            ("POST", ["asample"]) => self.sample(&body),
            ("POST", ["retrieve_future"]) => self.result(&body),
            (method, ["training_runs", rest @ ..]) => self.runs(method, rest),
            _ => refusal(404, "Not Found"),
        }
    }

    /// A future: its result, or the text of its failure.
    fn future(&mut self, result: Result<Value, String>) -> Reply {
        let id = self.note(result);
        reply(200, &json!({ "request_id": id, "status": "pending" }))
    }

    fn note(&mut self, result: Result<Value, String>) -> String {
        self.n_futures += 1;
        let id = self.n_futures.to_string();
        let answer = match result {
            Ok(result) => reply(200, &result),
            Err(text) => refusal(400, &text),
        };
        self.results.insert(id.clone(), answer);
        id
    }

    /// A training operation: the same number brings the same future, with another body a 409.
    fn once(
        &mut self,
        seen: &Seen,
        body: &Value,
        run: impl FnOnce(&Value) -> Result<Value, String>,
    ) -> Reply {
        let key = (
            text(&body["model_id"]).to_owned(),
            body["seq_id"].as_u64().unwrap_or(0),
        );
        if let Some((known, id)) = self.submitted.get(&key) {
            return match *known == seen.body {
                true => reply(200, &json!({ "request_id": id })),
                false => refusal(409, "seq_id was used with another request"),
            };
        }
        let id = self.note(run(body));
        self.submitted.insert(key, (seen.body.clone(), id.clone()));
        reply(200, &json!({ "request_id": id }))
    }

    fn create_model(&mut self, body: &Value) -> Reply {
        let rank = body["lora_config"]["rank"].as_u64().unwrap_or(0);
        if rank > 32 {
            return self.future(Err(format!("rank {rank} exceeds max_lora_rank 32")));
        }
        let id = format!("model_{}", self.models.len());
        self.models.push(id.clone());
        self.future(Ok(json!({ "model_id": id })))
    }

    fn pass(&mut self, seen: &Seen, body: &Value) -> Reply {
        if seen.header("content-type") == Some(tinker_types::PROTOBUF) {
            return match self.version {
                Version::Main => self.protobuf_pass(seen),
                Version::Release => invalid(
                    "model_attributes_type",
                    &json!(["body"]),
                    "Input should be a valid dictionary or object to extract fields from",
                ),
            };
        }
        let input = match (&body["forward_backward_input"], &body["forward_input"]) {
            (Value::Null, input) | (input, _) => input.clone(),
        };
        if input["loss_fn"] == "dro" {
            return unknown_loss();
        }
        let data = input["data"].as_array().cloned().unwrap_or_default();
        let lengths = data.iter().map(|datum| {
            let targets = &datum["loss_fn_inputs"]["target_tokens"]["data"];
            targets.as_array().map_or(0, Vec::len)
        });
        let output = outputs(&lengths.collect::<Vec<_>>());
        self.once(seen, body, |_| output)
    }

    fn protobuf_pass(&mut self, seen: &Seen) -> Reply {
        let request = seen.forward_backward();
        if request.loss_fn.to_string() == "dro" {
            return unknown_loss();
        }
        let lengths: Vec<usize> = request.data.iter().map(n_targets).collect();
        let body = json!({ "model_id": request.model_id, "seq_id": request.seq_id });
        self.once(seen, &body, |_| outputs(&lengths))
    }

    fn save(&mut self, kind: &str, body: &Value) -> Reply {
        let model = text(&body["model_id"]);
        let Some(name) = body["path"].as_str() else {
            return self.future(Ok(json!({
                "path": null, "sampling_session_id": format!("sampling_{model}"),
            })));
        };
        if !self.checkpoints.insert(format!("{model}/{kind}/{name}")) {
            return refusal(409, &format!("Checkpoint '{name}' already exists"));
        }
        let path = match kind {
            "weights" => format!("tinker://{model}/weights/{name}"),
            _ => format!("tinker://{model}/{name}"),
        };
        self.future(Ok(json!({ "path": path, "type": format!("save_{kind}") })))
    }

    fn sample(&mut self, body: &Value) -> Reply {
        let params = &body["sampling_params"];
        let Some(max_tokens) = params["max_tokens"].as_u64() else {
            let place = json!(["body", "sampling_params", "max_tokens"]);
            return invalid("missing", &place, "Field required");
        };
        if body["topk_prompt_logprobs"].as_u64().unwrap_or(0) > 0 {
            return self.future(Err("topk_prompt_logprobs is not supported".into()));
        }
        let n_samples = body["num_samples"].as_u64().unwrap_or(1);
        let sequence = json!({
            "stop_reason": "length", "tokens": vec![TOKEN; max_tokens as usize],
            "logprobs": vec![-1.0; max_tokens as usize],
        });
        let chunks = body["prompt"]["chunks"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let lengths = chunks.iter().filter_map(|chunk| chunk["tokens"].as_array());
        let n_prompt: usize = lengths.map(Vec::len).sum();
        let wants_prompt = body["prompt_logprobs"] == json!(true);
        let prompt = wants_prompt.then(|| vec![-1.0; n_prompt.saturating_sub(1)]);
        self.future(Ok(json!({
            "sequences": vec![sequence; n_samples as usize], "prompt_logprobs": prompt,
        })))
    }

    fn result(&self, body: &Value) -> Reply {
        let known = self.results.get(text(&body["request_id"])).cloned();
        known.unwrap_or_else(|| refusal(404, "Future not found"))
    }

    fn runs(&mut self, method: &str, rest: &[&str]) -> Reply {
        match (method, rest) {
            ("GET", []) => {
                let runs: Vec<Value> = self.models.iter().map(|id| describe(id)).collect();
                let n = runs.len();
                let cursor = json!({ "offset": 0, "limit": 20, "total_count": n });
                reply(200, &json!({ "training_runs": runs, "cursor": cursor }))
            }
            ("GET", [id]) if self.models.iter().any(|known| known == id) => {
                reply(200, &describe(id))
            }
            ("GET", [_]) => refusal(404, "Training run not found"),
            ("GET", [_, "checkpoints"]) => reply(200, &json!({ "checkpoints": [] })),
            ("DELETE", [id, "checkpoints", kind, name]) => {
                match self.checkpoints.remove(&format!("{id}/{kind}/{name}")) {
                    true => empty(204),
                    false => refusal(404, "Checkpoint not found"),
                }
            }
            (_, [_, "checkpoints", _, _, "archive"]) => refusal(405, "Method Not Allowed"),
            _ => refusal(404, "Not Found"),
        }
    }
}

/// Loads into a run that exists, as its first request only.
fn load(body: &Value) -> Reply {
    if body["model_id"].is_null() {
        return invalid("missing", &json!(["body", "model_id"]), "Field required");
    }
    refusal(
        400,
        &format!(
            "LoadWeights is not permitted with seq_id {}",
            body["seq_id"]
        ),
    )
}

fn describe(id: &str) -> Value {
    json!({
        "training_run_id": id, "base_model": BASE_MODEL, "model_owner": "default",
        "is_lora": true, "corrupted": false, "lora_rank": 16,
        "last_request_time": "2026-08-21T00:00:00Z",
    })
}

fn n_targets(datum: &tinker_types::Datum) -> usize {
    let targets = datum
        .loss_fn_inputs()
        .get(tinker_types::loss_input::TARGET_TOKENS);
    targets.map_or(0, |targets| targets.values().len())
}

/// One output for each datum, and no metrics.
fn outputs(lengths: &[usize]) -> Result<Value, String> {
    let rows: Vec<Value> = lengths
        .iter()
        .map(|&n| {
            let tensor = |x: f64| json!({ "data": vec![x; n], "dtype": "float32", "shape": [n] });
            json!({ "elementwise_loss": tensor(1.0), "logprobs": tensor(-1.0) })
        })
        .collect();
    Ok(json!({ "loss_fn_output_type": "scalar", "loss_fn_outputs": rows, "metrics": {} }))
}

fn unknown_loss() -> Reply {
    let place = json!(["body", "forward_backward_input", "loss_fn"]);
    let text = "Input should be 'cross_entropy', 'importance_sampling', 'ppo' or 'cispo'";
    invalid("literal_error", &place, text)
}

/// A refusal of pydantic.
fn invalid(kind: &str, place: &Value, text: &str) -> Reply {
    reply(
        422,
        &json!({ "detail": [{ "type": kind, "loc": place, "msg": text }] }),
    )
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
