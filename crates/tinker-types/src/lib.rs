//! The words of the Tinker API.
//!
//! Ids, paths, tensors, and the request and response of every endpoint, in JSON and protobuf.
//! This crate does no IO and knows no clock, runtime or environment: client and server share it.

mod api_keys;
mod audit;
mod checkpoints;
mod completions;
mod custom_loss;
mod datum;
mod endpoint;
mod error;
mod external_weights;
mod futures;
mod ids;
mod lora;
mod loss;
mod model_input;
mod models;
mod optim;
mod path;
pub mod proto;
mod sampling;
mod sampling_params;
mod search;
mod service;
mod sessions;
mod tags;
mod telemetry;
mod tensor_data;
mod training;
mod training_runs;
mod usage;
mod weights;

pub use api_keys::*;
pub use audit::*;
pub use checkpoints::*;
pub use completions::*;
pub use custom_loss::*;
pub use datum::*;
pub use endpoint::*;
pub use error::*;
pub use external_weights::*;
pub use futures::*;
pub use ids::*;
pub use lora::*;
pub use loss::*;
pub use model_input::*;
pub use models::*;
pub use optim::*;
pub use path::*;
pub use sampling::*;
pub use sampling_params::*;
pub use search::*;
pub use service::*;
pub use sessions::*;
pub use telemetry::*;
pub use tensor_data::*;
pub use training::*;
pub use training_runs::*;
pub use usage::*;
pub use weights::*;
