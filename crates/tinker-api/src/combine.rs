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
    /// Hash that does not depend on order.
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

/// Joins results in request order: outputs are concatenated and metrics reduced by their suffix, to
/// the last bit as the official client does it with numpy.
///
/// Means are weighted by the number of data. A metric that not every request has, or whose
/// reduction is unknown, is left out. Where the official client raises an exception, in spite of a
/// usable gradient, a name without exactly one colon is left out and a mean without weights or a
/// hash of no number is not a number.
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
    let mut results = results.into_iter();
    let mut combined = results.next().unwrap_or_default();
    combined.metrics = metrics;
    for result in results {
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
    let reduced = match reduction {
        Reduction::Mean => weighted_mean(values, weights),
        Reduction::Sum => sum(values),
        Reduction::Min => extreme(values, f64::min),
        Reduction::Max => extreme(values, f64::max),
        Reduction::Slack => extreme(values, f64::max) - weighted_mean(values, weights),
        Reduction::Hash2 => hash(values),
        Reduction::Unique => {
            for (i, &value) in values.iter().enumerate().skip(1) {
                metrics.insert(format!("{name}_{i}"), value);
            }
            values.first().copied().unwrap_or_default()
        }
    };
    metrics.insert(name.to_owned(), reduced);
}

/// Not a number if there is nothing to weigh by.
fn weighted_mean(values: &[f64], weights: &[f64]) -> f64 {
    let products: Vec<f64> = values.iter().zip(weights).map(|(v, w)| v * w).collect();
    sum(&products) / sum(weights)
}

/// Not a number if any value is not.
fn extreme(values: &[f64], of: fn(f64, f64) -> f64) -> f64 {
    let of = |a: f64, b: f64| {
        if a.is_nan() || b.is_nan() {
            f64::NAN
        } else {
            of(a, b)
        }
    };
    values.iter().copied().reduce(of).unwrap_or(f64::NAN)
}

/// The sum of the integer parts modulo 2^64, so that order does not matter.
fn hash(values: &[f64]) -> f64 {
    const MODULUS: f64 = 18_446_744_073_709_551_616.0;
    if values.iter().any(|value| !value.is_finite()) {
        return f64::NAN;
    }
    let part = |value: f64| {
        // Exact: the remainder has no more bits than the value.
        let rest = value.trunc() % MODULUS;
        if rest < 0.0 {
            (-rest as u64).wrapping_neg()
        } else {
            rest as u64
        }
    };
    let add = |sum: u64, &value: &f64| sum.wrapping_add(part(value));
    values.iter().fold(0, add) as f64
}

/// Longest run that is added up in one go.
const BLOCK: usize = 128;

/// The sum in the order of numpy's pairwise summation (`pairwise_sum` in `loops_utils.h.src`).
fn sum(values: &[f64]) -> f64 {
    0.0 + pairwise_sum(values)
}

fn pairwise_sum(values: &[f64]) -> f64 {
    let n = values.len();
    if n < 8 {
        return values.iter().fold(-0.0, |sum, x| sum + x);
    }
    if n <= BLOCK {
        let (blocks, rest) = values.as_chunks::<8>();
        let mut r = [-0.0; 8];
        for block in blocks {
            for (r, x) in r.iter_mut().zip(block) {
                *r += x;
            }
        }
        let sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
        return rest.iter().fold(sum, |sum, x| sum + x);
    }
    let half = n / 2 - n / 2 % 8;
    let (first, second) = values.split_at(half);
    pairwise_sum(first) + pairwise_sum(second)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde::Deserialize;

    use super::*;

    fn result(n_outputs: usize, metrics: &[(&str, f64)]) -> ForwardBackwardOutput {
        ForwardBackwardOutput {
            loss_fn_output_type: format!("T{n_outputs}"),
            loss_fn_outputs: vec![BTreeMap::default(); n_outputs],
            metrics: metrics.iter().map(|&(k, v)| (k.to_owned(), v)).collect(),
        }
    }

    #[derive(Deserialize)]
    struct Case {
        name: String,
        results: Vec<CaseResult>,
        combined: Combined,
    }

    #[derive(Deserialize)]
    struct CaseResult {
        n_outputs: usize,
        metrics: BTreeMap<String, String>,
    }

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Combined {
        Metrics(BTreeMap<String, String>),
        Exception(String),
    }

    /// Metrics by their bits; all kinds of not-a-number are one.
    fn bits(metrics: impl IntoIterator<Item = (String, f64)>) -> BTreeMap<String, u64> {
        let bits = |x: f64| if x.is_nan() { f64::NAN } else { x }.to_bits();
        metrics
            .into_iter()
            .map(|(name, x)| (name, bits(x)))
            .collect()
    }

    fn numbers(metrics: BTreeMap<String, String>) -> BTreeMap<String, f64> {
        let metrics = metrics.into_iter();
        metrics
            .map(|(name, x)| (name, x.parse().unwrap()))
            .collect()
    }

    #[test]
    fn reduces_as_the_official_client_to_the_last_bit() {
        let path = "../../fixtures/metrics/reductions.json";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let mut exceptions = BTreeMap::new();

        for Case {
            name,
            results,
            combined,
        } in cases
        {
            let results = results.into_iter().map(|result| ForwardBackwardOutput {
                loss_fn_outputs: vec![BTreeMap::default(); result.n_outputs],
                metrics: numbers(result.metrics),
                ..ForwardBackwardOutput::default()
            });
            let ours = combine(results.collect()).metrics;

            match combined {
                Combined::Metrics(theirs) => {
                    assert_eq!(bits(ours), bits(numbers(theirs)), "{name}");
                }
                Combined::Exception(exception) => {
                    assert!(exception.ends_with("Error"), "{name}: {exception}");
                    exceptions.insert(name, ours);
                }
            }
        }

        let left = |metrics: &BTreeMap<String, f64>| metrics.keys().cloned().collect::<Vec<_>>();
        assert_eq!(exceptions.len(), 5);
        assert_eq!(left(&exceptions["no suffix"]), ["a:sum"]);
        assert_eq!(left(&exceptions["two colons"]), ["a:sum"]);
        assert!(exceptions["hash of no number"]["x:hash2"].is_nan());
        assert!(exceptions["hash of infinity"]["x:hash2"].is_nan());
        let unweighted = &exceptions["no outputs at all"];
        assert!(unweighted["x:mean"].is_nan() && unweighted["x:slack"].is_nan());
        assert_eq!(unweighted["x:sum"], 4.0);
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
}
