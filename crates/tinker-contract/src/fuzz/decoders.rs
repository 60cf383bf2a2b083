//! What reads answers and files, on the bytes of mutated requests: an error is fine, a panic is not.

use prost::Message as _;
use tinker_types::{
    ForwardBackwardOutput, ForwardBackwardRequest, SampleRequest, SampleResponse, TinkerPath, proto,
};

use super::mutate::Mutated;

/// Reads the body as everything that it could be.
pub(super) fn decode(request: &Mutated) {
    let bytes = &request.body[..];
    if let Ok(message) = proto::ForwardBackwardRequest::decode(bytes) {
        let _ = ForwardBackwardRequest::try_from(&message);
    }
    if let Ok(message) = proto::ForwardBackwardOutput::decode(bytes) {
        let _ = ForwardBackwardOutput::try_from(&message);
    }
    if let Ok(message) = proto::SampleResponse::decode(bytes) {
        let _ = SampleResponse::try_from(&message);
    }
    let _ = serde_json::from_slice::<SampleRequest>(bytes);
    let _ = String::from_utf8_lossy(bytes).parse::<TinkerPath>();
}
