//! How the learning rate changes over the steps of a run.

use std::f64::consts::PI;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// A factor on the learning rate by progress; none has a warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    /// `1 - s/S`.
    #[default]
    Linear,
    /// `(1 + cos(pi s/S)) / 2`.
    Cosine,
    /// `1`.
    Constant,
}

impl LrSchedule {
    /// Every schedule.
    pub const ALL: [Self; 3] = [Self::Linear, Self::Cosine, Self::Constant];

    /// The name in configuration files and flags.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Cosine => "cosine",
            Self::Constant => "constant",
        }
    }

    /// The factor at `step` of `n_steps`, from 1 at step 0 towards 0 after the last.
    pub fn multiplier(self, step: u64, n_steps: u64) -> f64 {
        let progress = step as f64 / n_steps.max(1) as f64;
        match self {
            Self::Linear => 1.0 - progress,
            Self::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            Self::Constant => 1.0,
        }
    }
}

impl fmt::Display for LrSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for LrSchedule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|known| known.as_str() == name)
            .ok_or_else(|| Error::BadOption {
                name: "lr_schedule",
                value: name.to_owned(),
                reason: "known: linear, cosine, constant".to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_schedule_follows_its_formula() {
        let check = |schedule: LrSchedule, expected: [f64; 3]| {
            for (step, expected) in [0, 5, 10].into_iter().zip(expected) {
                let factor = schedule.multiplier(step, 10);
                assert!(
                    (factor - expected).abs() < 1e-12,
                    "{schedule} {step}: {factor}"
                );
            }
        };

        check(LrSchedule::Linear, [1.0, 0.5, 0.0]);
        check(LrSchedule::Cosine, [1.0, 0.5, 0.0]);
        check(LrSchedule::Constant, [1.0, 1.0, 1.0]);
        let quarter = LrSchedule::Cosine.multiplier(1, 4);
        assert!((quarter - 0.853_553_390_593).abs() < 1e-12, "{quarter}");
    }

    #[test]
    fn an_unknown_schedule_lists_the_known_ones() {
        let error = "warmup".parse::<LrSchedule>().unwrap_err();

        assert_eq!(
            error.to_string(),
            "lr_schedule `warmup`: known: linear, cosine, constant"
        );
    }
}
