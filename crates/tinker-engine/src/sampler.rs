//! From logits to a token: temperature, top-k, top-p, and a draw that depends on a seed and a step.
//!
//! Everything here is a pure function, so a sample is reproduced by its logits, parameters, seed and
//! step alone. The log-probability that goes with a token is always that of the raw distribution
//! (temperature 1, nothing cut off): it can be compared with a recomputed one, and is what
//! importance sampling needs.

use crate::cpu::{arg_max, exp_differences, log_sum_exp};
use crate::error::{Error, Result};
use crate::loss::log_prob;
use crate::rng;

/// How to choose a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token (the lowest id of equals).
    pub temperature: f32,
    /// Keeps only this many of the most likely tokens; `None` keeps all.
    pub top_k: Option<usize>,
    /// Keeps the smallest set of most likely tokens whose probability reaches this, after
    /// temperature and top-k, always at least one; 1 keeps all.
    pub top_p: f32,
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Its id.
    pub token: u32,
    /// Natural-log probability in the raw distribution, at most 0.
    pub logprob: f32,
}

impl Sampling {
    /// Checks each parameter against its range.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the parameter and its value.
    pub fn check(&self) -> Result<()> {
        let Self {
            temperature,
            top_k,
            top_p,
        } = *self;
        if !(temperature.is_finite() && temperature >= 0.0) {
            let message = format!("temperature is {temperature}, it must be at least 0");
            return Err(Error::Invalid(message));
        }
        if top_k == Some(0) {
            return Err(Error::Invalid("top_k is 0, it must be at least 1".into()));
        }
        if !(0.0..=1.0).contains(&top_p) {
            return Err(Error::Invalid(format!(
                "top_p is {top_p}, it must be in [0, 1]"
            )));
        }
        Ok(())
    }
}

/// Draws the token of `step` from `logits`, `[vocab]`.
///
/// # Errors
/// [`Error::NotFinite`] if the logits have no finite maximum.
pub fn sample(logits: &[f32], sampling: &Sampling, seed: u64, step: u64) -> Result<Draw> {
    let log_sum = checked_log_sum(logits)?;
    let token = if sampling.temperature == 0.0 {
        arg_max(logits)
    } else {
        draw(logits, sampling, rng::uniform(seed, step))
    };
    Ok(Draw {
        token: token as u32,
        logprob: log_prob(logits[token], log_sum),
    })
}

/// Appends what [`sample`] draws at each of `steps` with nothing cut off; what does not depend on the
/// step is computed once.
///
/// # Errors
/// As [`sample`].
pub(crate) fn sample_steps(
    logits: &[f32],
    temperature: f32,
    seed: u64,
    steps: impl Iterator<Item = u64>,
    draws: &mut Vec<(u32, f32)>,
) -> Result<()> {
    let log_sum = checked_log_sum(logits)?;
    let token_of = |i: usize| (i as u32, log_prob(logits[i], log_sum));
    if temperature == 0.0 {
        let best = token_of(arg_max(logits));
        draws.extend(steps.map(|_| best));
        return Ok(());
    }
    let weights = tempered(logits, temperature);
    let mut sum = 0.0;
    let sums: Vec<f64> = weights
        .iter()
        .map(|weight| {
            sum += f64::from(*weight);
            sum
        })
        .collect();
    let last = weights.iter().rposition(|weight| *weight > 0.0);
    draws.extend(steps.map(|step| {
        let target = rng::uniform(seed, step) * sum;
        let i = sums.partition_point(|sum| *sum <= target);
        // As in `walk`, where rounding keeps the sum from passing.
        token_of(if i < sums.len() { i } else { last.unwrap_or(0) })
    }));
    Ok(())
}

/// The `n` most likely tokens with their log-probabilities, most likely first, lower ids first among
/// equals.
///
/// # Errors
/// As [`sample`].
pub fn most_likely(logits: &[f32], n: usize) -> Result<Vec<(u32, f32)>> {
    let log_sum = checked_log_sum(logits)?;
    let mut candidates = all_candidates(logits);
    keep_largest(&mut candidates, n);
    sort(&mut candidates);
    Ok(candidates
        .into_iter()
        .map(|c| (c.id, log_prob(c.weight, log_sum)))
        .collect())
}

/// Natural-log probability of `token`.
///
/// # Errors
/// As [`sample`], and if the token is outside the vocabulary or its logit is not finite.
pub fn logprob_of(logits: &[f32], token: u32) -> Result<f32> {
    let logit = logit_of(logits, token)?;
    Ok(log_prob(logit, checked_log_sum(logits)?))
}

/// Appends the natural-log probability of each of `tokens`.
///
/// # Errors
/// As [`logprob_of`].
pub fn logprobs_of(
    logits: &[f32],
    tokens: impl ExactSizeIterator<Item = u32>,
    logprobs: &mut Vec<f32>,
) -> Result<()> {
    if tokens.len() == 0 {
        return Ok(());
    }
    let log_sum = checked_log_sum(logits)?;
    for token in tokens {
        logprobs.push(log_prob(logit_of(logits, token)?, log_sum));
    }
    Ok(())
}

fn logit_of(logits: &[f32], token: u32) -> Result<f32> {
    let logit = logits.get(token as usize).copied().ok_or_else(|| {
        Error::Invalid(format!(
            "token {token} is not below the vocabulary size {}",
            logits.len()
        ))
    })?;
    if logit.is_finite() {
        return Ok(logit);
    }
    Err(Error::NotFinite(format!(
        "the model's logit of token {token} is {logit}"
    )))
}

fn checked_log_sum(logits: &[f32]) -> Result<f32> {
    let log_sum = log_sum_exp(logits);
    if log_sum.is_finite() {
        return Ok(log_sum);
    }
    Err(Error::NotFinite(format!(
        "the model's logits are not finite (log of their sum {log_sum})"
    )))
}

/// A token and its logit or weight.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    weight: f32,
    id: u32,
}

fn all_candidates(weights: &[f32]) -> Vec<Candidate> {
    (0..)
        .zip(weights)
        .map(|(id, weight)| Candidate {
            weight: *weight,
            id,
        })
        .collect()
}

/// Heavier first, then lower ids.
fn order(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

fn sort(candidates: &mut [Candidate]) {
    candidates.sort_unstable_by(order);
}

fn keep_largest(candidates: &mut Vec<Candidate>, n: usize) {
    if n > 0 && n < candidates.len() {
        candidates.select_nth_unstable_by(n - 1, order);
    }
    candidates.truncate(n);
}

/// Weights that the tokens are drawn by. The most likely one gets 1, so at least one is not 0.
fn tempered(logits: &[f32], temperature: f32) -> Vec<f32> {
    let mut weights = logits.to_vec();
    exp_differences(&mut weights, (1.0 / temperature).min(f32::MAX));
    weights
}

/// Index drawn by `uniform`, in `[0, 1)`, from the tempered and truncated distribution.
fn draw(logits: &[f32], sampling: &Sampling, uniform: f64) -> usize {
    let weights = tempered(logits, sampling.temperature);
    let top_k = sampling.top_k.filter(|k| *k < weights.len());
    if top_k.is_none() && sampling.top_p >= 1.0 {
        let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        let ids = (0..).zip(&weights);
        return walk(ids.map(|(id, w)| (id, f64::from(*w))), uniform * total);
    }
    let mut candidates = all_candidates(&weights);
    if let Some(k) = top_k {
        keep_largest(&mut candidates, k);
    }
    let total: f64 = candidates.iter().map(|c| f64::from(c.weight)).sum();
    let top_p = f64::from(sampling.top_p);
    // All that weigh less than this together weigh less than what may be cut off, so they are
    // beyond the cut whatever their order: no need to sort them.
    let negligible = total * (1.0 - top_p) / candidates.len() as f64;
    candidates.retain(|c| f64::from(c.weight) >= negligible);
    sort(&mut candidates);
    let mut mass = 0.0;
    let kept = candidates.iter().take_while(|c| {
        let wanted = mass == 0.0 || mass < top_p * total;
        mass += f64::from(c.weight);
        wanted
    });
    let kept: Vec<(usize, f64)> = kept.map(|c| (c.id as usize, f64::from(c.weight))).collect();
    let total: f64 = kept.iter().map(|(_, w)| w).sum();
    walk(kept.into_iter(), uniform * total)
}

/// The element in which the running sum passes `target`; the last with any weight if rounding keeps
/// it from passing.
fn walk(weights: impl Iterator<Item = (usize, f64)>, target: f64) -> usize {
    let mut sum = 0.0;
    let mut last = 0;
    for (id, weight) in weights {
        if weight > 0.0 {
            last = id;
        }
        sum += weight;
        if sum > target {
            return id;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Sampling = Sampling {
        temperature: 1.0,
        top_k: None,
        top_p: 1.0,
    };

    /// Logits of a 300-token distribution with a long tail.
    fn logits() -> Vec<f32> {
        (0..300)
            .map(|i| -((i * 7 % 300) as f32 + 1.0).ln() * 1.2)
            .collect()
    }

    /// What the definition of the parameters says, in double precision.
    fn distribution(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
        let scaled: Vec<f64> = logits
            .iter()
            .map(|x| (f64::from(*x) / f64::from(sampling.temperature)).exp())
            .collect();
        let mut ids: Vec<usize> = (0..logits.len()).collect();
        ids.sort_by(|a, b| scaled[*b].total_cmp(&scaled[*a]).then(a.cmp(b)));
        ids.truncate(sampling.top_k.unwrap_or(usize::MAX));
        let total: f64 = ids.iter().map(|i| scaled[*i]).sum();
        let mut mass = 0.0;
        let mut kept = vec![0.0; logits.len()];
        for i in ids {
            if mass > 0.0 && mass >= f64::from(sampling.top_p) * total {
                break;
            }
            mass += scaled[i];
            kept[i] = scaled[i];
        }
        kept.iter().map(|w| w / mass).collect()
    }

    /// Chi-square of 20,000 draws, with rare tokens pooled so that each bin expects 5 or more.
    fn check_frequencies(sampling: &Sampling) {
        const N: u32 = 20_000;
        let (logits, mut counts) = (logits(), vec![0.0; 300]);
        for seed in 0..u64::from(N) {
            counts[sample(&logits, sampling, seed, 3).unwrap().token as usize] += 1.0;
        }
        let expected = distribution(&logits, sampling);
        let (mut chi_square, mut bins, mut rare) = (0.0, 0, (0.0, 0.0));
        for (count, p) in counts.iter().zip(expected) {
            let expectation = p * f64::from(N);
            if expectation >= 5.0 {
                chi_square += (count - expectation).powi(2) / expectation;
                bins += 1;
            } else if expectation == 0.0 {
                assert_eq!(*count, 0.0, "{sampling:?}");
            } else {
                rare = (rare.0 + count, rare.1 + expectation);
            }
        }
        if rare.1 >= 5.0 {
            chi_square += (rare.0 - rare.1).powi(2) / rare.1;
            bins += 1;
        }
        // Wilson and Hilferty 1931: the cube root of chi-square over its mean is nearly normal.
        let degrees = f64::from(bins - 1);
        let spread = 2.0 / (9.0 * degrees);
        let z = ((chi_square / degrees).cbrt() - (1.0 - spread)) / spread.sqrt();
        assert!(
            z < 3.1,
            "{sampling:?}: chi-square {chi_square} with {degrees} degrees, z {z}"
        );
    }

    #[test]
    fn frequencies_follow_temperature_top_k_and_top_p() {
        check_frequencies(&ALL);
        check_frequencies(&Sampling {
            temperature: 0.6,
            ..ALL
        });
        check_frequencies(&Sampling {
            temperature: 1.7,
            ..ALL
        });
        check_frequencies(&Sampling {
            top_k: Some(20),
            ..ALL
        });
        check_frequencies(&Sampling { top_p: 0.8, ..ALL });
        check_frequencies(&Sampling {
            temperature: 1.3,
            top_k: Some(50),
            top_p: 0.7,
        });
    }

    #[test]
    fn temperature_zero_and_top_k_one_and_top_p_zero_take_the_best() {
        let logits = [0.0, 3.0, 1.0, 3.0];
        let greedy = [
            Sampling {
                temperature: 0.0,
                ..ALL
            },
            Sampling {
                top_k: Some(1),
                ..ALL
            },
            Sampling { top_p: 0.0, ..ALL },
        ];
        for sampling in greedy {
            for seed in 0..50 {
                assert_eq!(
                    sample(&logits, &sampling, seed, 0).unwrap().token,
                    1,
                    "{sampling:?}"
                );
            }
        }
        let cold = Sampling {
            temperature: 1e-9,
            ..ALL
        };
        assert_eq!(sample(&[0.0, 3.0, 2.9999], &cold, 1, 0).unwrap().token, 1);
    }

    #[test]
    fn the_logprob_is_raw_whatever_the_parameters() {
        let logits = logits();
        for sampling in [
            ALL,
            Sampling {
                temperature: 0.3,
                top_k: Some(3),
                top_p: 0.5,
            },
        ] {
            let draw = sample(&logits, &sampling, 9, 9).unwrap();

            let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
            let expected = f64::from(logits[draw.token as usize]) - sum.ln();
            assert!((f64::from(draw.logprob) - expected).abs() < 1e-6);
            assert_eq!(logprob_of(&logits, draw.token).unwrap(), draw.logprob);
        }
    }

    #[test]
    fn seeds_and_steps_decide_alone() {
        let logits = logits();
        let draws = |seed| -> Vec<u32> {
            (0..40)
                .map(|step| sample(&logits, &ALL, seed, step).unwrap().token)
                .collect()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn many_draws_at_once_have_the_bits_of_single_ones() {
        let logits = logits();
        for temperature in [0.0, 1e-9, 0.3, 1.0, 5.0] {
            let sampling = Sampling { temperature, ..ALL };
            let mut draws = Vec::new();
            sample_steps(&logits, temperature, 7, 0..5000, &mut draws).unwrap();

            for (step, (token, logprob)) in (0..).zip(draws) {
                let alone = sample(&logits, &sampling, 7, step).unwrap();
                assert_eq!((token, logprob), (alone.token, alone.logprob), "{step}");
            }
        }
    }

    #[test]
    fn the_most_likely_come_first_and_low_ids_before_high() {
        let top = most_likely(&[0.0, 2.0, 1.0, 2.0], 3).unwrap();
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(most_likely(&[0.0, 1.0], 5).unwrap().len(), 2);
    }

    #[test]
    fn what_cannot_be_sampled_is_refused() {
        assert!(sample(&[0.0, f32::NAN], &ALL, 0, 0).is_err());
        for logits in [[0.0, f32::INFINITY], [f32::NEG_INFINITY, 0.0]] {
            assert!(logprob_of(&logits, 0).is_err(), "{logits:?}");
        }
        let cases = [
            (
                Sampling {
                    temperature: -1.0,
                    ..ALL
                },
                "temperature is -1, it must be at least 0",
            ),
            (
                Sampling {
                    temperature: f32::NAN,
                    ..ALL
                },
                "temperature is NaN, it must be at least 0",
            ),
            (
                Sampling {
                    top_k: Some(0),
                    ..ALL
                },
                "top_k is 0, it must be at least 1",
            ),
            (
                Sampling { top_p: 1.5, ..ALL },
                "top_p is 1.5, it must be in [0, 1]",
            ),
        ];
        for (sampling, expected) in cases {
            assert_eq!(sampling.check().unwrap_err().to_string(), expected);
        }
    }
}
