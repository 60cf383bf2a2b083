//! Accepted work: its kinds, the form its request is logged in, and what it comes to.

use bytes::Bytes;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tinker_types::{
    CreateModelRequest, ErrorCategory, FailedFuture, ForwardBackwardRequest, GradientStatsRequest,
    LoadWeightsRequest, OptimStepRequest, RequestId, SampleRequest, SamplingSessionId,
    SaveWeightsExternalRequest, SaveWeightsForSamplerRequest, SaveWeightsRequest, TrainingRunId,
    TypeError, ZeroGradRequest, proto,
};

use crate::error::Error;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OpKind {
    /// Makes a training run with a fresh adapter.
    CreateModel,
    /// Makes a training run from a checkpoint.
    CreateFromWeights,
    ForwardBackward,
    OptimStep,
    ZeroGrad,
    GradientStats,
    SaveWeights,
    SaveWeightsForSampler,
    SaveWeightsExternal,
    /// Puts a checkpoint in the place of a run's weights.
    LoadWeights,
    Sample,
    /// Stands for an operation that never arrived and was given up: its number is used up.
    Missing,
}

impl OpKind {
    /// Whether it makes its training run.
    pub(crate) const fn creates_run(self) -> bool {
        matches!(self, Self::CreateModel | Self::CreateFromWeights)
    }

    /// Whether it writes weights to the disk.
    pub(crate) const fn saves(self) -> bool {
        matches!(
            self,
            Self::SaveWeights | Self::SaveWeightsForSampler | Self::SaveWeightsExternal
        )
    }

    /// Whether two bodies are the same protobuf or JSON value; map order may differ.
    pub(crate) fn same_request(self, a: &[u8], b: &[u8]) -> bool {
        if a == b {
            return true;
        }
        if self == Self::ForwardBackward {
            let parse = |body| proto::ForwardBackwardRequest::decode(body).ok();
            return parse(a).is_some_and(|a| Some(a) == parse(b));
        }
        let parse = |body| serde_json::from_slice::<serde_json::Value>(body).ok();
        parse(a).is_some_and(|a| Some(a) == parse(b))
    }
}

/// A decoded operation of a training run.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    CreateModel(CreateModelRequest),
    CreateFromWeights(LoadWeightsRequest),
    ForwardBackward(ForwardBackwardRequest),
    OptimStep(OptimStepRequest),
    ZeroGrad,
    GradientStats,
    SaveWeights(SaveWeightsRequest),
    SaveWeightsForSampler(SaveWeightsForSamplerRequest),
    SaveWeightsExternal(SaveWeightsExternalRequest),
    LoadWeights(LoadWeightsRequest),
}

impl Operation {
    /// Decodes a logged body. An error is the operation's result: its number is used up.
    pub(crate) fn decode(kind: OpKind, body: &[u8]) -> Result<Self, TypeError> {
        Ok(match kind {
            OpKind::CreateModel => Self::CreateModel(json(body)?),
            OpKind::CreateFromWeights => Self::CreateFromWeights(json(body)?),
            OpKind::ForwardBackward => {
                let message = proto::ForwardBackwardRequest::decode(body)
                    .map_err(|e| TypeError::new(e.to_string()))?;
                Self::ForwardBackward(ForwardBackwardRequest::try_from(&message)?)
            }
            OpKind::OptimStep => Self::OptimStep(json(body)?),
            OpKind::ZeroGrad => json::<ZeroGradRequest>(body).map(|_| Self::ZeroGrad)?,
            OpKind::GradientStats => {
                json::<GradientStatsRequest>(body).map(|_| Self::GradientStats)?
            }
            OpKind::SaveWeights => Self::SaveWeights(json(body)?),
            OpKind::SaveWeightsForSampler => Self::SaveWeightsForSampler(json(body)?),
            OpKind::SaveWeightsExternal => Self::SaveWeightsExternal(json(body)?),
            OpKind::LoadWeights => Self::LoadWeights(json(body)?),
            OpKind::Sample | OpKind::Missing => {
                return Err(TypeError::new("this is no operation of a training run"));
            }
        })
    }

    /// Whether it changes the adapter, and so must be repeated when a run is rebuilt.
    pub(crate) const fn changes_adapter(&self) -> bool {
        match self {
            Self::ForwardBackward(request) => !request.forward_only,
            Self::CreateModel(_)
            | Self::CreateFromWeights(_)
            | Self::OptimStep(_)
            | Self::ZeroGrad
            | Self::LoadWeights(_) => true,
            Self::GradientStats
            | Self::SaveWeights(_)
            | Self::SaveWeightsForSampler(_)
            | Self::SaveWeightsExternal(_) => false,
        }
    }
}

/// Decodes a logged sample request.
pub(crate) fn decode_sample(body: &[u8]) -> Result<SampleRequest, TypeError> {
    json(body)
}

fn json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, TypeError> {
    serde_json::from_slice(body).map_err(|e| TypeError::new(format!("request body: {e}")))
}

/// The future of a run's operation. Derived, so that it is the same after any crash.
pub(crate) fn run_request_id(run: &TrainingRunId, seq: u64) -> Result<RequestId, TypeError> {
    format!("{run}:op:{seq}").parse()
}

/// The future of a sampler's numbered request.
pub(crate) fn sample_request_id(
    sampler: &SamplingSessionId,
    seq: u64,
) -> Result<RequestId, TypeError> {
    format!("{sampler}:op:{seq}").parse()
}

/// How a result is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Form {
    Json,
    /// A protobuf `ForwardBackwardOutput`.
    OutputProto,
    /// A protobuf `SampleResponse`.
    SampleProto,
    /// A [`FailedFuture`] in JSON.
    Failed,
}

/// The result of an operation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) form: Form,
    pub(crate) body: Bytes,
}

impl Outcome {
    /// A JSON result.
    pub(crate) fn json<T: Serialize>(value: &T) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self {
                form: Form::Json,
                body: body.into(),
            },
            Err(error) => Self::failed(ErrorCategory::Server, error.to_string()),
        }
    }

    /// A failure.
    pub(crate) fn failed(category: ErrorCategory, message: impl Into<String>) -> Self {
        let failure = FailedFuture {
            error: message.into(),
            category,
        };
        // Two strings always serialise.
        let body = serde_json::to_vec(&failure).unwrap_or_default();
        Self {
            form: Form::Failed,
            body: body.into(),
        }
    }

    /// A failure that is the caller's to mend.
    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::failed(ErrorCategory::User, message)
    }

    /// The result itself, or a failure if it is larger than `limit` bytes.
    pub(crate) fn bounded(self, limit: usize) -> Self {
        let n_bytes = self.body.len();
        if n_bytes <= limit {
            return self;
        }
        Self::refused(format!(
            "result too large ({n_bytes} bytes, limit {limit}): ask for less in one request"
        ))
    }

    /// Whether it is a failure.
    pub(crate) fn is_failure(&self) -> bool {
        self.form == Form::Failed
    }
}

impl From<Error> for Outcome {
    fn from(error: Error) -> Self {
        use tinker_engine::Error as Engine;
        match &error {
            Error::Invalid(_)
            | Error::NotFound(_)
            | Error::Conflict(_)
            | Error::OverQuota(_)
            | Error::NoMemory(_)
            | Error::Corrupt { .. }
            | Error::Newer { .. }
            | Error::Engine(Engine::Invalid(_) | Engine::NotFinite(_) | Engine::Model { .. }) => {
                Self::refused(error.to_string())
            }
            _ => {
                tracing::error!(error = error.with_causes(), "operation failed");
                Self::failed(ErrorCategory::Server, error.with_causes())
            }
        }
    }
}
