//! Paths of the API, one constant each, shared by client and server.

/// `GET`: is the server there.
pub const HEALTHZ: &str = "/api/v1/healthz";
/// `GET`: base models on offer.
pub const CAPABILITIES: &str = "/api/v1/get_server_capabilities";
/// `POST`: settings for the client.
pub const CLIENT_CONFIG: &str = "/api/v1/client/config";
/// `POST`: settings that may change.
pub const DYNAMIC_CONFIG: &str = "/api/v1/client/dynamic_config";
/// `POST`: a key for a short-lived token.
pub const AUTH_TOKEN: &str = "/api/v1/auth/token";
/// `POST`: opens a session.
pub const CREATE_SESSION: &str = "/api/v1/create_session";
/// `POST`: keeps a session alive.
pub const SESSION_HEARTBEAT: &str = "/api/v1/session_heartbeat";
/// `GET`: sessions; `/{id}` one of them; `/{id}/finish` ends it.
pub const SESSIONS: &str = "/api/v1/sessions";
/// `POST`: events of the client.
pub const TELEMETRY: &str = "/api/v1/telemetry";
/// `POST`: a new training run.
pub const CREATE_MODEL: &str = "/api/v1/create_model";
/// `POST`: describes a training run.
pub const GET_INFO: &str = "/api/v1/get_info";
/// `POST`: frees a training run's memory.
pub const UNLOAD_MODEL: &str = "/api/v1/unload_model";
/// `POST`: forward and backward, or forward alone.
pub const FORWARD_BACKWARD: &str = "/api/v1/forward_backward";
/// `POST`: forward, as clients before protobuf sent it.
pub const FORWARD: &str = "/api/v1/forward";
/// `POST`: an optimizer step.
pub const OPTIM_STEP: &str = "/api/v1/optim_step";
/// `POST`: saves weights and optimizer state.
pub const SAVE_WEIGHTS: &str = "/api/v1/save_weights";
/// `POST`: loads them.
pub const LOAD_WEIGHTS: &str = "/api/v1/load_weights";
/// `POST`: saves weights to sample from.
pub const SAVE_WEIGHTS_FOR_SAMPLER: &str = "/api/v1/save_weights_for_sampler";
/// `POST`: describes a checkpoint.
pub const WEIGHTS_INFO: &str = "/api/v1/weights_info";
/// `POST`: a new sampler.
pub const CREATE_SAMPLING_SESSION: &str = "/api/v1/create_sampling_session";
/// `GET /{id}`: describes a sampler.
pub const SAMPLERS: &str = "/api/v1/samplers";
/// `POST`: samples.
pub const ASAMPLE: &str = "/api/v1/asample";
/// `POST`: waits for a result.
pub const RETRIEVE_FUTURE: &str = "/api/v1/retrieve_future";
/// `POST`: gives a result up.
pub const CANCEL_FUTURE: &str = "/api/v1/cancel_future";
/// `GET`: training runs; `/{id}` one of them; `/{id}/checkpoints` its checkpoints.
pub const TRAINING_RUNS: &str = "/api/v1/training_runs";
/// `GET`: checkpoints of all runs.
pub const CHECKPOINTS: &str = "/api/v1/checkpoints";

/// Content type of protobuf bodies.
pub const PROTOBUF: &str = "application/x-protobuf";
