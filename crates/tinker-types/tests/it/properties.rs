//! Round trips of random values, and decoders that refuse random bytes without panicking.

use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tinker_types::*;

use crate::strategies::*;

fn through_json<T: Serialize + DeserializeOwned>(value: &T) -> T {
    serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap()
}

/// Encodes to bytes by way of `M` and reads them back.
fn through_proto<'a, T, M>(value: &'a T) -> T
where
    M: Message + Default,
    M: TryFrom<&'a T, Error: std::fmt::Debug>,
    T: for<'b> TryFrom<&'b M, Error = TypeError>,
{
    let bytes = M::try_from(value).unwrap().encode_to_vec();
    T::try_from(&M::decode(&bytes[..]).unwrap()).unwrap()
}

/// JSON has no infinities: they come back as null, which reads as NaN.
fn is_finite(tensor: &TensorData) -> bool {
    tensor
        .as_floats()
        .is_none_or(|values| values.iter().all(|v| v.is_finite()))
        && tensor
            .to_dense()
            .as_floats()
            .is_none_or(|values| values.iter().all(|v| v.is_finite()))
}

proptest! {
    #[test]
    fn tensors_survive_json(tensor in tensor().prop_filter("finite", is_finite)) {
        prop_assert_eq!(through_json(&tensor), tensor);
    }

    #[test]
    fn dense_form_keeps_listed_values(tensor in tensor()) {
        let dense = tensor.to_dense();

        prop_assert_eq!(dense.shape(), tensor.shape());
        prop_assert!(dense.sparse_index().is_none());
        prop_assert_eq!(dense.values().len(), tensor.shape().iter().product::<usize>());
    }

    #[test]
    fn chunks_survive_json(chunk in json_chunk()) {
        prop_assert_eq!(through_json(&chunk), chunk);
    }

    #[test]
    fn forward_backward_requests_survive_protobuf(request in forward_backward()) {
        let again: ForwardBackwardRequest =
            through_proto::<_, proto::ForwardBackwardRequest>(&request);

        prop_assert_eq!(again, request);
    }

    #[test]
    fn forward_backward_outputs_survive_protobuf(output in output()) {
        let again: ForwardBackwardOutput = through_proto::<_, proto::ForwardBackwardOutput>(&output);

        prop_assert_eq!(again, output);
    }

    #[test]
    fn sample_responses_survive_protobuf(response in sample_response()) {
        let again: SampleResponse = through_proto::<_, proto::SampleResponse>(&response);

        prop_assert_eq!(again, response);
    }

    #[test]
    fn paths_print_what_they_parse(run in "[!-.0-~]{1,40}", kind in 0..3_usize, name in "[!-.0-\\[\\]-~]{1,40}") {
        prop_assume!(name != "." && name != "..");
        let segment = ["weights", "sampler_weights", "external_weights"][kind];
        let text = format!("tinker://{run}/{segment}/{name}");

        let path: TinkerPath = text.parse().unwrap();

        prop_assert_eq!(path.to_string(), text.clone());
        prop_assert_eq!(through_json(&path), path);
    }

    #[test]
    fn any_text_parses_to_itself_or_is_refused(text in prop_oneof![".{0,60}", "tinker://.{0,40}", "tinker://[a-z/_.]{0,40}"]) {
        if let Ok(path) = text.parse::<TinkerPath>() {
            prop_assert_eq!(path.to_string(), text.clone());
        }
        if let Ok(id) = text.parse::<CheckpointId>() {
            prop_assert_eq!(id.to_string(), text.clone());
        }
        if let Ok(id) = text.parse::<RequestId>() {
            prop_assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn ids_survive_json(text in id_text()) {
        let id: SessionId = text.parse().unwrap();

        prop_assert_eq!(through_json(&id), id);
    }

    #[test]
    fn random_bytes_never_panic_the_protobuf_decoders(bytes in vec(any::<u8>(), 0..200)) {
        check_decoders(&bytes);
    }

    /// Real messages with a few bytes changed get much deeper than random ones.
    #[test]
    fn damaged_messages_never_panic_the_decoders(
        request in forward_backward(),
        response in sample_response(),
        output in output(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let messages = [
            proto::ForwardBackwardRequest::try_from(&request).unwrap().encode_to_vec(),
            proto::SampleResponse::from(&response).encode_to_vec(),
            proto::ForwardBackwardOutput::from(&output).encode_to_vec(),
        ];
        for mut bytes in messages {
            if !bytes.is_empty() {
                for (index, byte) in &damage {
                    let index = index.index(bytes.len());
                    bytes[index] = *byte;
                }
            }
            check_decoders(&bytes);
        }
    }

    #[test]
    fn random_text_never_panics_the_json_decoders(text in ".{0,80}") {
        let _ = FutureReply::from_json(text.as_bytes());
        let _ = serde_json::from_str::<Chunk>(&text);
        let _ = serde_json::from_str::<TensorData>(&text);
        let _ = serde_json::from_str::<SampleRequest>(&text);
    }

    /// Shapes and indices that disagree are errors, never panics.
    #[test]
    fn disagreeing_tensors_are_refused(
        shape in vec(any::<u64>(), 0..4),
        crow in prop::option::of(vec(any::<i64>(), 0..4)),
        col in prop::option::of(vec(any::<i64>(), 0..4)),
        n in 0..6_usize,
    ) {
        let json = serde_json::json!({
            "dtype": "float32", "data": vec![0.5; n], "shape": shape,
            "sparse_crow_indices": crow, "sparse_col_indices": col,
        });

        if let Ok(tensor) = serde_json::from_value::<TensorData>(json) {
            let n_cells: usize = tensor.shape().iter().product();
            prop_assert!(tensor.sparse_index().is_some() || n_cells == n);
        }
    }
}

fn check_decoders(bytes: &[u8]) {
    if let Ok(message) = proto::ForwardBackwardRequest::decode(bytes) {
        let _ = ForwardBackwardRequest::try_from(&message);
    }
    if let Ok(message) = proto::ForwardBackwardOutput::decode(bytes) {
        let _ = ForwardBackwardOutput::try_from(&message);
    }
    if let Ok(message) = proto::SampleResponse::decode(bytes) {
        let _ = SampleResponse::try_from(&message);
    }
}
