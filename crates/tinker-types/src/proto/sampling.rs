//! Results of sampling.

use super::messages as pb;
use super::numbers::{MAX_EMPTY_ROWS, Result, pack, unpack, unpack_tokens};
use super::tensors::{tensor_from_proto, tensor_to_proto};
use crate::{
    PromptAltTokens, SampleResponse, SampledSequence, StopReason, TopkLogprobs, TypeError,
};

/// Log-probability of a padding entry in a top-k table.
const TOPK_PAD: f32 = -99_999.0;

fn topk_to_proto(table: &TopkLogprobs) -> pb::TopkLogprobs {
    let k = table.iter().flatten().map(Vec::len).max().unwrap_or(0);
    let mut token_ids = Vec::with_capacity(table.len() * k);
    let mut logprobs = Vec::with_capacity(table.len() * k);
    for row in table {
        let row = row.as_deref().unwrap_or(&[]);
        for i in 0..k {
            let (token, logprob) = row.get(i).copied().unwrap_or((0, TOPK_PAD));
            token_ids.push(token);
            logprobs.push(logprob);
        }
    }
    pb::TopkLogprobs {
        token_ids: pack(&token_ids),
        logprobs: pack(&logprobs),
        k: k as u32,
        length: table.len() as u32,
    }
}

fn topk_from_proto(table: &pb::TopkLogprobs) -> Result<TopkLogprobs> {
    let (k, length) = (table.k as usize, table.length as usize);
    let tokens = unpack_tokens("top-k tokens", &table.token_ids)?;
    let logprobs: Vec<f32> = unpack("top-k logprobs", &table.logprobs)?;
    let rows_without_entries = k == 0 && length > MAX_EMPTY_ROWS;
    if k.checked_mul(length) != Some(tokens.len())
        || tokens.len() != logprobs.len()
        || rows_without_entries
    {
        return Err(TypeError::new(format!(
            "top-k table of {length} x {k} holds {} tokens and {} log-probabilities",
            tokens.len(),
            logprobs.len()
        )));
    }
    if k == 0 {
        return Ok(vec![None; length]);
    }
    let is_pad = |entry: &(u32, f32)| entry.0 == 0 && entry.1 <= TOPK_PAD;
    let rows = tokens.chunks_exact(k).zip(logprobs.chunks_exact(k));
    Ok(rows
        .map(|(tokens, logprobs)| {
            let entries = tokens.iter().copied().zip(logprobs.iter().copied());
            let row: Vec<_> = entries.take_while(|entry| !is_pad(entry)).collect();
            (!row.is_empty()).then_some(row)
        })
        .collect())
}

impl From<&SampleResponse> for pb::SampleResponse {
    fn from(response: &SampleResponse) -> Self {
        let prompt_logprobs = response.prompt_logprobs.as_ref().map(|values| {
            let values: Vec<f32> = values
                .iter()
                .map(|value| value.unwrap_or(f32::NAN))
                .collect();
            pack(&values)
        });
        Self {
            sequences: response.sequences.iter().map(sequence_to_proto).collect(),
            prompt_logprobs,
            topk_prompt_logprobs: response.topk_prompt_logprobs.as_ref().map(topk_to_proto),
            prompt_cache_hit_tokens: i32::try_from(response.prompt_cache_hit_tokens)
                .unwrap_or(i32::MAX),
            target_prompt_logprobs: response
                .target_prompt_logprobs
                .as_ref()
                .map(tensor_to_proto),
            prompt_alt_tokens: response
                .prompt_alt_tokens
                .as_ref()
                .map(|alt| pb::PromptAltTokens {
                    tokens: Some(tensor_to_proto(&alt.tokens)),
                    logprobs: Some(tensor_to_proto(&alt.logprobs)),
                }),
        }
    }
}

fn sequence_to_proto(sequence: &SampledSequence) -> pb::SampledSequence {
    let stop_reason = match sequence.stop_reason {
        StopReason::Length => pb::StopReason::Length,
        _ => pb::StopReason::Stop,
    };
    pb::SampledSequence {
        stop_reason: stop_reason.into(),
        tokens: pack(&sequence.tokens),
        logprobs: sequence.logprobs.as_ref().map(|values| pack(values)),
        topk_sampled_logprobs: sequence.topk_logprobs.as_ref().map(topk_to_proto),
    }
}

impl TryFrom<&pb::SampleResponse> for SampleResponse {
    type Error = TypeError;

    fn try_from(response: &pb::SampleResponse) -> Result<Self> {
        let prompt_logprobs = match &response.prompt_logprobs {
            Some(bytes) if !bytes.is_empty() => {
                let values: Vec<f32> = unpack("prompt_logprobs", bytes)?;
                Some(
                    values
                        .into_iter()
                        .map(|v| (!v.is_nan()).then_some(v))
                        .collect(),
                )
            }
            _ => None,
        };
        let tensor = |what, tensor: &Option<pb::Tensor>| {
            tensor
                .as_ref()
                .map(|t| tensor_from_proto(what, t))
                .transpose()
        };
        let prompt_alt_tokens = match &response.prompt_alt_tokens {
            None => None,
            Some(alt) => match (
                tensor("alt tokens", &alt.tokens)?,
                tensor("alt logprobs", &alt.logprobs)?,
            ) {
                (Some(tokens), Some(logprobs)) => Some(PromptAltTokens { tokens, logprobs }),
                _ => {
                    return Err(TypeError::new(
                        "prompt_alt_tokens lacks tokens or log-probabilities",
                    ));
                }
            },
        };
        Ok(Self {
            sequences: response
                .sequences
                .iter()
                .map(sequence_from_proto)
                .collect::<Result<_>>()?,
            prompt_logprobs,
            topk_prompt_logprobs: response
                .topk_prompt_logprobs
                .as_ref()
                .map(topk_from_proto)
                .transpose()?,
            target_prompt_logprobs: tensor(
                "target_prompt_logprobs",
                &response.target_prompt_logprobs,
            )?,
            prompt_alt_tokens,
            prompt_cache_hit_tokens: u32::try_from(response.prompt_cache_hit_tokens).unwrap_or(0),
        })
    }
}

fn sequence_from_proto(sequence: &pb::SampledSequence) -> Result<SampledSequence> {
    let stop_reason = match pb::StopReason::try_from(sequence.stop_reason) {
        Ok(pb::StopReason::Stop) => StopReason::Stop,
        Ok(pb::StopReason::Length) => StopReason::Length,
        Err(_) => StopReason::Unknown(sequence.stop_reason.to_string()),
    };
    let logprobs = match &sequence.logprobs {
        Some(bytes) if !bytes.is_empty() => Some(unpack("logprobs", bytes)?),
        _ => None,
    };
    Ok(SampledSequence {
        stop_reason,
        tokens: unpack_tokens("sampled tokens", &sequence.tokens)?,
        logprobs,
        topk_logprobs: sequence
            .topk_sampled_logprobs
            .as_ref()
            .map(topk_from_proto)
            .transpose()?,
        sequence_id: None,
    })
}
