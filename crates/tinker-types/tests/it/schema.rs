//! The hand-written messages against the official SDK's schema: numbers, types, presence.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;
use serde::Deserialize;
use tinker_types::proto as pb;

use crate::support::{base64, fixture};
use crate::wire::Schema;

/// Messages of the schema that nothing sends.
const UNUSED: [&str; 3] = ["SamplingParams", "StopStrings", "StopTokens"];

#[derive(Debug, Deserialize)]
struct Samples {
    samples: Vec<Sample>,
}

/// A message with every field set, as the SDK encodes it.
#[derive(Debug, Deserialize)]
struct Sample {
    message: String,
    bytes: String,
}

fn samples() -> Vec<(String, Vec<u8>)> {
    let samples: Samples = serde_json::from_str(&fixture("tinker_public.samples.json")).unwrap();
    samples
        .samples
        .into_iter()
        .map(|sample| (sample.message, base64(&sample.bytes)))
        .filter(|(message, _)| !UNUSED.contains(&message.as_str()))
        .collect()
}

/// Decodes with our message and encodes again; unknown fields would be lost on the way.
fn round_trip(message: &str, bytes: &[u8]) -> Vec<u8> {
    fn through<M: Message + Default>(bytes: &[u8]) -> Vec<u8> {
        M::decode(bytes).unwrap().encode_to_vec()
    }
    let through = match message {
        "SampleResponse" => through::<pb::SampleResponse>,
        "PromptAltTokens" => through::<pb::PromptAltTokens>,
        "SampledSequence" => through::<pb::SampledSequence>,
        "TopkLogprobs" => through::<pb::TopkLogprobs>,
        "SparseCsr" => through::<pb::SparseCsr>,
        "Tensor" => through::<pb::Tensor>,
        "BatchedTensor" => through::<pb::BatchedTensor>,
        "ArrayRecord" => through::<pb::ArrayRecord>,
        "ForwardBackwardOutput" => through::<pb::ForwardBackwardOutput>,
        "ForwardBackwardRequest" => through::<pb::ForwardBackwardRequest>,
        "LossConfigValue" => through::<pb::LossConfigValue>,
        "Datum" => through::<pb::Datum>,
        "ProvenanceSpan" => through::<pb::ProvenanceSpan>,
        "PromptProvenanceSpan" | "SampledProvenanceSpan" => through::<pb::Span>,
        "Chunk" => through::<pb::Chunk>,
        "EncodedTextChunk" => through::<pb::EncodedTextChunk>,
        "ImageChunk" => through::<pb::ImageChunk>,
        "ImageDimensions" => through::<pb::ImageDimensions>,
        "DmelChunk" => through::<pb::DmelChunk>,
        other => panic!("no message of ours for {other}"),
    };
    through(bytes)
}

#[test]
fn messages_encode_to_the_official_bytes() {
    for (message, bytes) in samples() {
        assert_eq!(round_trip(&message, &bytes), bytes, "{message}");
    }
}

#[test]
fn samples_set_every_field_of_every_message_in_use() {
    let schema = Schema::load();
    let mut seen: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    for (message, bytes) in samples() {
        let numbers = schema
            .canonical(&message, &bytes)
            .into_iter()
            .map(|(number, _)| number);
        seen.entry(message).or_default().extend(numbers);
    }

    let in_use = schema
        .messages()
        .filter(|name| !UNUSED.contains(&name.as_str()));
    for message in in_use {
        let all: BTreeSet<u64> = schema.fields(message).iter().map(|f| f.number).collect();
        assert_eq!(seen[message], all, "{message}");
    }
}

#[test]
fn enumerations_have_the_official_numbers() {
    let schema = Schema::load();

    let dtypes = ["UNSPECIFIED", "FLOAT32", "INT64", "INT32", "BFLOAT16"];
    let ours = [
        pb::DType::Unspecified,
        pb::DType::Float32,
        pb::DType::Int64,
        pb::DType::Int32,
        pb::DType::Bfloat16,
    ];
    let ours: BTreeMap<_, _> = dtypes
        .iter()
        .zip(ours)
        .map(|(name, d)| (format!("DTYPE_{name}"), d as i32))
        .collect();
    assert_eq!(schema.enums["DType"], ours);
    let reasons = [
        ("STOP", pb::StopReason::Stop),
        ("LENGTH", pb::StopReason::Length),
    ];
    let ours: BTreeMap<_, _> = reasons
        .map(|(name, r)| (format!("STOP_REASON_{name}"), r as i32))
        .into_iter()
        .collect();
    assert_eq!(schema.enums["StopReason"], ours);
}
