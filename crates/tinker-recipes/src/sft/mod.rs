//! Supervised fine-tuning on chat data.
//!
//! The steps, one file each: read the rows ([`Dataset`]), hold some out and render the rest
//! ([`Prepared`]), put them in order ([`BatchPlan`]), and train ([`train()`], [`resume()`]).

mod batches;
mod checkpoints;
mod config;
mod data;
mod datum;
mod evaluate;
mod goodbye;
mod observe;
mod prepare;
mod resume;
mod segment;
mod step_metrics;
mod stop;
mod train;

pub use batches::{BatchPlan, Cursor};
pub use config::{HeldOut, SftConfig, SftOptions, TrainedOn};
pub use data::{Dataset, Row};
pub use goodbye::Goodbye;
pub use observe::{Event, Observer, StepReport};
pub use prepare::{DataCounts, Prepared};
pub use resume::resume;
pub use stop::StopSignal;
pub use train::{Outcome, SftJob, train};
