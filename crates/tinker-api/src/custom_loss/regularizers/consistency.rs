//! Staying near paired log-probabilities, such as those of the same text before a change.

use tinker_types::Datum;

use super::{KlDirection, Reduction, ReferenceLogprobs, Regularizer, Result, datum};
use crate::custom_loss::tape::{Tape, Var};

/// How two sets of log-probabilities are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Distance {
    /// Squared difference per value.
    #[default]
    Mse,
    /// Absolute difference per value.
    Mae,
    /// 1 minus the cosine of the angle between the values of each datum.
    Cosine,
    /// As [`KlDirection::ModelToReference`], per position.
    Kl,
}

/// Distance from paired log-probabilities.
#[derive(Debug, Clone)]
pub struct Consistency {
    /// The pair. Default: loss input `original_logprobs`.
    pub pair: ReferenceLogprobs,
    /// Default: squared difference.
    pub distance: Distance,
    /// Default: mean.
    pub reduction: Reduction,
    /// A loss input of one weight per value.
    pub mask: Option<String>,
}

impl Default for Consistency {
    fn default() -> Self {
        Self {
            pair: ReferenceLogprobs::Input("original_logprobs".to_owned()),
            distance: Distance::Mse,
            reduction: Reduction::Mean,
            mask: None,
        }
    }
}

impl Regularizer for Consistency {
    fn penalty<'t>(&self, tape: &'t Tape, data: &[Datum], logprobs: &[Var<'t>]) -> Result<Var<'t>> {
        let pairs = self.pair.of(tape, data, logprobs)?;
        let pairs = logprobs.iter().copied().zip(pairs);
        let mask = self.mask.as_deref();
        if self.distance == Distance::Cosine {
            let cosines: Vec<_> = pairs
                .enumerate()
                .map(|(i, (a, b))| match mask {
                    Some(mask) => {
                        let weights = tape.input(datum(data, i)?, mask).values();
                        Ok(cosine_distance(a.mask(&weights), b.mask(&weights)))
                    }
                    None => Ok(cosine_distance(a, b)),
                })
                .collect::<Result<_>>()?;
            return self.reduction.reduce(tape, data, &cosines, None);
        }
        let distance = |(a, b): (Var<'t>, Var<'t>)| match self.distance {
            Distance::Mae => (a - b).abs(),
            Distance::Kl => KlDirection::ModelToReference.of(a, b),
            Distance::Mse | Distance::Cosine => (a - b).square(),
        };
        let distances: Vec<_> = pairs.map(distance).collect();
        self.reduction.reduce(tape, data, &distances, mask)
    }
}

fn cosine_distance<'t>(a: Var<'t>, b: Var<'t>) -> Var<'t> {
    1.0 - (a * b).sum() / (a.norm() * b.norm())
}
