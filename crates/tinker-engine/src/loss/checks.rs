//! What is asked of a training sequence before anything is computed with it.

use super::{Bound, Clip, Loss, TrainSequence};

/// A per-target input by its name.
type Input<'a> = (&'static str, &'a [f32]);

impl Loss {
    /// The per-target numbers, all of which must be finite.
    fn inputs(&self) -> Vec<Input<'_>> {
        match self {
            Self::CrossEntropy { weights } => vec![("weights", weights)],
            Self::ImportanceSampling {
                logprobs,
                advantages,
            }
            | Self::Ppo {
                logprobs,
                advantages,
                ..
            }
            | Self::Cispo {
                logprobs,
                advantages,
                ..
            }
            | Self::Dro {
                logprobs,
                advantages,
                ..
            }
            | Self::Gspo {
                logprobs,
                advantages,
                ..
            } => vec![("logprobs", logprobs), ("advantages", advantages)],
            Self::Computed(_) => Vec::new(),
        }
    }

    const fn clip(&self) -> Option<&Clip> {
        match self {
            Self::Ppo { clip, .. } | Self::Cispo { clip, .. } | Self::Gspo { clip, .. } => {
                Some(clip)
            }
            _ => None,
        }
    }

    /// Checks everything about the loss of a sequence with this many targets, `k` per position; the
    /// error is a message.
    fn check(&self, n_targets: usize, k: usize) -> Result<(), String> {
        for (name, values) in self.inputs() {
            check_length(name, values.len(), n_targets)?;
            if let Some(at) = values.iter().position(|x| !x.is_finite()) {
                let (value, position) = (values[at], at / k);
                return Err(format!(
                    "{name} is {value} at position {position}: it must be finite"
                ));
            }
        }
        if k != 1 && !matches!(self, Self::CrossEntropy { .. } | Self::Computed(_)) {
            return Err(format!(
                "{k} targets per token; only cross entropy takes more than 1"
            ));
        }
        if let Some(clip) = self.clip() {
            clip.check(n_targets)?;
        }
        match self {
            Self::Dro { beta, .. } if !(beta.is_finite() && *beta >= 0.0) => {
                Err(format!("beta is {beta}, it must be at least 0"))
            }
            Self::Gspo { in_ratio, .. } => {
                check_length("marks of the sequence ratio", in_ratio.len(), n_targets)?;
                if in_ratio.contains(&true) {
                    return Ok(());
                }
                Err("no target is in the sequence ratio: mark at least one".into())
            }
            _ => Ok(()),
        }
    }
}

impl Clip {
    fn check(&self, n_targets: usize) -> Result<(), String> {
        for (name, bound) in [("lower bounds", &self.low), ("upper bounds", &self.high)] {
            if let Bound::Each(bounds) = bound {
                check_length(name, bounds.len(), n_targets)?;
            }
        }
        let per_target = matches!(
            (&self.low, &self.high),
            (Bound::Each(_), _) | (_, Bound::Each(_))
        );
        for i in 0..if per_target { n_targets } else { 1 } {
            let (low, high) = (self.low.at(i), self.high.at(i));
            if low.partial_cmp(&high).is_none_or(|order| order.is_gt()) {
                let place = if per_target {
                    format!(" at position {i}")
                } else {
                    String::new()
                };
                return Err(format!("clip range {low} to {high}{place} is empty"));
            }
        }
        Ok(())
    }
}

fn check_length(name: &str, len: usize, n_targets: usize) -> Result<(), String> {
    if len == n_targets {
        return Ok(());
    }
    Err(format!("{len} {name} for {n_targets} targets"))
}

impl TrainSequence {
    /// Checks lengths, tokens and loss inputs against a model; the error is a message.
    pub(crate) fn check(&self, vocab_size: usize, max_context: usize) -> Result<(), String> {
        let n = self.tokens.len();
        if n == 0 {
            return Err("it has no tokens".into());
        }
        if n > max_context {
            return Err(format!("{n} tokens, the model's context is {max_context}"));
        }
        if self.k == 0 || n.checked_mul(self.k) != Some(self.targets.len()) {
            let (targets, k) = (self.targets.len(), self.k);
            return Err(format!("{targets} targets for {n} tokens with {k} each"));
        }
        let mut all = self.tokens.iter().chain(&self.targets);
        if let Some(token) = all.find(|t| **t as usize >= vocab_size) {
            return Err(format!(
                "token {token} is not below the vocabulary size {vocab_size}"
            ));
        }
        self.loss.check(self.targets.len(), self.k)
    }
}
