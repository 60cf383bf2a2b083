//! Losses computed here, from the log-probabilities that the model gives the targets.
//!
//! The server runs the model forward; the loss and its gradient `g = dC/dlogprobs` are computed in
//! this process; then the server runs forward and backward with cross-entropy of weights `-g`,
//! whose gradient with respect to the adapter is that of the loss.

mod composed;
mod error;
mod evaluation;
mod pass;
pub mod regularizers;
mod surrogate;
mod tape;

pub use composed::{ComposedLoss, ComposedReport, TermReport};
pub use error::CustomLossError;
pub use evaluation::{Logprobs, LossAndGradient};
pub use tape::{Tape, Var, differentiate};
