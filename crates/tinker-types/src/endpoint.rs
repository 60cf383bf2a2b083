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
/// `POST`: sessions by their properties.
pub const SEARCH_SESSIONS: &str = "/api/v1/sessions/search";
/// `GET`: whose the presented key is; `DELETE`: deletes it.
pub const API_KEY: &str = "/api/v1/auth/apikey/me";
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
/// `POST`: uploads a traced loss.
pub const CREATE_CUSTOM_LOSS: &str = "/api/v1/create_custom_loss";
/// `POST`: an optimizer step.
pub const OPTIM_STEP: &str = "/api/v1/optim_step";
/// `POST`: throws the accumulated gradient away. An extension, see
/// [`ServerCapabilities::extensions`](crate::ServerCapabilities::extensions).
pub const ZERO_GRAD: &str = "/api/v1/extensions/zero_grad";
/// `POST`: describes the accumulated gradient. An extension.
pub const GRADIENT_STATS: &str = "/api/v1/extensions/gradient_stats";
/// `POST`: saves weights and optimizer state.
pub const SAVE_WEIGHTS: &str = "/api/v1/save_weights";
/// `POST`: loads them.
pub const LOAD_WEIGHTS: &str = "/api/v1/load_weights";
/// `POST`: saves weights to sample from.
pub const SAVE_WEIGHTS_FOR_SAMPLER: &str = "/api/v1/save_weights_for_sampler";
/// `POST`: saves weights as files for use outside the service.
pub const SAVE_WEIGHTS_EXTERNAL: &str = "/api/v1/save_weights_external";
/// `POST`: copies a checkpoint.
pub const COPY_WEIGHTS: &str = "/api/v1/copy_weights";
/// `POST`: begins to bring weights in.
pub const START_UPLOAD: &str = "/api/v1/external_weights_upload_start";
/// `POST`: makes a checkpoint of weights that were brought in.
pub const FINISH_UPLOAD: &str = "/api/v1/external_weights_upload_finish";
/// `POST`: describes a checkpoint.
pub const WEIGHTS_INFO: &str = "/api/v1/weights_info";
/// `POST`: a new sampler.
pub const CREATE_SAMPLING_SESSION: &str = "/api/v1/create_sampling_session";
/// `POST`: a number for one more client of a sampler.
pub const JOIN_SAMPLING_SESSION: &str = "/api/v1/join_sampling_session";
/// `GET /{id}`: describes a sampler.
pub const SAMPLERS: &str = "/api/v1/samplers";
/// `POST`: samples.
pub const ASAMPLE: &str = "/api/v1/asample";
/// `POST`: waits for a result.
pub const RETRIEVE_FUTURE: &str = "/api/v1/retrieve_future";
/// `POST`: waits until any sample of a sampler is done.
pub const RETRIEVE_FUTURES: &str = "/api/v1/retrieve_futures";
/// `POST`: gives a result up.
pub const CANCEL_FUTURE: &str = "/api/v1/cancel_future";
/// `GET`: training runs; `/{id}` one of them; `/{id}/checkpoints` its checkpoints.
pub const TRAINING_RUNS: &str = "/api/v1/training_runs";
/// `GET`: checkpoints of all runs.
pub const CHECKPOINTS: &str = "/api/v1/checkpoints";
/// `POST`: checkpoints by their properties.
pub const SEARCH_CHECKPOINTS: &str = "/api/v1/checkpoints/search";
/// `GET`: the audit log of a day.
pub const AUDIT: &str = "/api/v1/audit";
/// `GET`: what was used, hour by hour.
pub const BILLING_USAGE: &str = "/api/v1/billing/usage/events";
/// `GET`: what stored checkpoints cost.
pub const STORAGE_USAGE: &str = "/api/v1/billing/usage/checkpoints/current";
/// `POST`: an image of the files of a server on this machine. Of the embedded server alone.
pub const BACKUP: &str = "/api/v1/backup";

/// Content type of protobuf bodies.
pub const PROTOBUF: &str = "application/x-protobuf";
