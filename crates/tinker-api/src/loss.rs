//! Which loss a pass computes, and whether the data has what it reads.

use tinker_types::{Datum, LossConfig, LossConfigValue, LossFn, loss_input};

use crate::error::{Error, Result};

/// A loss function and its settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Loss {
    /// The function.
    pub function: LossFn,
    /// Its settings; empty means its defaults.
    pub config: LossConfig,
}

impl Loss {
    /// Adds a numeric setting, such as `clip_high_threshold`.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: f64) -> Self {
        self.config
            .insert(name.into(), LossConfigValue::Number(value));
        self
    }

    /// Checks data against the loss: not empty, and every input that the loss reads is there.
    pub(crate) fn check(&self, data: &[Datum]) -> Result<()> {
        let fault = |text: String| Err(Error::InvalidRequest(text));
        if data.is_empty() {
            return fault("no data was given: at least one datum is needed".into());
        }
        let needed: &[&str] = match &self.function {
            LossFn::CrossEntropy => &[loss_input::TARGET_TOKENS],
            LossFn::ImportanceSampling | LossFn::Ppo | LossFn::Cispo | LossFn::Dro => &[
                loss_input::TARGET_TOKENS,
                loss_input::LOGPROBS,
                loss_input::ADVANTAGES,
            ],
            LossFn::Unknown(name) => {
                return fault(format!(
                    "unknown loss {name:?}: use cross_entropy, importance_sampling, ppo, cispo or dro"
                ));
            }
            _ => &[],
        };
        for (i, datum) in data.iter().enumerate() {
            let has = |name: &&&str| datum.loss_fn_inputs().contains_key(**name);
            if let Some(name) = needed.iter().find(|name| !has(name)) {
                return fault(format!("datum {i}: loss {} needs `{name}`", self.function));
            }
        }
        for (name, value) in &self.config {
            if matches!(value, LossConfigValue::Number(x) if !x.is_finite()) {
                return fault(format!("loss setting `{name}` is not a finite number"));
            }
        }
        Ok(())
    }
}

impl From<LossFn> for Loss {
    fn from(function: LossFn) -> Self {
        Self {
            function,
            config: LossConfig::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use tinker_types::ModelInput;

    use super::*;

    fn datum() -> Datum {
        Datum::cross_entropy(ModelInput::from_tokens(vec![1]), vec![2], vec![1.0]).unwrap()
    }

    fn check(loss: impl Into<Loss>, data: &[Datum], expected: &str) {
        let error = loss.into().check(data).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn refuses_what_no_server_could_compute() {
        check(
            LossFn::CrossEntropy,
            &[],
            "no data was given: at least one datum is needed",
        );
        check(
            LossFn::Ppo,
            &[datum()],
            "datum 0: loss ppo needs `logprobs`",
        );
        check(
            LossFn::from("cros_entropy"),
            &[datum()],
            "unknown loss \"cros_entropy\": use cross_entropy, importance_sampling, ppo, cispo or dro",
        );
        check(
            Loss::from(LossFn::CrossEntropy).with("beta", f64::NAN),
            &[datum()],
            "loss setting `beta` is not a finite number",
        );
    }

    #[test]
    fn accepts_matching_data() {
        Loss::from(LossFn::CrossEntropy).check(&[datum()]).unwrap();
    }
}
