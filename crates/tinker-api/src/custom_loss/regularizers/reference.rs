//! Log-probabilities to compare with.

use std::fmt;
use std::sync::Arc;

use tinker_types::Datum;

use super::{Result, datum};
use crate::custom_loss::evaluation::Logprobs;
use crate::custom_loss::tape::{Tape, Var};

type Compute = dyn Fn(&[Datum]) -> Result<Vec<Logprobs>> + Send + Sync;

/// Where reference log-probabilities come from: one per datum, shaped like the model's.
#[derive(Clone)]
pub enum ReferenceLogprobs {
    /// A loss input of each datum, such as `logprobs`.
    Input(String),
    /// These, in the order of the data.
    Values(Vec<Logprobs>),
    /// A function of the data; it may block.
    Compute(Arc<Compute>),
}

impl ReferenceLogprobs {
    /// A function of the data, called once per evaluation; it may block.
    pub fn compute(
        compute: impl Fn(&[Datum]) -> Result<Vec<Logprobs>> + Send + Sync + 'static,
    ) -> Self {
        Self::Compute(Arc::new(compute))
    }

    /// One per datum, in the shapes of `logprobs`.
    pub(super) fn of<'t>(
        &self,
        tape: &'t Tape,
        data: &[Datum],
        logprobs: &[Var<'t>],
    ) -> Result<Vec<Var<'t>>> {
        let put = |values: &[Logprobs]| values.iter().map(|l| tape.logprobs(l)).collect();
        let references: Vec<Var<'t>> = match self {
            Self::Input(name) => (0..logprobs.len())
                .map(|i| Ok(tape.input(datum(data, i)?, name)))
                .collect::<Result<_>>()?,
            Self::Values(values) => put(values),
            Self::Compute(compute) => put(&compute(data)?),
        };
        if references.len() != logprobs.len() {
            let (n, n_data) = (references.len(), logprobs.len());
            return Err(format!("{n} reference log-probabilities for {n_data} data").into());
        }
        for (i, (reference, logprobs)) in references.iter().zip(logprobs).enumerate() {
            let (reference, shape) = (reference.shape(), logprobs.shape());
            // An input that is missing is the tape's fault already.
            if reference != shape && !tape.is_faulty() {
                return Err(format!(
                    "reference log-probabilities of datum {i} have shape {reference:?}, \
                     the model's have {shape:?}"
                )
                .into());
            }
        }
        Ok(references)
    }
}

impl fmt::Debug for ReferenceLogprobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input(name) => write!(f, "Input({name:?})"),
            Self::Values(values) => write!(f, "Values({} data)", values.len()),
            Self::Compute(_) => f.write_str("Compute"),
        }
    }
}
