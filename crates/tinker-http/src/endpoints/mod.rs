//! One function per endpoint, as methods of [`Client`](crate::Client), one file per group.

mod checkpoints;
mod futures;
mod models;
mod sampling;
mod service;
mod sessions;
mod training;
mod training_runs;
mod weights;

pub(crate) use futures::FutureResult;
pub use sampling::AsampleReply;
pub use training::PreparedPass;
pub use training_runs::{AccessScope, Page};
