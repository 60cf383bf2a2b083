//! What a recipe needs of a training service; `service_client.rs` is the client library as one.
//!
//! The loops are written against these traits so that their order, their resumption and their
//! failures are tested without a server.

use std::fmt;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;

use tinker_api::Result;
use tinker_types::{
    AdamParams, Datum, FinishReason, ForwardBackwardOutput, LoraConfig, OptimStepResponse,
    TinkerPath,
};

/// The result of an operation, when it is there. Dropping it forgets the result, not the operation.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// A training run to start.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerSpec {
    /// Base model.
    pub base_model: String,
    /// The adapter.
    pub lora: LoraConfig,
    /// Weights to start from instead of a new adapter, without their optimizer.
    pub weights: Option<TinkerPath>,
}

/// Starts training runs and goes on with saved ones.
pub trait Service: Send + Sync {
    /// The same service in a session of its own, whose operations are noted in the ledger at `path`.
    ///
    /// With the ledger of a process that was killed, the same calls as that process made bring the
    /// same training run and the same answers, and nothing is done twice.
    fn with_ledger(&self, path: &Path) -> Result<Box<dyn Service>>;

    /// Ends the session, if there is one.
    fn close(&self, reason: FinishReason) -> Pending<'_, ()>;

    /// Starts a training run.
    fn create<'a>(&'a self, spec: &'a TrainerSpec) -> Pending<'a, Box<dyn Trainer>>;

    /// Starts a training run from a checkpoint with its optimizer.
    fn restore<'a>(&'a self, state: &'a TinkerPath) -> Pending<'a, Restored>;
}

/// A checkpoint that was asked for.
pub enum Restored {
    /// Loaded, to train on.
    Trainer(Box<dyn Trainer>),
    /// Expired, deleted or damaged; why, in the server's words. An earlier one may do.
    Unusable(String),
}

impl fmt::Debug for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Trainer(_) => f.write_str("Trainer"),
            Self::Unusable(why) => f.debug_tuple("Unusable").field(why).finish(),
        }
    }
}

/// One training run.
///
/// Every method submits its operation at once and the service executes operations in the order of
/// the calls, whenever and in whatever order their results are awaited.
pub trait Trainer: Send {
    /// Whether an earlier process asked for operations that were not asked for again yet: the
    /// ledger has them, and takes no others in their place.
    fn is_repeating(&self) -> bool;

    /// Adds the gradient of `data` under cross-entropy.
    fn forward_backward(&mut self, data: Vec<Datum>) -> Pending<'static, ForwardBackwardOutput>;

    /// Scores `data` under cross-entropy without a gradient.
    fn forward(&mut self, data: Vec<Datum>) -> Pending<'static, ForwardBackwardOutput>;

    /// Applies the gradient and clears it.
    fn optim_step(&mut self, adam: AdamParams) -> Pending<'static, OptimStepResponse>;

    /// Saves weights and optimizer as `name`.
    fn save_state(&mut self, name: &str, ttl_seconds: Option<u64>) -> Pending<'static, TinkerPath>;

    /// Saves weights to sample from as `name`.
    fn save_sampler(&mut self, name: &str) -> Pending<'static, TinkerPath>;
}
