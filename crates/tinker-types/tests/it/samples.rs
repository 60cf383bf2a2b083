//! Values of the official SDK for what the recording lacks: read, recognized, and written again.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tinker_types as t;

use crate::recorded::keeps_meaning;
use crate::support::{decode, fixture};

#[test]
fn every_sample_of_the_sdk_keeps_its_meaning_and_is_recognized() {
    let samples: Vec<Value> = serde_json::from_str(&fixture("sdk_samples.json")).unwrap();
    assert_eq!(samples.len(), 27);

    for sample in samples {
        check(sample["type"].as_str().unwrap(), &sample["json"]);
    }
}

fn check(name: &str, json: &Value) {
    match name {
        "ApiKeyInfo" => known::<t::ApiKeyInfo>(json),
        "AuditLog" => known::<t::AuditLog>(json),
        "BillingUsage" => known::<t::BillingUsage>(json),
        "CheckpointSearchRequest" => known::<t::CheckpointSearchRequest>(json),
        "CheckpointSearchResponse" => known::<t::CheckpointSearchResponse>(json),
        "CheckpointStorageUsage" => known::<t::CheckpointStorageUsage>(json),
        "CreateCustomLossRequest" => known::<t::CreateCustomLossRequest>(json),
        "CreateCustomLossResponse" => known::<t::CreateCustomLossResponse>(json),
        "DimuonParams" => known::<t::DimuonParams>(json),
        "FinishUploadRequest" => known::<t::FinishUploadRequest>(json),
        "FinishUploadResponse" => known::<t::FinishUploadResponse>(json),
        "OptimizerConfig" => known::<t::OptimizerConfig>(json),
        "SessionSearchRequest" => known::<t::SessionSearchRequest>(json),
        "SessionSearchResponse" => known::<t::SessionSearchResponse>(json),
        "StartUploadRequest" => known::<t::StartUploadRequest>(json),
        "StartUploadResponse" => known::<t::StartUploadResponse>(json),
        "TelemetryRequest" => known::<t::TelemetryRequest>(json),
        "TelemetryResponse" => known::<t::TelemetryResponse>(json),
        "TokenResponse" => known::<t::TokenResponse>(json),
        "Whoami" => known::<t::Whoami>(json),
        other => panic!("no type for {other}"),
    }
}

/// The value is kept, and not as one that this version does not know.
fn known<T: DeserializeOwned + Serialize + Debug>(json: &Value) {
    keeps_meaning::<T>(json);
    let shown = format!("{:?}", decode::<T>(json));
    assert!(!shown.contains("Unknown("), "{shown}");
}

/// A kind that is not known is kept whole, and so are the rows beside it.
fn unknown<T: DeserializeOwned + Serialize + Debug>(json: Value) {
    keeps_meaning::<T>(&json);
    let shown = format!("{:?}", decode::<T>(&json));
    assert!(shown.contains("Unknown("), "{shown}");
}

#[test]
fn kinds_from_the_future_are_kept_whole() {
    unknown::<t::UsageInfo>(json!({"type": "teleport", "n": 1}));
    unknown::<t::SessionStatus>(json!({"type": "asleep", "since": "x"}));
    unknown::<t::SessionStatus>(json!({"type": "client_finished", "reason": {"type": "bored"}}));
    unknown::<t::SessionFailure>(json!({"type": "moon", "phase": 2}));
    unknown::<t::Completion>(json!({"state": "half_done", "request_id": "r"}));
    unknown::<t::TelemetryEvent>(json!({"event": "DREAM", "event_id": "e"}));
    unknown::<t::TraceStatus>(json!("archived"));
    unknown::<t::AuditEventType>(json!("moons"));
}

#[test]
fn a_sampler_of_a_kind_from_the_future_is_known_by_its_base_model() {
    let json = json!({
        "sampler_id": "S1:sample:0",
        "base_model": "m",
        "model_path": "tinker://r/merged_weights/a",
    });

    let sampler = decode::<t::SamplerInfo>(&json);

    assert_eq!(
        (sampler.base_model.as_str(), sampler.model_path),
        ("m", None)
    );
}

#[test]
fn the_end_of_a_ttl_is_sent_as_null() {
    let request = t::SetTtlRequest { ttl_seconds: None };

    assert_eq!(
        serde_json::to_value(request).unwrap(),
        json!({"ttl_seconds": null})
    );
}
