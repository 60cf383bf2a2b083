//! Which losses there are, their settings, and the inputs that each takes.

use std::sync::Arc;

use tinker_engine::{Bound, Clip, Loss};
use tinker_types::{Datum, LossConfig, LossConfigValue, LossFn, loss_input};

use super::tensors::{floats, input};
use crate::custom_loss::{Program, loss_of};
use crate::error::{Error, Result};

/// Finds an uploaded loss by its id.
pub(crate) type FindLoss<'a> = &'a dyn Fn(&str) -> Result<Arc<Program>>;

/// The loss of a request with its settings resolved.
#[derive(Debug)]
pub(super) struct Settings {
    name: LossFn,
    kind: Kind,
    /// The uploaded loss of [`Kind::Custom`].
    program: Option<Arc<Program>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    CrossEntropy,
    ImportanceSampling,
    Ppo(Range),
    Cispo(Range),
    Dro { beta: f32 },
    Gspo(Range),
    Custom,
}

/// Bounds of the ratio.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Range {
    low: f32,
    high: f32,
}

const CLIP_LOW: &str = "clip_low_threshold";
const CLIP_HIGH: &str = "clip_high_threshold";
const RATIO_MASK: &str = "sequence_ratio_mask";
const BETA: &str = "beta";
const LOSS_ID: &str = "loss_id";
/// The example value of the public description of DRO.
const DEFAULT_BETA: f32 = 0.05;
const PPO_RANGE: Range = Range {
    low: 0.8,
    high: 1.2,
};
const CISPO_RANGE: Range = Range {
    low: 0.0,
    high: 4.0,
};
/// That of the paper (Zheng et al. 2025, section 5.1); the service's is not published.
const GSPO_RANGE: Range = Range {
    low: 1.0 - 3e-4,
    high: 1.0 + 4e-4,
};

/// A message that names input and value.
type Checked<T> = std::result::Result<T, String>;

impl Settings {
    /// Reads the settings of a loss.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the loss or the setting at fault.
    pub(super) fn of(loss: &LossFn, config: &LossConfig, find: FindLoss<'_>) -> Result<Self> {
        let mut program = None;
        let kind = match loss {
            LossFn::CrossEntropy => Kind::CrossEntropy,
            LossFn::ImportanceSampling => Kind::ImportanceSampling,
            LossFn::Ppo => Kind::Ppo(range(config, PPO_RANGE)?),
            LossFn::Cispo => Kind::Cispo(range(config, CISPO_RANGE)?),
            LossFn::Gspo => Kind::Gspo(range(config, GSPO_RANGE)?),
            LossFn::Dro => Kind::Dro {
                beta: number(config, BETA, DEFAULT_BETA)?,
            },
            LossFn::Custom => {
                let Some(LossConfigValue::Text(id)) = config.get(LOSS_ID) else {
                    return Err(Error::Invalid(format!(
                        "loss custom needs the text {LOSS_ID} in its settings, as create_custom_loss returned it"
                    )));
                };
                program = Some(find(id)?);
                Kind::Custom
            }
            other => {
                return Err(Error::Invalid(format!(
                    "loss {other} is not supported by this server: it has cross_entropy, importance_sampling, ppo, cispo, dro, gspo and custom"
                )));
            }
        };
        let known = kind.settings();
        if let Some(unknown) = config.keys().find(|key| !known.contains(&key.as_str())) {
            let takes = if known.is_empty() {
                "no settings".to_owned()
            } else {
                known.join(", ")
            };
            return Err(Error::Invalid(format!(
                "loss {loss} does not take the setting {unknown:?}: it takes {takes}"
            )));
        }
        Ok(Self {
            name: loss.clone(),
            kind,
            program,
        })
    }

    /// Checks that a datum has the inputs that the loss needs and no others.
    pub(super) fn check_names(&self, datum: &Datum) -> Checked<()> {
        let inputs = datum.loss_fn_inputs();
        if let Some(program) = &self.program {
            let names = program.inputs().iter().map(|input| input.name.as_str());
            // Clients send a datum as it is, so it may hold more.
            return match names
                .chain([loss_input::TARGET_TOKENS])
                .find(|n| !inputs.contains_key(*n))
            {
                Some(missing) => Err(format!(
                    "loss {} needs the input {missing:?}",
                    program.name()
                )),
                None => Ok(()),
            };
        }
        let (needed, optional) = self.kind.inputs();
        let mut takes = needed.iter().chain(optional);
        if let Some(unknown) = inputs
            .keys()
            .find(|key| !takes.clone().any(|name| name == key))
        {
            let takes: Vec<&str> = takes.by_ref().copied().collect();
            return Err(format!(
                "loss {} does not take the input {unknown:?}: it takes {}",
                self.name,
                takes.join(", ")
            ));
        }
        match needed.iter().find(|key| !inputs.contains_key(**key)) {
            Some(missing) => Err(format!("loss {} needs the input {missing:?}", self.name)),
            None => Ok(()),
        }
    }

    /// The loss of a datum whose targets have this shape.
    pub(super) fn loss(&self, datum: &Datum, shape: &[usize]) -> Checked<Loss> {
        if let Some(program) = &self.program {
            return custom(program, datum, shape);
        }
        let floats = |name: &str| floats(datum, name, shape);
        if self.kind == Kind::CrossEntropy {
            // Clients may leave the weights out; then every target counts once.
            let weights = match datum.loss_fn_inputs().get(loss_input::WEIGHTS) {
                Some(_) => floats(loss_input::WEIGHTS)?,
                None => vec![1.0; shape.iter().product()],
            };
            return Ok(Loss::CrossEntropy { weights });
        }
        let [n] = shape else {
            return Err(format!(
                "loss {} needs target_tokens of shape [{}], got {shape:?}",
                self.name,
                shape.first().unwrap_or(&0)
            ));
        };
        let logprobs = floats(loss_input::LOGPROBS)?;
        let advantages = floats(loss_input::ADVANTAGES)?;
        let clip = |range| clip(datum, range, *n);
        Ok(match self.kind {
            Kind::CrossEntropy | Kind::ImportanceSampling | Kind::Custom => {
                Loss::ImportanceSampling {
                    logprobs,
                    advantages,
                }
            }
            Kind::Ppo(range) => Loss::Ppo {
                logprobs,
                advantages,
                clip: clip(range)?,
            },
            Kind::Cispo(range) => Loss::Cispo {
                logprobs,
                advantages,
                clip: clip(range)?,
            },
            Kind::Dro { beta } => Loss::Dro {
                logprobs,
                advantages,
                beta,
            },
            Kind::Gspo(range) => Loss::Gspo {
                logprobs,
                advantages,
                in_ratio: in_ratio(&floats(RATIO_MASK)?)?,
                clip: clip(range)?,
            },
        })
    }
}

impl Kind {
    const fn settings(self) -> &'static [&'static str] {
        match self {
            Self::CrossEntropy | Self::ImportanceSampling => &[],
            Self::Ppo(_) | Self::Cispo(_) | Self::Gspo(_) => &[CLIP_LOW, CLIP_HIGH],
            Self::Dro { .. } => &[BETA],
            Self::Custom => &[LOSS_ID],
        }
    }

    /// Inputs that it needs, and inputs that may be left out.
    const fn inputs(self) -> (&'static [&'static str], &'static [&'static str]) {
        const TARGETS: &str = loss_input::TARGET_TOKENS;
        const POLICY: &[&str] = &[TARGETS, loss_input::LOGPROBS, loss_input::ADVANTAGES];
        match self {
            Self::CrossEntropy => (&[TARGETS], &[loss_input::WEIGHTS]),
            Self::Custom => (&[TARGETS], &[]),
            Self::ImportanceSampling | Self::Dro { .. } => (POLICY, &[]),
            Self::Ppo(_) | Self::Cispo(_) => (POLICY, &[CLIP_LOW, CLIP_HIGH]),
            Self::Gspo(_) => (
                &[
                    TARGETS,
                    loss_input::LOGPROBS,
                    loss_input::ADVANTAGES,
                    RATIO_MASK,
                ],
                &[CLIP_LOW, CLIP_HIGH],
            ),
        }
    }
}

/// The uploaded loss of a datum, with the inputs that it reads.
fn custom(program: &Arc<Program>, datum: &Datum, shape: &[usize]) -> Checked<Loss> {
    if shape.len() != program.rank() {
        return Err(format!(
            "target_tokens of shape {shape:?} for loss {}, whose logprobs have rank {}",
            program.name(),
            program.rank()
        ));
    }
    let inputs = program.inputs().iter().map(|declared| {
        let found = input(datum, &declared.name)?;
        if found.shape.len() == usize::from(declared.rank) {
            return Ok(found);
        }
        Err(format!(
            "{} of shape {:?} for loss {}, which takes it with rank {}",
            declared.name,
            found.shape,
            program.name(),
            declared.rank
        ))
    });
    Ok(loss_of(program, shape, inputs.collect::<Checked<_>>()?))
}

fn range(config: &LossConfig, default: Range) -> Result<Range> {
    let low = number(config, CLIP_LOW, default.low)?;
    let high = number(config, CLIP_HIGH, default.high)?;
    if low > high {
        return Err(Error::Invalid(format!(
            "{CLIP_LOW} {low} is above {CLIP_HIGH} {high}: both are bounds of the ratio"
        )));
    }
    Ok(Range { low, high })
}

fn number(config: &LossConfig, key: &str, default: f32) -> Result<f32> {
    match config.get(key) {
        None => Ok(default),
        Some(LossConfigValue::Number(n)) if n.is_finite() && *n >= 0.0 => Ok(*n as f32),
        Some(LossConfigValue::Number(n)) => Err(Error::Invalid(format!(
            "{key} {n} must be a finite number of at least 0"
        ))),
        Some(LossConfigValue::Text(text)) => {
            Err(Error::Invalid(format!("{key} {text:?} must be a number")))
        }
    }
}

/// The bounds of a datum: its own for each target, or those of the request.
fn clip(datum: &Datum, range: Range, n: usize) -> Checked<Clip> {
    let bound = |name, of_request| match datum.loss_fn_inputs().get(name) {
        Some(_) => floats(datum, name, &[n]).map(Bound::Each),
        None => Ok(Bound::All(of_request)),
    };
    let (low, high) = (bound(CLIP_LOW, range.low)?, bound(CLIP_HIGH, range.high)?);
    let at = |bound: &Bound, i: usize| match bound {
        Bound::All(bound) => *bound,
        Bound::Each(bounds) => bounds.get(i).copied().unwrap_or(f32::NAN),
    };
    match (0..n).find(|&i| at(&low, i) > at(&high, i)) {
        None => Ok(Clip { low, high }),
        Some(i) => Err(format!(
            "{CLIP_LOW} {} is above {CLIP_HIGH} {} at position {i}: both are bounds of the ratio",
            at(&low, i),
            at(&high, i)
        )),
    }
}

fn in_ratio(mask: &[f32]) -> Checked<Vec<bool>> {
    if mask.iter().all(|marked| *marked == 0.0) {
        return Err(format!(
            "{RATIO_MASK} is 0 everywhere: it must mark the tokens of the sequence ratio"
        ));
    }
    Ok(mask.iter().map(|marked| *marked != 0.0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_loss(id: &str) -> Result<Arc<Program>> {
        Err(Error::Invalid(format!("no loss {id}")))
    }

    #[test]
    fn policy_losses_have_the_documented_defaults() {
        let kind_of = |loss: &LossFn| {
            Settings::of(loss, &LossConfig::new(), &no_loss)
                .unwrap()
                .kind
        };

        assert_eq!(
            kind_of(&LossFn::Ppo),
            Kind::Ppo(Range {
                low: 0.8,
                high: 1.2
            })
        );
        assert_eq!(
            kind_of(&LossFn::Cispo),
            Kind::Cispo(Range {
                low: 0.0,
                high: 4.0
            })
        );
        assert_eq!(kind_of(&LossFn::Dro), Kind::Dro { beta: 0.05 });
        let narrow = Range {
            low: 0.9997,
            high: 1.0004,
        };
        assert_eq!(kind_of(&LossFn::Gspo), Kind::Gspo(narrow));
    }

    #[test]
    fn unknown_losses_and_settings_are_refused() {
        let config = LossConfig::from([("beta".to_owned(), LossConfigValue::Number(1.0))]);

        let error = Settings::of(&LossFn::Ppo, &config, &no_loss)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "loss ppo does not take the setting \"beta\": it takes clip_low_threshold, clip_high_threshold"
        );
        let error = Settings::of(&LossFn::StableReinforce, &LossConfig::new(), &no_loss);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("stable_reinforce is not supported by this server"),
            "{error}"
        );
    }
}
