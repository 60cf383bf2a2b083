//! What goes wrong while a loss is computed here.

/// Why a custom loss has no usable value or gradient.
///
/// Text becomes [`Failed`](Self::Failed), so that a loss may end with `?` on a `&str` or `String`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CustomLossError {
    /// The loss says so itself.
    #[error("the custom loss failed: {0}")]
    Failed(String),
    /// The loss panicked.
    #[error("the custom loss panicked: {0}")]
    Panicked(String),
    /// An operation of the tape makes no sense.
    #[error("cannot compute {operation}: {detail}")]
    Operation {
        /// The method.
        operation: &'static str,
        /// What does not fit.
        detail: String,
    },
    /// The loss leaves a datum out.
    #[error(
        "the custom loss does not depend on the log-probabilities of datum {datum}: \
         remove it from the data, or mask it"
    )]
    NoGradient {
        /// Index of the datum.
        datum: usize,
    },
    /// A term of a composed loss failed.
    #[error("term `{name}`: {source}")]
    Term {
        /// The term; `base` is the first one.
        name: String,
        /// Why.
        source: Box<Self>,
    },
    /// The terms of a composed loss make no sense together.
    #[error("{0}")]
    Composition(String),
    /// The time given was used up.
    #[error("the custom loss takes too long")]
    OutOfTime,
    /// The loss returned gradients of too many or too few data.
    #[error(
        "the custom loss returned {actual} gradients for {expected} data: return one per datum"
    )]
    GradientCount {
        /// Number of data.
        expected: usize,
        /// Number of gradients.
        actual: usize,
    },
    /// A gradient is shaped unlike the log-probabilities.
    #[error(
        "the custom loss returned {actual} gradient values for datum {datum}, \
         which has {expected} log-probabilities"
    )]
    GradientLength {
        /// Index of the datum.
        datum: usize,
        /// Number of its log-probabilities.
        expected: usize,
        /// Number of values returned.
        actual: usize,
    },
    /// The loss is infinite or not a number.
    #[error("the loss is {0}: it must be finite")]
    LossNotFinite(f64),
    /// The gradient is infinite or not a number.
    #[error("the gradient of datum {datum} at position {position} is {value}: it must be finite")]
    GradientNotFinite {
        /// Index of the datum.
        datum: usize,
        /// Row-major position in its log-probabilities.
        position: usize,
        /// What it is, as a 32-bit float.
        value: f32,
    },
}

impl CustomLossError {
    /// What a caught panic said.
    pub(crate) fn panicked(payload: &(dyn std::any::Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Self::Panicked(text.unwrap_or("without a message").to_owned())
    }
}

impl From<String> for CustomLossError {
    fn from(text: String) -> Self {
        Self::Failed(text)
    }
}

impl From<&str> for CustomLossError {
    fn from(text: &str) -> Self {
        Self::Failed(text.to_owned())
    }
}
