//! Random values of the types.

use std::collections::BTreeMap;

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use tinker_types::*;

/// Any float but NaN, which is not equal to itself.
pub(crate) fn float() -> impl Strategy<Value = f32> {
    any::<f32>().prop_filter("not NaN", |v| !v.is_nan())
}

fn values(n: usize) -> impl Strategy<Value = TensorValues> {
    prop_oneof![
        vec(float(), n).prop_map(TensorValues::Float32),
        vec(any::<i64>(), n).prop_map(TensorValues::Int64),
    ]
}

fn dense() -> impl Strategy<Value = TensorData> {
    vec(0_usize..5, 1..4).prop_flat_map(|shape| {
        values(shape.iter().product())
            .prop_map(move |values| TensorData::dense(values, shape.clone()).unwrap())
    })
}

fn sparse() -> impl Strategy<Value = TensorData> {
    (vec(0_usize..4, 1..5), 4_usize..7).prop_flat_map(|(per_row, n_cols)| {
        let n = per_row.iter().sum();
        (values(n), vec(0..n_cols as i64, n)).prop_map(move |(values, col_indices)| {
            let mut crow_indices = vec![0_i64];
            for n in &per_row {
                crow_indices.push(crow_indices.last().unwrap() + *n as i64);
            }
            let index = SparseIndex {
                crow_indices,
                col_indices,
            };
            TensorData::sparse(values, vec![per_row.len(), n_cols], index).unwrap()
        })
    })
}

pub(crate) fn tensor() -> impl Strategy<Value = TensorData> {
    prop_oneof![3 => dense(), 1 => sparse()]
}

/// Tokens as protobuf carries them: non-negative 32-bit integers.
pub(crate) fn token() -> impl Strategy<Value = u32> {
    0..=i32::MAX as u32
}

/// Chunks that protobuf can carry.
pub(crate) fn chunk() -> impl Strategy<Value = Chunk> {
    let bytes = || vec(any::<u8>(), 0..40).prop_map(bytes::Bytes::from);
    prop_oneof![
        vec(token(), 0..20).prop_map(|tokens| Chunk::EncodedText { tokens }),
        (bytes(), option::of(token())).prop_map(|(data, expected_tokens)| Chunk::Image {
            data,
            format: "png".into(),
            expected_tokens,
        }),
        bytes().prop_map(|dmel| Chunk::Dmel { dmel }),
    ]
}

/// Chunks that JSON can carry, which are all.
pub(crate) fn json_chunk() -> impl Strategy<Value = Chunk> {
    let pointer = (".{0,12}", option::of(any::<u32>())).prop_map(|(location, expected_tokens)| {
        Chunk::ImageAssetPointer {
            format: "jpeg".into(),
            location,
            expected_tokens,
        }
    });
    prop_oneof![3 => chunk(), 1 => pointer]
}

/// Text that any id may be.
pub(crate) fn id_text() -> impl Strategy<Value = String> {
    "[!-~]{1,40}"
}

fn span() -> impl Strategy<Value = ProvenanceSpan> {
    (".{1,8}", 0..u64::MAX / 2, 0..u64::MAX / 2, any::<bool>()).prop_map(
        |(sequence_id, offset, length, prompt)| {
            let of = SpanOf {
                sequence_id,
                offset,
                length,
            };
            if prompt {
                ProvenanceSpan::PromptTokens(of)
            } else {
                ProvenanceSpan::SampledTokens(of)
            }
        },
    )
}

fn datum() -> impl Strategy<Value = Datum> {
    let inputs = btree_map("[a-z_]{1,12}", tensor(), 0..4);
    let spans = || option::of(vec(span(), 1..3));
    (vec(chunk(), 0..4), inputs, spans(), spans()).prop_map(|(chunks, inputs, a, b)| {
        let mut datum = Datum::from_wire(ModelInput { chunks }, inputs);
        datum.model_input_spans = a;
        datum.loss_fn_input_spans = b;
        datum
    })
}

fn loss_config() -> impl Strategy<Value = LossConfig> {
    let value = prop_oneof![
        float().prop_map(|v| LossConfigValue::Number(v.into())),
        ".{0,8}".prop_map(LossConfigValue::Text),
    ];
    btree_map("[a-z_]{1,12}", value, 0..3)
}

pub(crate) fn forward_backward() -> impl Strategy<Value = ForwardBackwardRequest> {
    let seq_id = 0..=i32::MAX as u64;
    let loss_fn = "[a-z_]{1,16}".prop_map(|name| LossFn::from(name.as_str()));
    (
        id_text(),
        seq_id,
        vec(datum(), 0..4),
        loss_fn,
        loss_config(),
        any::<bool>(),
    )
        .prop_map(
            |(model_id, seq_id, data, loss_fn, loss_fn_config, forward_only)| {
                ForwardBackwardRequest {
                    model_id: model_id.parse().unwrap(),
                    seq_id,
                    data,
                    loss_fn,
                    loss_fn_config,
                    forward_only,
                }
            },
        )
}

pub(crate) fn output() -> impl Strategy<Value = ForwardBackwardOutput> {
    // The wire keeps the number of rows only where a row has values.
    let field = dense().prop_filter("rows of values", |t| !t.shape()[1..].contains(&0));
    let record = btree_map("[a-z]{1,4}", field, 1..3);
    let metrics = btree_map("[a-z]{1,6}:(sum|mean)", float().prop_map(f64::from), 0..3);
    ("[A-Za-z]{0,8}", vec(record, 0..6), metrics).prop_map(
        |(loss_fn_output_type, loss_fn_outputs, metrics): (_, _, BTreeMap<_, _>)| {
            ForwardBackwardOutput {
                loss_fn_output_type,
                loss_fn_outputs,
                metrics,
            }
        },
    )
}

/// Tables without the pair that pads them: token 0 at -99999 or less.
pub(crate) fn topk() -> impl Strategy<Value = TopkLogprobs> {
    let row = vec((token(), -50.0_f32..=0.0), 1..4);
    vec(option::of(row), 1..6)
}

fn sequence() -> impl Strategy<Value = SampledSequence> {
    let reason = prop_oneof![Just(StopReason::Stop), Just(StopReason::Length)];
    let logprobs = option::of(vec(float(), 1..6));
    (reason, vec(token(), 0..6), logprobs, option::of(topk())).prop_map(
        |(stop_reason, tokens, logprobs, topk_logprobs)| SampledSequence {
            stop_reason,
            tokens,
            logprobs,
            topk_logprobs,
            sequence_id: None,
        },
    )
}

pub(crate) fn sample_response() -> impl Strategy<Value = SampleResponse> {
    let alt =
        (dense(), dense()).prop_map(|(tokens, logprobs)| PromptAltTokens { tokens, logprobs });
    (
        vec(sequence(), 0..3),
        option::of(vec(option::of(float()), 1..6)),
        option::of(topk()),
        option::of(tensor()),
        option::of(alt),
        token(),
    )
        .prop_map(
            |(sequences, prompt_logprobs, topk_prompt_logprobs, target, alt, hits)| {
                SampleResponse {
                    sequences,
                    prompt_logprobs,
                    topk_prompt_logprobs,
                    target_prompt_logprobs: target,
                    prompt_alt_tokens: alt,
                    prompt_cache_hit_tokens: hits,
                }
            },
        )
}
