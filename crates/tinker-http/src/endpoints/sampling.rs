//! Samplers and samples.

use reqwest::Method;
use tinker_types::{
    ASAMPLE, CREATE_SAMPLING_SESSION, Chunk, CreateSamplingSessionRequest,
    CreateSamplingSessionResponse, JOIN_SAMPLING_SESSION, JoinSamplingSessionRequest,
    JoinSamplingSessionResponse, SAMPLERS, SampleRequest, SamplerInfo, SamplingSessionId,
    UntypedFuture,
};

use crate::call::{Body, Call};
use crate::client::Client;
use crate::error::{Error, ErrorKind, Result};
use crate::machine::RetryPolicy;
use crate::pools::TrafficClass;

/// Prompts above this size in bytes count as large.
const LARGE_PROMPT: usize = 1 << 20;

/// The server's answer to a sample submission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AsampleReply {
    /// Taken.
    Accepted(UntypedFuture),
    /// Not now (429): every sender should hold back, then send the same request again.
    Backpressure {
        /// Why, if the server says so.
        reason: Option<String>,
    },
}

impl Client {
    /// Creates a sampler.
    ///
    /// Endpoint: `POST /api/v1/create_sampling_session`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn create_sampling_session(
        &self,
        request: &CreateSamplingSessionRequest,
    ) -> Result<CreateSamplingSessionResponse> {
        let call = Call::post(self, TrafficClass::Sample, CREATE_SAMPLING_SESSION, request)?;
        self.send(call).await?.json()
    }

    /// Describes a sampler.
    ///
    /// Endpoint: `GET /api/v1/samplers/{id}`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_sampler(&self, id: &SamplingSessionId) -> Result<SamplerInfo> {
        let url = self.base_url().join(SAMPLERS, [id.as_str()]);
        self.send(Call::get(self, TrafficClass::Rest, url))
            .await?
            .json()
    }

    /// Takes a number for one more client of a sampler, so that their samples do not collide.
    ///
    /// Endpoint: `POST /api/v1/join_sampling_session`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn join_sampling_session(&self, id: &SamplingSessionId) -> Result<u64> {
        let request = JoinSamplingSessionRequest {
            sampling_session_id: id.clone(),
            tag: tinker_types::JoinSamplingSessionTag,
        };
        let call = Call::post(self, TrafficClass::Sample, JOIN_SAMPLING_SESSION, &request)?;
        let answer: JoinSamplingSessionResponse = self.send(call).await?.json()?;
        Ok(answer.client_counter)
    }

    /// Submits a sample; its future brings a `SampleResponse`.
    ///
    /// A 429 is not an error here, and is not repeated: the senders of a client hold back together.
    /// `policy` rules the other failures.
    ///
    /// Endpoint: `POST /api/v1/asample`.
    ///
    /// # Errors
    /// If the call fails otherwise.
    pub async fn asample(
        &self,
        request: &SampleRequest,
        policy: RetryPolicy,
    ) -> Result<AsampleReply> {
        let body = encode(request).await?;
        let url = self.base_url().join(ASAMPLE, []);
        let call = Call::new(self, Method::POST, TrafficClass::Sample, url)
            .body(body)
            .header("x-tinker-sampling-backpressure", "1")
            .retry(policy)
            .surface_throttling();
        match self.send(call).await {
            Ok(answer) => answer.json().map(AsampleReply::Accepted),
            Err(error) if is_backpressure(&error) => Ok(AsampleReply::Backpressure {
                reason: Some(error.message().to_owned()),
            }),
            Err(error) => Err(error),
        }
    }
}

/// Large prompts are encoded beside the runtime, not on it.
async fn encode(request: &SampleRequest) -> Result<Body> {
    let chunks = &request.prompt.chunks;
    if chunks.iter().map(Chunk::estimated_bytes).sum::<usize>() <= LARGE_PROMPT {
        return Body::json(request);
    }
    let request = request.clone();
    tokio::task::spawn_blocking(move || Body::json(&request))
        .await
        .map_err(|error| {
            Error::new(ErrorKind::InvalidRequest, "encoding the prompt stopped").with_source(error)
        })?
}

const fn is_backpressure(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::RateLimited { .. })
}
