//! One row of `metrics.jsonl`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
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
    step: Option<u64>,
    #[serde(flatten)]
    values: Map<String, Value>,
}

/// The rows in step order; a resumed run repeats steps, and the last row of a step is the valid one.
pub(crate) fn last_per_step(rows: Vec<AnyRow>) -> Vec<MetricsRow> {
    let mut by_step = BTreeMap::new();
    for row in rows {
        if let Some(step) = row.step {
            by_step.insert(step, row.values);
        }
    }
    by_step
        .into_iter()
        .map(|(step, values)| MetricsRow { step, values })
        .collect()
}
