//! The client library of the Tinker API: train, sample and manage from async Rust.
//!
//! Start with a [`ServiceClient`]; it opens a session when first needed and creates
//! [`TrainingClient`]s, [`SamplingClient`]s and a [`RestClient`]. Calling a training method submits
//! the operation; awaiting the [`ApiFuture`] it returns brings the result. Operations of one
//! training client run in the order of the calls, whatever the order of the awaits.
//!
//! ```no_run
//! # async fn example(data: Vec<tinker_api::Datum>) -> tinker_api::Result<()> {
//! use tinker_api::{AdamParams, LoraConfig, LossFn, SaveOptions, ServiceClient};
//!
//! let service = ServiceClient::builder("http://127.0.0.1:8000")
//!     .api_key("tml-…".parse()?)
//!     .build()?;
//! let trainer = service
//!     .create_lora_training_client("tinker/nano", LoraConfig::default())
//!     .await?;
//! let pass = trainer.forward_backward(data, LossFn::CrossEntropy);
//! let step = trainer.optim_step(AdamParams::default());
//! println!("loss {}", pass.await?.metrics["loss:sum"]);
//! step.await?;
//! let path = trainer.save_state("final", SaveOptions::default()).await?;
//! println!("saved {path}");
//! # Ok(())
//! # }
//! ```

mod admin_client;
mod api_future;
mod batching;
pub mod blocking;
mod cancel;
pub mod cassette;
mod combine;
pub mod console;
pub mod custom_loss;
mod dialect;
mod dispatch;
pub mod download;
mod error;
mod exports;
#[cfg(doctest)]
mod guide;
mod heartbeat;
mod hint;
mod ledger;
mod loss;
mod options;
mod recovery;
mod resolve;
mod rest_client;
mod sample_numbers;
mod sample_queue;
mod sampler;
mod sampler_handle;
mod sampling_client;
mod service_client;
mod session;
mod submissions;
mod training_client;
mod turns;
mod uploaded_loss;

pub use admin_client::AdminClient;
pub use api_future::ApiFuture;
pub use error::{Error, Result};
pub use ledger::LedgerError;
pub use loss::Loss;
pub use options::{
    CopyOptions, ExportOptions, SampleOptions, SamplingSource, SaveOptions, StateOptions,
    TrainingOptions,
};
pub use recovery::{Recovery, RecoveryEvent, RecoveryPolicy, Start};
pub use rest_client::RestClient;
pub use sampler_handle::SamplerHandle;
pub use sampling_client::SamplingClient;
pub use service_client::{ServiceClient, ServiceClientBuilder};
pub use training_client::TrainingClient;
pub use uploaded_loss::LossHandle;

pub use tinker_http::{
    AccessScope, ApiKey, BaseUrl, CredentialOrigin, CredentialSources, Credentials, ErrorKind,
    Event, FlightState, InFlight, KeyOrigin, Page, PollPolicy, RequestType, RetryPolicy,
    StoredCredentials, StoredKey, Timeouts,
};
pub use tinker_types::{
    AdamParams, ApiKeyInfo, AuditEntry, AuditEventType, AuditLog, BackupImage, BillingUsage,
    Checkpoint, CheckpointId, CheckpointKind, CheckpointSearchCursor, CheckpointSearchRequest,
    CheckpointSearchResponse, CheckpointStorageUsage, CheckpointsResponse, Chunk, CustomLossGraph,
    CustomLossInput, CustomLossNode, Datum, DimuonParams, ErrorCategory, ExternalWeightsUrls,
    FinishKind, FinishReason, ForwardBackwardOutput, GetInfoResponse, LoraConfig, LossConfig,
    LossConfigValue, LossFn, ModelInput, OptimStepResponse, OptimizerConfig, OptimizerParams,
    ProjectId, PromptAltTokens, ProvenanceSpan, QueueState, RequestId, SampleResponse,
    SampledSequence, SamplerInfo, SamplerKind, SamplingParams, SamplingSessionId, SearchOwner,
    ServerCapabilities, SessionFailure, SessionId, SessionInfo, SessionSearchCursor,
    SessionSearchRequest, SessionSearchResponse, SessionStatus, SessionStatusQuery, SessionSummary,
    SignedUrl, SpanOf, StartUploadRequest, StartUploadResponse, Stop, StopReason, StorageRow,
    SupportedModel, TensorData, TensorValues, Timestamp, TinkerPath, TrainingRun, TrainingRunId,
    TrainingRunsResponse, TypeError, UsageEvent, UsageInfo, UserMetadata, WeightsInfo, Whoami,
};

/// The Rust in README.md compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
