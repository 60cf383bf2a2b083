//! Losses computed here, from the log-probabilities that the model gives the targets.
//!
//! The server runs the model forward; the loss and its gradient `g = dC/dlogprobs` are computed in
//! this process; then the server runs forward and backward with cross-entropy of weights `-g`,
//! whose gradient with respect to the adapter is that of the loss.

mod error;
mod evaluation;
mod pass;
mod surrogate;
mod tape;

pub use error::CustomLossError;
pub use evaluation::{Logprobs, LossAndGradient};
pub use tape::{Tape, Var, differentiate};
