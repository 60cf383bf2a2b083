//! Health, capabilities and the settings that a server hands to clients.

use serde::{Deserialize, Serialize};

/// Answer of `GET /api/v1/healthz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthResponse {
    /// Always `ok`.
    pub status: String,
}

/// Answer of `GET /api/v1/get_server_capabilities`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ServerCapabilities {
    /// Base models on offer.
    pub supported_models: Vec<SupportedModel>,
    /// What this server does beyond the API, such as `zero_grad` and `gradient_stats`, which are the
    /// last parts of the paths that do it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extensions: Vec<String>,
    /// How the weights of base models are held where that is with fewer bits than in their files, such as
    /// `int8`: results differ from those of the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// What it computes in, such as `f32` or `bf16`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// What computes: `cpu`, `cuda`, or `auto` for a GPU with the models that it takes and the CPU with others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

/// A base model on offer; absent fields are unknown.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SupportedModel {
    /// Name to create runs with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
    /// Longest sequence in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_context_length: Option<u64>,
    /// Whether it can be trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trainable: Option<bool>,
    /// Whether it can be sampled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampleable: Option<bool>,
}

/// Request of `POST /api/v1/client/config` and `/api/v1/client/dynamic_config`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientConfigRequest {
    /// Version of the client.
    pub sdk_version: String,
}

/// Settings a server hands to a client at start; unknown ones are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClientConfig {
    /// Exchange the API key for a short-lived token.
    pub pjwt_auth_enabled: bool,
    /// `api_key`, or `credential_cmd` to insist on the credential command.
    pub credential_default_source: String,
    /// Byte budget of sample submissions.
    pub sample_dispatch_bytes_semaphore_size: u64,
    /// Byte budget of large results being fetched.
    pub inflight_response_bytes_semaphore_size: u64,
    /// Send the chunks of one call concurrently, the first one last.
    pub parallel_fwdbwd_chunks: bool,
    /// Compress forward-backward bodies with zstd.
    pub proto_compress_fwdbwd: bool,
    /// Most data per forward-backward request.
    pub fwdbwd_max_chunk_len: u64,
    /// Most estimated bytes per forward-backward request.
    pub fwdbwd_max_chunk_bytes_count: u64,
    /// Byte budget of forward-backward bodies being sent.
    pub fwdbwd_dispatch_bytes_semaphore_size: u64,
    /// How long billing refusals are waited out, in seconds.
    pub billing_exception_max_pause_duration_sec: u64,
    /// Surface failed samples instead of retrying them.
    pub sample_no_retries: bool,
    /// Fail samples when none has finished for a long time.
    pub sample_enable_stuck_detection: bool,
    /// Samples in flight per sampler.
    pub sample_max_concurrent_requests: u64,
    /// Wait for samples with one long poll per sampler.
    pub sample_use_retrieve_futures: bool,
    /// Upload traced custom losses.
    pub custom_loss_server_side: bool,
    /// Ask the server for a client number when a sampler is shared.
    pub sample_join_sampling_session: bool,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            pjwt_auth_enabled: false,
            credential_default_source: "api_key".into(),
            sample_dispatch_bytes_semaphore_size: 10 << 20,
            inflight_response_bytes_semaphore_size: 50 << 20,
            parallel_fwdbwd_chunks: true,
            proto_compress_fwdbwd: false,
            fwdbwd_max_chunk_len: 1024,
            fwdbwd_max_chunk_bytes_count: 5_000_000,
            fwdbwd_dispatch_bytes_semaphore_size: 50_000_000,
            billing_exception_max_pause_duration_sec: 3600,
            sample_no_retries: false,
            sample_enable_stuck_detection: true,
            sample_max_concurrent_requests: 2000,
            sample_use_retrieve_futures: false,
            custom_loss_server_side: false,
            sample_join_sampling_session: false,
        }
    }
}

/// Settings a client refreshes while it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DynamicConfig {
    /// Seconds between refreshes; at least 10 is kept.
    pub refresh_interval_sec: u64,
    /// Tell the server about abandoned samples.
    pub sample_cancel_enabled: bool,
    /// Most cancellations sent at once.
    pub sample_cancel_max_batch_size: u64,
}

impl Default for DynamicConfig {
    fn default() -> Self {
        Self {
            refresh_interval_sec: 300,
            sample_cancel_enabled: false,
            sample_cancel_max_batch_size: 64,
        }
    }
}

/// Answer of `POST /api/v1/auth/token`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenResponse {
    /// A short-lived token to send instead of the key.
    pub jwt: String,
}

impl std::fmt::Debug for TokenResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenResponse(***)")
    }
}
