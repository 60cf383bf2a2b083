//! One long poll for all samples of a sampler: which of them are done.

use serde::{Deserialize, Serialize};

use crate::tags::type_tag;
use crate::{RequestId, SamplingSessionId};

type_tag!(JoinSamplingSessionTag, "join_sampling_session");

/// Request of `POST /api/v1/retrieve_futures`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrieveFuturesRequest {
    /// Whose completions.
    pub target: CompletionsTarget,
    /// The cursor of the last answer, from 0; the server may forget what lies before it.
    pub prev_cursor: u64,
    /// Longest wait in seconds: 0 returns at once; absent lets the server hold the poll.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<f64>,
    /// Results that have been fetched; the server may delete them.
    #[serde(default)]
    pub retrieved_request_ids: Vec<RequestId>,
}

/// Whose completions to poll for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum CompletionsTarget {
    /// Samples of one client of a sampler.
    SamplingSession {
        /// The sampler.
        sampling_session_id: SamplingSessionId,
        /// Which client: `seq_id` of its samples divided by 10⁹.
        cloned_sampler_id: u64,
    },
}

/// Answer of `POST /api/v1/retrieve_futures`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrieveFuturesResponse {
    /// What ended since `prev_cursor`.
    pub completions: Vec<Completion>,
    /// Where to go on.
    pub cursor: u64,
}

/// The end of one sample; its result or its failure is fetched by `retrieve_future`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Completion {
    /// It has a result.
    Finished {
        /// The future.
        request_id: RequestId,
        /// Size of the result in bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        response_payload_uncompressed_size: Option<u64>,
    },
    /// It failed.
    Failed {
        /// The future.
        request_id: RequestId,
    },
    /// A state this version does not know.
    #[serde(untagged)]
    Unknown(serde_json::Value),
}

/// Request of `POST /api/v1/join_sampling_session`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinSamplingSessionRequest {
    /// The sampler.
    pub sampling_session_id: SamplingSessionId,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: JoinSamplingSessionTag,
}

/// Answer of `POST /api/v1/join_sampling_session`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinSamplingSessionResponse {
    /// A number that no other client of the sampler has; the first one has 0.
    pub client_counter: u64,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: JoinSamplingSessionTag,
}
