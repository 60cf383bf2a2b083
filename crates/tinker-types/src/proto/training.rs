//! Forward-backward: its request and its output.

use std::collections::BTreeMap;

use prost::Message;

use super::messages as pb;
use super::numbers::{MAX_EMPTY_ROWS, Result, dims, pack, pack_values, unpack, unpack_values};
use crate::{
    Datum, ForwardBackwardOutput, ForwardBackwardRequest, LossConfigValue, LossFn, LossFnOutput,
    TensorData, TypeError,
};

impl TryFrom<&ForwardBackwardRequest> for pb::ForwardBackwardRequest {
    type Error = TypeError;

    fn try_from(request: &ForwardBackwardRequest) -> Result<Self> {
        let seq_id = i32::try_from(request.seq_id).map_err(|_| {
            TypeError::new(format!("seq_id {} does not fit 32 bits", request.seq_id))
        })?;
        let mut numbers = BTreeMap::new();
        let mut values = BTreeMap::new();
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

/// Bytes that a datum takes beside its numbers: names, shapes, lengths.
const DATUM_OVERHEAD: usize = 256;

/// A request as it is sent, the same bytes as those of its message. It is written datum by datum,
/// so that one datum's worth of memory serves all: half the time of making the message first.
///
/// # Errors
/// If a datum holds what cannot be sent in protobuf, or the number does not fit 32 bits.
pub fn encode_forward_backward(request: &ForwardBackwardRequest) -> Result<Vec<u8>> {
    let rest = ForwardBackwardRequest {
        model_id: request.model_id.clone(),
        data: Vec::new(),
        loss_fn: request.loss_fn.clone(),
        loss_fn_config: request.loss_fn_config.clone(),
        ..*request
    };
    let after = pb::ForwardBackwardRequest::try_from(&rest)?;
    // Fields go in the order of their numbers: 1 and 2, the data, then the others.
    let before = pb::ForwardBackwardRequest {
        model_id: after.model_id,
        seq_id: after.seq_id,
        ..pb::ForwardBackwardRequest::default()
    };
    let after = pb::ForwardBackwardRequest {
        model_id: String::new(),
        seq_id: 0,
        ..after
    };
    let size = |datum: &Datum| datum.estimated_bytes() + DATUM_OVERHEAD;
    let n_bytes = request.data.iter().map(size).sum::<usize>();
    let mut bytes = Vec::with_capacity(n_bytes + DATUM_OVERHEAD);
    bytes.extend_from_slice(&before.encode_to_vec());
    for (i, datum) in request.data.iter().enumerate() {
        let datum = pb::Datum::try_from(datum)
            .map_err(|error| TypeError::new(format!("datum {i}: {error}")))?;
        prost::encoding::message::encode(3, &datum, &mut bytes);
    }
    bytes.extend_from_slice(&after.encode_to_vec());
    Ok(bytes)
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
    if n_data > counted.max(MAX_EMPTY_ROWS) {
        return Err(TypeError::new(format!(
            "output states {n_data} data and holds {counted}"
        )));
    }
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
    let inner = trailing
        .iter()
        .try_fold(1_usize, |product, &dim| product.checked_mul(dim))
        .ok_or_else(|| {
            TypeError::new(format!("output {name:?}: shape {trailing:?} is too large"))
        })?;
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
