//! Training examples: chunks, loss inputs and provenance spans.

use std::collections::BTreeMap;

use super::messages as pb;
use super::numbers::{Result, pack, unpack_tokens};
use super::tensors::{tensor_from_proto, tensor_to_proto};
use crate::{Chunk, Datum, ModelInput, ProvenanceSpan, SpanOf, TypeError};

fn chunk_to_proto(chunk: &Chunk) -> Result<pb::Chunk> {
    let kind = match chunk {
        Chunk::EncodedText { tokens } => pb::chunk::Kind::EncodedText(pb::EncodedTextChunk {
            tokens: pack(tokens),
        }),
        Chunk::Image {
            data,
            format,
            expected_tokens,
        } => pb::chunk::Kind::Image(pb::ImageChunk {
            data: data.clone(),
            format: format.clone(),
            expected_tokens: expected_tokens.and_then(|n| i32::try_from(n).ok()),
            override_dimensions: None,
        }),
        Chunk::Dmel { dmel } => pb::chunk::Kind::Dmel(pb::DmelChunk { dmel: dmel.clone() }),
        Chunk::ImageAssetPointer { location, .. } => {
            return Err(TypeError::new(format!(
                "image asset pointer {location:?} cannot be trained on: send the image itself"
            )));
        }
    };
    Ok(pb::Chunk { kind: Some(kind) })
}

fn chunk_from_proto(chunk: &pb::Chunk) -> Result<Chunk> {
    Ok(match &chunk.kind {
        Some(pb::chunk::Kind::EncodedText(text)) => Chunk::EncodedText {
            tokens: unpack_tokens("model_input", &text.tokens)?,
        },
        Some(pb::chunk::Kind::Image(image)) => Chunk::Image {
            data: image.data.clone(),
            format: image.format.clone(),
            expected_tokens: image.expected_tokens.and_then(|n| u32::try_from(n).ok()),
        },
        Some(pb::chunk::Kind::Dmel(dmel)) => Chunk::Dmel {
            dmel: dmel.dmel.clone(),
        },
        None => return Err(TypeError::new("model_input holds a chunk of unknown kind")),
    })
}

fn spans_to_proto(spans: Option<&Vec<ProvenanceSpan>>) -> Vec<pb::ProvenanceSpan> {
    let span = |s: &SpanOf| pb::Span {
        sequence_id: s.sequence_id.clone(),
        offset: s.offset as i64,
        length: s.length as i64,
    };
    spans
        .into_iter()
        .flatten()
        .map(|s| pb::ProvenanceSpan {
            kind: Some(match s {
                ProvenanceSpan::PromptTokens(of) => {
                    pb::provenance_span::Kind::PromptTokens(span(of))
                }
                ProvenanceSpan::SampledTokens(of) => {
                    pb::provenance_span::Kind::SampledTokens(span(of))
                }
            }),
        })
        .collect()
}

fn spans_from_proto(spans: &[pb::ProvenanceSpan]) -> Result<Option<Vec<ProvenanceSpan>>> {
    if spans.is_empty() {
        return Ok(None);
    }
    let span = |s: &pb::Span| match (u64::try_from(s.offset), u64::try_from(s.length)) {
        (Ok(offset), Ok(length)) => Ok(SpanOf {
            sequence_id: s.sequence_id.clone(),
            offset,
            length,
        }),
        _ => Err(TypeError::new(format!(
            "provenance span of {:?} is negative",
            s.sequence_id
        ))),
    };
    spans
        .iter()
        .map(|s| match &s.kind {
            Some(pb::provenance_span::Kind::PromptTokens(of)) => {
                Ok(ProvenanceSpan::PromptTokens(span(of)?))
            }
            Some(pb::provenance_span::Kind::SampledTokens(of)) => {
                Ok(ProvenanceSpan::SampledTokens(span(of)?))
            }
            None => Err(TypeError::new("provenance span of unknown kind")),
        })
        .collect::<Result<_>>()
        .map(Some)
}

impl TryFrom<&Datum> for pb::Datum {
    type Error = TypeError;

    fn try_from(datum: &Datum) -> Result<Self> {
        Ok(Self {
            model_input: datum
                .model_input
                .chunks
                .iter()
                .map(chunk_to_proto)
                .collect::<Result<_>>()?,
            loss_fn_inputs: datum
                .loss_fn_inputs()
                .iter()
                .map(|(name, tensor)| (name.clone(), tensor_to_proto(tensor)))
                .collect(),
            model_input_spans: spans_to_proto(datum.model_input_spans.as_ref()),
            loss_fn_input_spans: spans_to_proto(datum.loss_fn_input_spans.as_ref()),
        })
    }
}

impl TryFrom<&pb::Datum> for Datum {
    type Error = TypeError;

    fn try_from(datum: &pb::Datum) -> Result<Self> {
        let chunks = datum
            .model_input
            .iter()
            .map(chunk_from_proto)
            .collect::<Result<_>>()?;
        let inputs = datum
            .loss_fn_inputs
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), tensor_from_proto(name, tensor)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        let mut parsed = Self::from_wire(ModelInput { chunks }, inputs);
        parsed.model_input_spans = spans_from_proto(&datum.model_input_spans)?;
        parsed.loss_fn_input_spans = spans_from_proto(&datum.loss_fn_input_spans)?;
        Ok(parsed)
    }
}
