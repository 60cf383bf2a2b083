//! The words of the Tinker API.
//!
//! Ids, paths, tensors, and the request and response of every endpoint, in JSON and protobuf.
//! This crate does no IO and knows no clock, runtime or environment: client and server share it.

mod checkpoints;
mod datum;
mod endpoint;
mod error;
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
mod service;
mod sessions;
mod tags;
mod tensor_data;
mod training;
mod training_runs;
mod weights;

pub use checkpoints::*;
pub use datum::*;
pub use endpoint::*;
pub use error::*;
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
pub use service::*;
pub use sessions::*;
pub use tensor_data::*;
pub use training::*;
pub use training_runs::*;
pub use weights::*;
