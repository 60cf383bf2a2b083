//! Between the protobuf messages and the types of this crate.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;

use super::messages as pb;
use crate::{
    Chunk, Datum, ForwardBackwardOutput, ForwardBackwardRequest, LossConfigValue, LossFn,
    LossFnOutput, ModelInput, PromptAltTokens, ProvenanceSpan, SampleResponse, SampledSequence,
    SpanOf, SparseIndex, StopReason, TensorData, TensorValues, TopkLogprobs, TypeError,
};

/// Log-probability of a padding entry in a top-k table.
const TOPK_PAD: f32 = -99_999.0;

type Result<T> = std::result::Result<T, TypeError>;

/// A number with a fixed little-endian form.
trait LittleEndian: Copy {
    const WIDTH: usize;
    fn read(bytes: &[u8]) -> Self;
    fn write(self, bytes: &mut Vec<u8>);
}

macro_rules! little_endian {
    ($($type:ty),+) => {$(
        impl LittleEndian for $type {
            const WIDTH: usize = size_of::<Self>();

            fn read(bytes: &[u8]) -> Self {
                let mut word = [0; size_of::<Self>()];
                word.copy_from_slice(bytes);
                Self::from_le_bytes(word)
            }

            fn write(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }
        }
    )+};
}

little_endian!(f32, i32, i64, u16, u32);

fn pack<T: LittleEndian>(values: &[T]) -> Bytes {
    let mut bytes = Vec::with_capacity(values.len() * T::WIDTH);
    for value in values {
        value.write(&mut bytes);
    }
    bytes.into()
}

fn unpack<T: LittleEndian>(what: &str, bytes: &[u8]) -> Result<Vec<T>> {
    if !bytes.len().is_multiple_of(T::WIDTH) {
        return Err(TypeError::new(format!(
            "{what}: {} bytes are not a whole number of {}-byte values",
            bytes.len(),
            T::WIDTH
        )));
    }
    Ok(bytes.chunks_exact(T::WIDTH).map(T::read).collect())
}

fn unpack_tokens(what: &str, bytes: &[u8]) -> Result<Vec<u32>> {
    let tokens: Vec<i32> = unpack(what, bytes)?;
    tokens
        .into_iter()
        .map(|token| {
            u32::try_from(token)
                .map_err(|_| TypeError::new(format!("{what}: token {token} is negative")))
        })
        .collect()
}

fn unpack_values(what: &str, dtype: i32, bytes: &[u8]) -> Result<TensorValues> {
    Ok(match pb::DType::try_from(dtype) {
        Ok(pb::DType::Float32) => TensorValues::Float32(unpack(what, bytes)?),
        Ok(pb::DType::Int64) => TensorValues::Int64(unpack(what, bytes)?),
        Ok(pb::DType::Int32) => TensorValues::Int64(
            unpack::<i32>(what, bytes)?
                .into_iter()
                .map(i64::from)
                .collect(),
        ),
        Ok(pb::DType::Bfloat16) => TensorValues::Float32(
            unpack::<u16>(what, bytes)?
                .into_iter()
                .map(|half| f32::from_bits(u32::from(half) << 16))
                .collect(),
        ),
        Ok(pb::DType::Unspecified) | Err(_) => {
            return Err(TypeError::new(format!(
                "{what}: tensor has unknown dtype {dtype}"
            )));
        }
    })
}

fn pack_values(values: &TensorValues) -> (Bytes, pb::DType) {
    match values {
        TensorValues::Float32(values) => (pack(values), pb::DType::Float32),
        TensorValues::Int64(values) => (pack(values), pb::DType::Int64),
    }
}

fn dims(what: &str, shape: &[i64]) -> Result<Vec<usize>> {
    shape
        .iter()
        .map(|&dim| {
            usize::try_from(dim).map_err(|_| {
                TypeError::new(format!("{what}: shape {shape:?} has a negative dimension"))
            })
        })
        .collect()
}

/// Reads a tensor; `what` names it in errors.
///
/// # Errors
/// If the bytes, dtype and shape disagree.
fn tensor_from_proto(what: &str, tensor: &pb::Tensor) -> Result<TensorData> {
    let named = |error: TypeError| TypeError::new(format!("{what}: {error}"));
    let shape = dims(what, &tensor.shape)?;
    match &tensor.layout {
        Some(pb::tensor::Layout::SparseCsr(csr)) => {
            let values = unpack_values(what, tensor.dtype, &csr.values)?;
            let index = SparseIndex {
                crow_indices: unpack(what, &csr.crow_indices)?,
                col_indices: unpack(what, &csr.col_indices)?,
            };
            TensorData::sparse(values, shape, index).map_err(named)
        }
        Some(pb::tensor::Layout::Dense(bytes)) => dense(what, tensor.dtype, bytes, shape),
        // An empty bytes field of a oneof may be left out by other encoders.
        None => dense(what, tensor.dtype, &[], shape),
    }
}

fn dense(what: &str, dtype: i32, bytes: &[u8], shape: Vec<usize>) -> Result<TensorData> {
    let values = unpack_values(what, dtype, bytes)?;
    let shape = if shape.is_empty() {
        vec![values.len()]
    } else {
        shape
    };
    TensorData::dense(values, shape).map_err(|error| TypeError::new(format!("{what}: {error}")))
}

fn tensor_to_proto(tensor: &TensorData) -> pb::Tensor {
    let (bytes, dtype) = pack_values(tensor.values());
    let layout = match tensor.sparse_index() {
        None => pb::tensor::Layout::Dense(bytes),
        Some(index) => pb::tensor::Layout::SparseCsr(pb::SparseCsr {
            values: bytes,
            crow_indices: pack(&index.crow_indices),
            col_indices: pack(&index.col_indices),
        }),
    };
    let shape = tensor.shape().iter().map(|&dim| dim as i64).collect();
    pb::Tensor {
        layout: Some(layout),
        dtype: dtype.into(),
        shape,
    }
}

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

impl TryFrom<&ForwardBackwardRequest> for pb::ForwardBackwardRequest {
    type Error = TypeError;

    fn try_from(request: &ForwardBackwardRequest) -> Result<Self> {
        let seq_id = i32::try_from(request.seq_id).map_err(|_| {
            TypeError::new(format!("seq_id {} does not fit 32 bits", request.seq_id))
        })?;
        let mut numbers = HashMap::new();
        let mut values = HashMap::new();
        for (name, value) in &request.loss_fn_config {
            let value = match value {
                LossConfigValue::Number(number) => {
                    numbers.insert(name.clone(), *number);
                    pb::loss_config_value::Value::Number(*number)
                }
                LossConfigValue::Text(text) => pb::loss_config_value::Value::Text(text.clone()),
            };
            values.insert(name.clone(), pb::LossConfigValue { value: Some(value) });
        }
        Ok(Self {
            model_id: request.model_id.to_string(),
            seq_id,
            data: indexed(&request.data)?,
            loss_fn: request.loss_fn.to_string(),
            loss_fn_config: numbers,
            forward_only: request.forward_only,
            loss_fn_config_v2: values,
        })
    }
}

/// Converts each datum, naming its number in the error.
fn indexed<A, B>(data: &[A]) -> Result<Vec<B>>
where
    B: for<'a> TryFrom<&'a A, Error = TypeError>,
{
    data.iter()
        .enumerate()
        .map(|(i, datum)| {
            B::try_from(datum).map_err(|error| TypeError::new(format!("datum {i}: {error}")))
        })
        .collect()
}

impl TryFrom<&pb::ForwardBackwardRequest> for ForwardBackwardRequest {
    type Error = TypeError;

    fn try_from(request: &pb::ForwardBackwardRequest) -> Result<Self> {
        let numbers = request.loss_fn_config.iter();
        let mut config: BTreeMap<_, _> = numbers
            .map(|(name, n)| (name.clone(), LossConfigValue::Number(*n)))
            .collect();
        for (name, value) in &request.loss_fn_config_v2 {
            let value = match &value.value {
                Some(pb::loss_config_value::Value::Number(n)) => LossConfigValue::Number(*n),
                Some(pb::loss_config_value::Value::Text(t)) => LossConfigValue::Text(t.clone()),
                None => {
                    return Err(TypeError::new(format!(
                        "loss_fn_config {name:?} has no value"
                    )));
                }
            };
            config.insert(name.clone(), value);
        }
        let seq_id = u64::try_from(request.seq_id)
            .map_err(|_| TypeError::new(format!("seq_id {} is negative", request.seq_id)))?;
        Ok(Self {
            model_id: request.model_id.parse()?,
            seq_id,
            data: indexed(&request.data)?,
            loss_fn: LossFn::from(request.loss_fn.as_str()),
            loss_fn_config: config,
            forward_only: request.forward_only,
        })
    }
}

impl From<&ForwardBackwardOutput> for pb::ForwardBackwardOutput {
    /// Encodes runs of data whose tensors can share a record: same names, types and inner shapes.
    fn from(output: &ForwardBackwardOutput) -> Self {
        let mut records: Vec<pb::ArrayRecord> = Vec::new();
        let mut run: &[LossFnOutput] = &output.loss_fn_outputs;
        while let Some(first) = run.first() {
            let len = run.iter().take_while(|o| same_layout(first, o)).count();
            records.push(record_to_proto(&run[..len]));
            run = &run[len..];
        }
        Self {
            loss_fn_output_type: output.loss_fn_output_type.clone(),
            loss_fn_outputs: records,
            metrics: output
                .metrics
                .iter()
                .map(|(name, value)| (name.clone(), *value))
                .collect(),
        }
    }
}

fn same_layout(a: &LossFnOutput, b: &LossFnOutput) -> bool {
    let inner = |t: &TensorData| t.shape().get(1..).map(<[usize]>::to_vec);
    a.len() == b.len()
        && a.iter().zip(b).all(|((name_a, a), (name_b, b))| {
            name_a == name_b && a.dtype() == b.dtype() && inner(a) == inner(b)
        })
}

fn record_to_proto(data: &[LossFnOutput]) -> pb::ArrayRecord {
    let names = data.first().into_iter().flat_map(LossFnOutput::keys);
    let fields = names
        .map(|name| {
            let tensors: Vec<TensorData> = data
                .iter()
                .filter_map(|datum| datum.get(name))
                .map(TensorData::to_dense)
                .collect();
            (name.clone(), batch_to_proto(&tensors))
        })
        .collect();
    pb::ArrayRecord {
        type_tag: "ArrayRecord".into(),
        fields,
        num_datums: data.len() as i64,
    }
}

fn batch_to_proto(tensors: &[TensorData]) -> pb::BatchedTensor {
    let mut data = Vec::new();
    let mut offsets = vec![0_i64];
    let mut dtype = pb::DType::Float32;
    for tensor in tensors {
        let (bytes, element) = pack_values(tensor.values());
        dtype = element;
        data.extend_from_slice(&bytes);
        offsets.push(data.len() as i64);
    }
    let shape = tensors.first().map_or(&[][..], TensorData::shape);
    pb::BatchedTensor {
        data: data.into(),
        offsets: pack(&offsets),
        dtype: dtype.into(),
        trailing_shape: shape.iter().skip(1).map(|&dim| dim as i64).collect(),
    }
}

impl TryFrom<&pb::ForwardBackwardOutput> for ForwardBackwardOutput {
    type Error = TypeError;

    fn try_from(output: &pb::ForwardBackwardOutput) -> Result<Self> {
        let mut outputs = Vec::new();
        for record in &output.loss_fn_outputs {
            outputs.extend(record_from_proto(record)?);
        }
        let full_name = &output.loss_fn_output_type;
        Ok(Self {
            loss_fn_output_type: full_name.rsplit(':').next().unwrap_or(full_name).to_owned(),
            loss_fn_outputs: outputs,
            metrics: output
                .metrics
                .iter()
                .map(|(name, value)| (name.clone(), *value))
                .collect(),
        })
    }
}

fn record_from_proto(record: &pb::ArrayRecord) -> Result<Vec<LossFnOutput>> {
    let batches = record
        .fields
        .iter()
        .map(|(name, batch)| Ok((name, batch_from_proto(name, batch)?)))
        .collect::<Result<Vec<_>>>()?;
    let stated = usize::try_from(record.num_datums).unwrap_or(0);
    let counted = batches.first().map_or(0, |(_, tensors)| tensors.len());
    let n_data = if stated == 0 { counted } else { stated };
    let mut outputs = vec![LossFnOutput::new(); n_data];
    for (name, tensors) in batches {
        if tensors.len() != n_data {
            return Err(TypeError::new(format!(
                "output {name:?} has {} data instead of {n_data}",
                tensors.len()
            )));
        }
        for (output, tensor) in outputs.iter_mut().zip(tensors) {
            output.insert(name.clone(), tensor);
        }
    }
    Ok(outputs)
}

fn batch_from_proto(name: &str, batch: &pb::BatchedTensor) -> Result<Vec<TensorData>> {
    let offsets: Vec<i64> = unpack(name, &batch.offsets)?;
    let trailing = dims(name, &batch.trailing_shape)?;
    let inner: usize = trailing.iter().product();
    offsets
        .windows(2)
        .map(|ends| {
            let range = match (usize::try_from(ends[0]), usize::try_from(ends[1])) {
                (Ok(start), Ok(end)) => batch.data.get(start..end),
                _ => None,
            };
            let bytes = range.ok_or_else(|| {
                TypeError::new(format!(
                    "output {name:?}: offsets {ends:?} are outside the data"
                ))
            })?;
            let values = unpack_values(name, batch.dtype, bytes)?;
            let rows = values.len().checked_div(inner).unwrap_or(0);
            let shape = std::iter::once(rows)
                .chain(trailing.iter().copied())
                .collect();
            TensorData::dense(values, shape)
        })
        .collect()
}

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
    if k.checked_mul(length) != Some(tokens.len()) || tokens.len() != logprobs.len() {
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
