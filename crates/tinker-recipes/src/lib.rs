//! Training recipes: a configuration, a loop, and the run folder that records it.
//!
//! [`sft`] is supervised fine-tuning on chat data. Each recipe resolves every setting before it
//! starts, tells an observer what it will do and what it does, and can be interrupted and resumed
//! with the result it would have had without.

mod clock;
mod error;
mod hyperparams;
mod schedule;
mod service_client;
pub mod sft;
mod shuffle;
mod trainer;

pub use error::{Error, Result};
pub use hyperparams::{LearningRate, ModelFacts, recommended_learning_rate};
pub use schedule::LrSchedule;
pub use trainer::{Pending, Restored, Service, Trainer, TrainerSpec};
