//! One function per endpoint, as methods of [`Client`](crate::Client), one file per group.

mod admin;
mod api_keys;
mod checkpoints;
mod custom_loss;
mod external_weights;
mod futures;
mod json_pass;
mod models;
mod sampling;
mod search;
mod service;
mod sessions;
mod telemetry;
mod training;
mod training_runs;
mod weights;

pub(crate) use futures::FutureResult;
pub use sampling::AsampleReply;
pub use training::PreparedPass;
pub use training_runs::{AccessScope, Page};
