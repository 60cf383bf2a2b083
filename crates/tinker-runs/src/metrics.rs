//! One row of `metrics.jsonl`.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// What was measured at one step: `{"step": 3, "train_mean_nll": 1.7, …}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricsRow {
    step: u64,
    /// Never has a `step`, which would be there twice.
    #[serde(flatten)]
    values: Map<String, Value>,
}

impl MetricsRow {
    /// An empty row for `step`.
    pub fn new(step: u64) -> Self {
        Self {
            step,
            values: Map::new(),
        }
    }

    /// Optimizer step, from 0.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Values by metric name; a number that is not finite is null.
    pub fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// Sets metric `name`. `step` is the row's own: a metric of that name is left out.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<Value>) {
        let name = name.into();
        if name != "step" {
            self.values.insert(name, value.into());
        }
    }

    /// The metric `name` as a number.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.values.get(name)?.as_f64()
    }
}

/// A row as other writers may leave it: without a step, which makes it no point of a series.
#[derive(Deserialize)]
pub(crate) struct AnyRow {
    #[serde(default, deserialize_with = "whole")]
    step: Option<u64>,
    #[serde(flatten)]
    values: Map<String, Value>,
}

/// A step, which Python's cookbook writes as `3.0`; what is no whole number is none.
fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    /// Above this an `f64` skips whole numbers.
    const MOST: f64 = 9_007_199_254_740_992.0;
    let step = Value::deserialize(deserializer)?;
    let is_whole = |step: &f64| step.fract() == 0.0 && (0.0..=MOST).contains(step);
    Ok(step
        .as_u64()
        .or_else(|| step.as_f64().filter(is_whole).map(|step| step as u64)))
}

/// One row for each step, in their order. Of values that a step has twice the later is valid, since a
/// resumed run repeats steps; one that it has once stays, since Python's cookbook ends a run with a second
/// row for the last step.
pub(crate) fn one_per_step(rows: Vec<AnyRow>) -> Vec<MetricsRow> {
    let mut by_step = BTreeMap::<u64, Map<String, Value>>::new();
    for row in rows {
        if let Some(step) = row.step {
            by_step.entry(step).or_default().extend(row.values);
        }
    }
    by_step
        .into_iter()
        .map(|(step, values)| MetricsRow { step, values })
        .collect()
}
