//! Every recorded exchange decodes into our types and encodes again to the same meaning.

use std::str::FromStr;

use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tinker_types as t;

use crate::support::{Body, Record, base64, decode, records, without_nulls};
use crate::wire::Schema;

#[test]
fn every_recorded_exchange_keeps_its_meaning() {
    let mut n_exchanges = 0;

    for record in records() {
        let path = record
            .path
            .trim_start_matches("/api/v1/")
            .trim_start_matches('/');
        check(&record, path);
        n_exchanges += record.times;
    }

    assert_eq!(n_exchanges, 339, "the whole recording");
}

/// Panics if the types lose something of the exchange, or do not cover it.
fn check(record: &Record, path: &str) {
    let segments: Vec<&str> = path.split('/').collect();
    match (record.method.as_str(), &segments[..]) {
        ("GET", ["get_server_capabilities"]) => answer::<t::ServerCapabilities>(record),
        ("POST", ["client", "config"]) => {
            request::<t::ClientConfigRequest>(record);
            with_defaults::<t::ClientConfig>(record);
        }
        ("POST", ["client", "dynamic_config"]) => {
            request::<t::ClientConfigRequest>(record);
            with_defaults::<t::DynamicConfig>(record);
        }
        ("POST", ["create_session"]) => {
            both::<t::CreateSessionRequest, t::CreateSessionResponse>(record);
        }
        ("POST", ["session_heartbeat"]) => {
            both::<t::HeartbeatRequest, t::HeartbeatResponse>(record)
        }
        ("GET", ["sessions"]) => answer::<t::SessionsResponse>(record),
        ("GET", ["sessions", id]) => named::<t::SessionId, t::SessionInfo>(id, record),
        ("POST", ["sessions", id, "finish"]) => {
            same_text::<t::SessionId>(id);
            request::<t::FinishSessionRequest>(record);
            empty(record);
        }
        ("POST", ["create_model"]) => both::<t::CreateModelRequest, t::UntypedFuture>(record),
        ("POST", ["get_info"]) => both::<t::GetInfoRequest, t::GetInfoResponse>(record),
        ("POST", ["forward_backward"]) => {
            forward_backward(record.request.as_ref().unwrap());
            answer::<t::UntypedFuture>(record);
        }
        ("POST", ["optim_step"]) => both::<t::OptimStepRequest, t::UntypedFuture>(record),
        ("POST", ["save_weights"]) => both::<t::SaveWeightsRequest, t::UntypedFuture>(record),
        ("POST", ["load_weights"]) => both::<t::LoadWeightsRequest, t::UntypedFuture>(record),
        ("POST", ["save_weights_for_sampler"]) => {
            both::<t::SaveWeightsForSamplerRequest, t::UntypedFuture>(record);
        }
        ("POST", ["weights_info"]) => both::<t::WeightsInfoRequest, t::WeightsInfo>(record),
        ("POST", ["create_sampling_session"]) => {
            both::<t::CreateSamplingSessionRequest, t::CreateSamplingSessionResponse>(record);
        }
        ("GET", ["samplers", id]) => named::<t::SamplingSessionId, t::SamplerInfo>(id, record),
        ("POST", ["asample"]) => both::<t::SampleRequest, t::UntypedFuture>(record),
        ("POST", ["cancel_future"]) => request::<t::CancelFutureRequest>(record),
        ("POST", ["retrieve_future"]) => {
            request::<t::RetrieveFutureRequest>(record);
            result(record);
        }
        ("GET", ["training_runs"]) => answer::<t::TrainingRunsResponse>(record),
        ("GET", ["training_runs", id]) => named::<t::TrainingRunId, t::TrainingRun>(id, record),
        ("GET", ["training_runs", id, "checkpoints"]) => {
            named::<t::TrainingRunId, t::CheckpointsResponse>(id, record);
        }
        ("GET", ["checkpoints"]) => answer::<t::CheckpointsResponse>(record),
        ("DELETE", ["training_runs", id, "checkpoints", kind, name]) => {
            same_text::<t::TrainingRunId>(id);
            same_text::<t::CheckpointId>(&format!("{kind}/{name}"));
            empty(record);
        }
        _ => check_extras(record, &segments),
    }
}

/// Sharing, export, administration and credentials.
fn check_extras(record: &Record, segments: &[&str]) {
    match (record.method.as_str(), segments) {
        // The recording keeps no credentials and no telemetry; see the samples.
        ("POST", ["auth", "token"] | ["telemetry"]) | ("GET", ["auth", "apikey", "me"]) => {
            empty(record);
        }
        ("GET", ["audit"]) => assert_eq!(record.status, 302, "the log lies elsewhere"),
        ("GET", ["dl", "audit"]) => answer::<t::AuditLog>(record),
        // Files, whose bytes are no part of the recording.
        ("GET", ["dl", _]) => empty(record),
        ("GET", ["billing", "usage", "events"]) => answer::<t::BillingUsage>(record),
        ("GET", ["billing", "usage", "checkpoints", "current"]) => {
            answer::<t::CheckpointStorageUsage>(record);
        }
        ("PUT", ["sessions", id, "project"]) => {
            same_text::<t::SessionId>(id);
            request::<t::AssignProjectRequest>(record);
            empty(record);
        }
        ("POST", ["sessions", "search"]) => {
            both::<t::SessionSearchRequest, t::SessionSearchResponse>(record);
        }
        ("GET", ["sessions", id, "trace_export"]) => {
            named::<t::SessionId, t::TraceExport>(id, record);
        }
        ("POST", ["copy_weights"]) => both::<t::CopyWeightsRequest, t::CopyWeightsResponse>(record),
        ("POST", ["save_weights_external"]) => {
            both::<t::SaveWeightsExternalRequest, t::UntypedFuture>(record);
        }
        ("POST", ["retrieve_futures"]) => {
            both::<t::RetrieveFuturesRequest, t::RetrieveFuturesResponse>(record);
        }
        ("POST", ["join_sampling_session"]) => {
            both::<t::JoinSamplingSessionRequest, t::JoinSamplingSessionResponse>(record);
        }
        (method, ["training_runs", id, "checkpoints", kind, name, action]) => {
            same_text::<t::TrainingRunId>(id);
            same_text::<t::CheckpointId>(&format!("{kind}/{name}"));
            match (method, *action) {
                ("GET", "external_weights_urls") => answer::<t::ExternalWeightsUrls>(record),
                ("POST" | "DELETE", "publish") => empty(record),
                ("PUT", "ttl") => {
                    request::<t::SetTtlRequest>(record);
                    empty(record);
                }
                other => panic!("no type for {other:?} of a checkpoint"),
            }
        }
        other => panic!("no type for {other:?}"),
    }
}

fn both<Q: DeserializeOwned + Serialize, A: DeserializeOwned + Serialize>(record: &Record) {
    request::<Q>(record);
    answer::<A>(record);
}

/// An endpoint whose path names one thing.
fn named<I, A: DeserializeOwned + Serialize>(id: &str, record: &Record)
where
    I: FromStr<Err = t::TypeError> + ToString,
{
    same_text::<I>(id);
    answer::<A>(record);
}

fn same_text<I: FromStr<Err = t::TypeError> + ToString>(text: &str) {
    assert_eq!(text.parse::<I>().unwrap().to_string(), text);
}

fn request<Q: DeserializeOwned + Serialize>(record: &Record) {
    keeps_meaning::<Q>(json_of(record.request.as_ref()));
}

fn answer<A: DeserializeOwned + Serialize>(record: &Record) {
    match record.status {
        200..300 => keeps_meaning::<A>(json_of(record.response.as_ref())),
        _ => failure(record),
    }
}

fn empty(record: &Record) {
    assert!(record.response.is_none(), "{} has a body", record.path);
}

/// A refusal: a `detail`, or nothing where a proxy refused.
fn failure(record: &Record) {
    if let Some(body) = &record.response {
        keeps_meaning::<t::ErrorBody>(json_of(Some(body)));
    }
}

fn json_of(body: Option<&Body>) -> &Value {
    body.and_then(|body| body.json.as_ref())
        .expect("a JSON body")
}

pub(crate) fn keeps_meaning<T: DeserializeOwned + Serialize>(json: &Value) {
    let decoded = decode::<T>(json);
    let encoded = serde_json::to_value(&decoded).unwrap();

    assert_eq!(
        without_nulls(&encoded),
        without_nulls(json),
        "{}",
        std::any::type_name::<T>()
    );
}

/// Settings: absent ones mean their defaults, which our encoder writes out.
fn with_defaults<T: DeserializeOwned + Serialize + Default>(record: &Record) {
    if record.status != 200 {
        return failure(record);
    }
    let given = json_of(record.response.as_ref());
    let mut full = serde_json::to_value(T::default()).unwrap();
    for (key, value) in given.as_object().unwrap() {
        full[key] = value.clone();
    }

    keeps_meaning::<T>(&full);
    assert_eq!(serde_json::to_value(decode::<T>(given)).unwrap(), full);
}

/// What `retrieve_future` gave; the double named its futures after what they are of.
fn result(record: &Record) {
    let asked = json_of(record.request.as_ref());
    let id = asked["request_id"].as_str().unwrap();
    let Some(body) = &record.response else {
        return;
    };
    if body.protobuf.is_some() || body.truncated {
        return protobuf_result(body);
    }
    let json = json_of(Some(body));
    if record.status == 408 {
        return keeps_meaning::<t::TryAgain>(json);
    }
    if record.status != 200 {
        return failure(record);
    }
    match t::FutureReply::from_json(json.to_string().as_bytes()).unwrap() {
        t::FutureReply::TryAgain(_) => keeps_meaning::<t::TryAgain>(json),
        t::FutureReply::MetadataOnly(_) => keeps_meaning::<t::CompleteMetadata>(json),
        t::FutureReply::Failed(_) => keeps_meaning::<t::FailedFuture>(json),
        t::FutureReply::Result => match id.trim_start_matches("req-").rsplit_once('-').unwrap().0 {
            "create_model" => keeps_meaning::<t::CreateModelResponse>(json),
            "optim" => keeps_meaning::<t::OptimStepResponse>(&without_tag(json)),
            "save" => keeps_meaning::<t::SaveWeightsResponse>(json),
            "saves" => keeps_meaning::<t::SaveWeightsForSamplerResponse>(json),
            "load" => keeps_meaning::<t::LoadWeightsResponse>(json),
            "savex" => keeps_meaning::<t::SaveWeightsExternalResponse>(json),
            other => panic!("no type for the result of {other}: {json}"),
        },
    }
}

/// The result of an optimizer step has no tag; the double sent one, which clients ignore.
fn without_tag(json: &Value) -> Value {
    json!({"metrics": json["metrics"]})
}

fn protobuf_result(body: &Body) {
    match body.message.as_deref() {
        Some("tinker_public.ForwardBackwardOutput") => forward_backward_output(body),
        Some("tinker_public.SampleResponse") => sample_response(body),
        other => panic!("no type for {other:?}"),
    }
}

/// The message, unless the recording cut it short.
fn message(body: &Body) -> Option<Vec<u8>> {
    assert_eq!(body.truncated, body.protobuf.is_none());
    body.protobuf.as_deref().map(base64)
}

fn forward_backward(body: &Body) {
    let Some(bytes) = message(body) else { return };
    let sent = t::proto::ForwardBackwardRequest::decode(&bytes[..]).unwrap();

    let request = t::ForwardBackwardRequest::try_from(&sent).unwrap();
    let again = t::proto::ForwardBackwardRequest::try_from(&request).unwrap();

    assert_eq!(again, sent);
    let schema = Schema::load();
    assert_eq!(
        schema.canonical("ForwardBackwardRequest", &again.encode_to_vec()),
        schema.canonical("ForwardBackwardRequest", &bytes)
    );
}

fn forward_backward_output(body: &Body) {
    let Some(bytes) = message(body) else { return };
    let sent = t::proto::ForwardBackwardOutput::decode(&bytes[..]).unwrap();

    let output = t::ForwardBackwardOutput::try_from(&sent).unwrap();
    let mut again = t::proto::ForwardBackwardOutput::from(&output);

    // The class name of a record is informational and is not kept.
    for (again, sent) in again.loss_fn_outputs.iter_mut().zip(&sent.loss_fn_outputs) {
        again.type_tag.clone_from(&sent.type_tag);
    }
    assert_eq!(again, sent);
    keeps_meaning::<t::ForwardBackwardOutput>(&serde_json::to_value(&output).unwrap());
}

fn sample_response(body: &Body) {
    let Some(bytes) = message(body) else { return };
    let sent = t::proto::SampleResponse::decode(&bytes[..]).unwrap();

    let response = t::SampleResponse::try_from(&sent).unwrap();
    let again = t::proto::SampleResponse::from(&response);

    let schema = Schema::load();
    assert_eq!(
        schema.canonical("SampleResponse", &again.encode_to_vec()),
        schema.canonical("SampleResponse", &bytes)
    );
    keeps_meaning::<t::SampleResponse>(&serde_json::to_value(&response).unwrap());
}
