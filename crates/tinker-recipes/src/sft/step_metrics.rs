//! The metrics row of a step, under the cookbook's names.

use std::collections::BTreeMap;

use tinker_runs::MetricsRow;

use super::observe::StepReport;

/// Held-out mean negative log-likelihood.
pub(crate) const TEST_NLL: &str = "test/nll";

/// The row of `report`, with the optimizer's own metrics and the evaluation before the step.
///
/// `num_loss_tokens` counts tokens with a weight above zero. The cookbook sums weights there,
/// which after normalisation is the number of sequences.
pub(crate) fn step_row(
    report: &StepReport,
    optim: Option<&BTreeMap<String, f64>>,
    test_nll: Option<f64>,
) -> MetricsRow {
    let mut row = MetricsRow::new(report.step);
    for (name, value) in optim.into_iter().flatten() {
        row.set(name.clone(), *value);
    }
    row.set("epoch", report.epoch);
    row.set("progress", report.step as f64 / report.n_steps as f64);
    row.set("learning_rate", report.learning_rate);
    row.set("num_sequences", report.n_sequences);
    row.set("num_tokens", report.n_tokens);
    row.set("num_loss_tokens", report.n_trained_tokens);
    row.set("train_mean_nll", report.train_mean_nll);
    row.set("time/step", report.seconds);
    row.set("tokens_per_second", report.tokens_per_second());
    if let Some(nll) = test_nll {
        row.set(TEST_NLL, nll);
    }
    row
}

/// The row after the last step: the evaluation of the final weights.
pub(crate) fn final_row(n_steps: u64, test_nll: f64) -> MetricsRow {
    let mut row = MetricsRow::new(n_steps);
    row.set("progress", 1.0);
    row.set(TEST_NLL, test_nll);
    row
}
