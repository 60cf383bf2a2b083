//! Joining the results of one call's requests.

use std::collections::BTreeMap;

use tinker_types::ForwardBackwardOutput;

/// How a metric is reduced over requests: the part of its name after the colon.
enum Reduction {
    Mean,
    Sum,
    Min,
    Max,
    /// Largest value minus the mean.
    Slack,
    /// Wrapping sum of the values as unsigned 64-bit integers, so that order does not matter.
    Hash2,
    /// Every value, under numbered names.
    Unique,
}

impl Reduction {
    fn of(name: &str) -> Option<Self> {
        let (_, suffix) = name.split_once(':')?;
        Some(match suffix {
            "mean" => Self::Mean,
            "sum" => Self::Sum,
            "min" => Self::Min,
            "max" => Self::Max,
            "slack" => Self::Slack,
            "hash2" => Self::Hash2,
            "unique" => Self::Unique,
            _ => return None,
        })
    }
}

/// Joins results in request order: outputs are concatenated and metrics reduced by their suffix.
///
/// Means are weighted by the number of data. A metric that not every request has, or whose
/// reduction is unknown, is left out, as the official client does.
pub(crate) fn combine(results: Vec<ForwardBackwardOutput>) -> ForwardBackwardOutput {
    let weights: Vec<f64> = results
        .iter()
        .map(|result| result.loss_fn_outputs.len() as f64)
        .collect();
    let mut metrics = BTreeMap::new();
    for name in results
        .iter()
        .take(1)
        .flat_map(|first| first.metrics.keys())
    {
        let values: Option<Vec<f64>> = results
            .iter()
            .map(|result| result.metrics.get(name).copied())
            .collect();
        if let (Some(values), Some(reduction)) = (values, Reduction::of(name)) {
            reduce(&mut metrics, name, &reduction, &values, &weights);
        }
    }
    let mut combined = ForwardBackwardOutput {
        metrics,
        ..ForwardBackwardOutput::default()
    };
    for result in results {
        if combined.loss_fn_output_type.is_empty() {
            combined.loss_fn_output_type = result.loss_fn_output_type;
        }
        combined.loss_fn_outputs.extend(result.loss_fn_outputs);
    }
    combined
}

fn reduce(
    metrics: &mut BTreeMap<String, f64>,
    name: &str,
    reduction: &Reduction,
    values: &[f64],
    weights: &[f64],
) {
    let max = || values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let reduced = match reduction {
        Reduction::Mean => weighted_mean(values, weights),
        Reduction::Sum => values.iter().sum(),
        Reduction::Min => values.iter().copied().fold(f64::INFINITY, f64::min),
        Reduction::Max => max(),
        Reduction::Slack => max() - weighted_mean(values, weights),
        Reduction::Hash2 => values
            .iter()
            .fold(0_u64, |sum, &value| sum.wrapping_add(value as u64))
            as f64,
        Reduction::Unique => {
            for (i, &value) in values.iter().enumerate().skip(1) {
                metrics.insert(format!("{name}_{i}"), value);
            }
            values.first().copied().unwrap_or_default()
        }
    };
    metrics.insert(name.to_owned(), reduced);
}

/// 0 if there is nothing to weigh by.
fn weighted_mean(values: &[f64], weights: &[f64]) -> f64 {
    let total: f64 = weights.iter().sum();
    if total == 0.0 {
        return 0.0;
    }
    let sum: f64 = values.iter().zip(weights).map(|(v, w)| v * w).sum();
    sum / total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(n_outputs: usize, metrics: &[(&str, f64)]) -> ForwardBackwardOutput {
        ForwardBackwardOutput {
            loss_fn_output_type: format!("T{n_outputs}"),
            loss_fn_outputs: vec![BTreeMap::default(); n_outputs],
            metrics: metrics.iter().map(|&(k, v)| (k.to_owned(), v)).collect(),
        }
    }

    fn check(name: &str, first: f64, second: f64, expected: f64) {
        let combined = combine(vec![
            result(3, &[(name, first)]),
            result(1, &[(name, second)]),
        ]);
        assert_eq!(combined.metrics.get(name), Some(&expected), "{name}");
    }

    #[test]
    fn reduces_by_suffix() {
        check("loss:sum", 1.0, 2.5, 3.5);
        check("x:mean", 1.0, 5.0, 2.0);
        check("x:min", 1.0, -5.0, -5.0);
        check("x:max", 1.0, 5.0, 5.0);
        check("x:slack", 1.0, 5.0, 3.0);
        check("x:hash2", 7.9, 3.0, 10.0);
        check("x:unique", 4.0, 5.0, 4.0);
    }

    #[test]
    fn numbers_further_unique_values_from_one() {
        let combined = combine(vec![
            result(1, &[("x:unique", 4.0)]),
            result(1, &[("x:unique", 5.0)]),
            result(1, &[("x:unique", 6.0)]),
        ]);

        let expected = result(
            0,
            &[("x:unique", 4.0), ("x:unique_1", 5.0), ("x:unique_2", 6.0)],
        );
        assert_eq!(combined.metrics, expected.metrics);
    }

    #[test]
    fn leaves_out_unknown_reductions_and_metrics_that_one_result_lacks() {
        let combined = combine(vec![
            result(
                1,
                &[
                    ("a:sum", 1.0),
                    ("b:sum", 1.0),
                    ("c:median", 1.0),
                    ("d", 1.0),
                ],
            ),
            result(
                1,
                &[
                    ("a:sum", 1.0),
                    ("c:median", 1.0),
                    ("d", 1.0),
                    ("e:sum", 1.0),
                ],
            ),
        ]);

        assert_eq!(combined.metrics, result(0, &[("a:sum", 2.0)]).metrics);
    }

    #[test]
    fn concatenates_outputs_and_keeps_the_first_type() {
        let combined = combine(vec![result(2, &[]), result(3, &[])]);

        assert_eq!(combined.loss_fn_outputs.len(), 5);
        assert_eq!(combined.loss_fn_output_type, "T2");
    }

    #[test]
    fn a_mean_over_nothing_is_zero() {
        let combined = combine(vec![result(0, &[("x:mean", 3.0)])]);

        assert_eq!(combined.metrics["x:mean"], 0.0);
    }
}
