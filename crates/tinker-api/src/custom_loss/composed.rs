//! A loss made of terms: a base and weighted regularizers, each with its own value and gradient.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tinker_types::Datum;

use super::error::CustomLossError;
use super::evaluation::{Logprobs, LossAndGradient};
use super::regularizers::Regularizer;
use super::tape::{Gradient, Tape, Var};

type Result<T> = std::result::Result<T, CustomLossError>;

const BASE: &str = "base";
const REGULARIZERS: &str = "regularizers";
const TOTAL: &str = "total";

/// `base + sum weight * regularizer`.
///
/// ```
/// use tinker_api::custom_loss::regularizers::{KlDivergence, L1, ReferenceLogprobs};
/// use tinker_api::custom_loss::{ComposedLoss, Logprobs};
///
/// let loss = ComposedLoss::new(|tape, _data, logprobs| Ok(-tape.concat(logprobs.to_vec()).sum()))
///     .with("sparsity", 0.01, L1::default())
///     .with_function("spread", 0.1, |tape, _data, logprobs| {
///         Ok(tape.concat(logprobs.to_vec()).square().mean())
///     });
/// let logprobs = [Logprobs::new(vec![-1.0, -2.0], vec![2])?];
/// let report = loss.evaluate(&[], &logprobs)?;
/// assert!((report.loss - (3.0 + 0.01 * 3.0 + 0.1 * 2.5)).abs() < 1e-12);
/// assert_eq!(report.terms[1].value, 2.5);
/// # Ok::<(), tinker_api::custom_loss::CustomLossError>(())
/// ```
#[derive(Debug)]
pub struct ComposedLoss {
    base: Box<dyn Regularizer>,
    terms: Vec<Term>,
    is_parallel: bool,
    time_limit: Option<Duration>,
}

#[derive(Debug)]
struct Term {
    name: String,
    weight: f64,
    regularizer: Box<dyn Regularizer>,
}

/// What a composed loss came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComposedReport {
    /// `base + regularizer_total`.
    pub loss: f64,
    /// The base; its weight is 1.
    pub base: TermReport,
    /// The regularizers in the order they were added.
    pub terms: Vec<TermReport>,
    /// Sum of the regularizers' contributions.
    pub regularizer_total: f64,
    /// Euclidean norm of the whole gradient.
    pub grad_norm: f64,
    /// `d loss / d logprobs`, one per datum, row-major.
    #[serde(skip)]
    pub gradients: Vec<Vec<f64>>,
}

/// What one term came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TermReport {
    /// Its name.
    pub name: String,
    /// Its value before it is weighted.
    pub value: f64,
    /// Its weight.
    pub weight: f64,
    /// `weight * value`.
    pub contribution: f64,
    /// Euclidean norm of its gradient over all data, before it is weighted; 0 if it depends on
    /// none of them.
    pub grad_norm: f64,
    /// `weight * grad_norm`.
    pub weighted_grad_norm: f64,
    /// Its own metrics.
    pub metrics: BTreeMap<String, f64>,
}

/// A term's report and its gradient, absent for data that it does not depend on.
type Evaluated = (TermReport, Vec<Option<Gradient>>);

impl ComposedLoss {
    /// A loss of one term, as for [`differentiate`](super::differentiate).
    pub fn new<F>(base: F) -> Self
    where
        F: for<'t> Fn(&'t Tape, &[Datum], &[Var<'t>]) -> Result<Var<'t>> + Send + Sync + 'static,
    {
        Self {
            base: Box::new(Function(base)),
            terms: Vec::new(),
            is_parallel: true,
            time_limit: None,
        }
    }

    /// Adds a regularizer under a name of its own, with a weight of 0 or more.
    #[must_use]
    pub fn with(
        mut self,
        name: impl Into<String>,
        weight: f64,
        regularizer: impl Regularizer,
    ) -> Self {
        self.terms.push(Term {
            name: name.into(),
            weight,
            regularizer: Box::new(regularizer),
        });
        self
    }

    /// Adds a function as a regularizer.
    #[must_use]
    pub fn with_function<F>(self, name: impl Into<String>, weight: f64, function: F) -> Self
    where
        F: for<'t> Fn(&'t Tape, &[Datum], &[Var<'t>]) -> Result<Var<'t>> + Send + Sync + 'static,
    {
        self.with(name, weight, Function(function))
    }

    /// Whether terms are computed on several threads; the result is the same. Default: yes.
    #[must_use]
    pub const fn parallel(mut self, is_parallel: bool) -> Self {
        self.is_parallel = is_parallel;
        self
    }

    /// Lets an evaluation fail after so long. Checked at each operation of a tape; what a function
    /// does between operations cannot be interrupted.
    #[must_use]
    pub const fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = Some(limit);
        self
    }

    /// Checks names and weights.
    ///
    /// # Errors
    /// [`CustomLossError::Composition`] if a weight is negative or not finite, or a name is empty,
    /// given twice, or one of `base`, `regularizers` and `total`.
    pub fn check(&self) -> Result<()> {
        let mut names = vec![BASE, REGULARIZERS, TOTAL];
        for Term { name, weight, .. } in &self.terms {
            let fault = |text: String| Err(CustomLossError::Composition(text));
            if name.is_empty() {
                return fault("a regularizer has no name".into());
            }
            if names.contains(&&**name) {
                return fault(format!("the name `{name}` is taken: choose another one"));
            }
            if !(weight.is_finite() && *weight >= 0.0) {
                return fault(format!("weight {weight} of `{name}`: it must be 0 or more"));
            }
            names.push(name);
        }
        Ok(())
    }

    /// Computes all terms and what they add up to.
    ///
    /// # Errors
    /// Those of [`check`](Self::check); [`CustomLossError::Term`] names the first term that fails.
    pub fn evaluate(&self, data: &[Datum], logprobs: &[Logprobs]) -> Result<ComposedReport> {
        self.check()?;
        let deadline = self.time_limit.map(|limit| Instant::now() + limit);
        let base = (BASE, 1.0, &*self.base);
        let terms = self.terms.iter();
        let terms = terms.map(|term| (&*term.name, term.weight, &*term.regularizer));
        let terms: Vec<_> = std::iter::once(base).chain(terms).collect();
        let evaluate = |i: usize| evaluate(terms[i], deadline, data, logprobs);
        let n_threads = match self.is_parallel {
            true => std::thread::available_parallelism().map_or(1, usize::from),
            false => 1,
        };
        let results = in_parallel(terms.len(), n_threads, evaluate);
        combine(results.into_iter().collect::<Result<_>>()?, logprobs)
    }

    /// The loss as
    /// [`forward_backward_custom`](crate::TrainingClient::forward_backward_custom) takes it.
    ///
    /// It adds metrics: `NAME/value`, `/weight`, `/contribution`, `/grad_norm` and
    /// `/weighted_grad_norm` of each term, `base` included, `regularizers/total`,
    /// `total/grad_norm`, the base's own metrics and `NAME/METRIC` of the others.
    ///
    /// # Errors
    /// Those of [`check`](Self::check).
    pub fn into_loss(
        self,
    ) -> Result<impl FnOnce(&[Datum], &[Logprobs]) -> Result<LossAndGradient> + Send + 'static>
    {
        self.check()?;
        Ok(move |data: &[Datum], logprobs: &[Logprobs]| Ok(self.evaluate(data, logprobs)?.into()))
    }
}

/// A function as a term.
struct Function<F>(F);

impl<F> fmt::Debug for Function<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Function")
    }
}

impl<F> Regularizer for Function<F>
where
    F: for<'t> Fn(&'t Tape, &[Datum], &[Var<'t>]) -> Result<Var<'t>> + Send + Sync + 'static,
{
    fn penalty<'t>(&self, tape: &'t Tape, data: &[Datum], logprobs: &[Var<'t>]) -> Result<Var<'t>> {
        (self.0)(tape, data, logprobs)
    }
}

/// Computes one term on a tape of its own.
fn evaluate(
    (name, weight, regularizer): (&str, f64, &dyn Regularizer),
    deadline: Option<Instant>,
    data: &[Datum],
    logprobs: &[Logprobs],
) -> Result<Evaluated> {
    let tape = Tape::until(deadline);
    let compute = || {
        let inputs: Vec<Var<'_>> = logprobs.iter().map(|l| tape.logprobs(l)).collect();
        let value = regularizer.penalty(&tape, data, &inputs)?;
        let (value, gradients) = tape.evaluate(value, &inputs)?;
        match value.is_finite() {
            true => Ok((value, gradients)),
            false => Err(CustomLossError::LossNotFinite(value)),
        }
    };
    let computed = catch_unwind(AssertUnwindSafe(compute))
        .unwrap_or_else(|payload| Err(CustomLossError::panicked(&*payload)));
    let (value, gradients) = computed.map_err(|source| CustomLossError::Term {
        name: name.to_owned(),
        source: Box::new(source),
    })?;
    let grad_norm = norm(gradients.iter().flatten());
    tracing::debug!(
        term = name,
        value,
        weight,
        grad_norm,
        "computed a term of a loss"
    );
    let report = TermReport {
        name: name.to_owned(),
        value,
        weight,
        contribution: weight * value,
        grad_norm,
        weighted_grad_norm: weight * grad_norm,
        metrics: tape.take_metrics(),
    };
    Ok((report, gradients))
}

/// Calls `compute` for `0..n` on some threads; results in order.
fn in_parallel<T: Send>(n: usize, n_threads: usize, compute: impl Fn(usize) -> T + Sync) -> Vec<T> {
    if n_threads.min(n) <= 1 {
        return (0..n).map(compute).collect();
    }
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(n));
    std::thread::scope(|scope| {
        for _ in 0..n_threads.min(n) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= n {
                        return;
                    }
                    let result = compute(i);
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    results.push((i, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_unstable_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Adds up the terms, of which the first is the base, in their order.
fn combine(terms: Vec<Evaluated>, logprobs: &[Logprobs]) -> Result<ComposedReport> {
    let gradients = (0..logprobs.len())
        .map(|datum| {
            let mut sum = vec![0.0; logprobs[datum].len()];
            let mut is_reached = false;
            for (report, gradients) in &terms {
                let Some(Some(gradient)) = gradients.get(datum) else {
                    continue;
                };
                is_reached = true;
                for (sum, g) in sum.iter_mut().zip(gradient) {
                    *sum += report.weight * g;
                }
            }
            match is_reached {
                true => Ok(sum),
                false => Err(CustomLossError::NoGradient { datum }),
            }
        })
        .collect::<Result<Vec<_>>>()?;
    let mut reports = terms.into_iter().map(|(report, _)| report);
    let Some(base) = reports.next() else {
        return Err("there is no base".into());
    };
    let terms: Vec<TermReport> = reports.collect();
    // Not from -0, which an empty sum of floats is.
    let total = terms.iter().fold(0.0, |sum, term| sum + term.contribution);
    Ok(ComposedReport {
        loss: base.value + total,
        base,
        terms,
        regularizer_total: total,
        grad_norm: norm(&gradients),
        gradients,
    })
}

fn norm<'g>(gradients: impl IntoIterator<Item = &'g Gradient>) -> f64 {
    let squares = gradients.into_iter().flatten().map(|g| g * g);
    squares.fold(0.0, |sum, square| sum + square).sqrt()
}

impl From<ComposedReport> for LossAndGradient {
    fn from(report: ComposedReport) -> Self {
        let mut metrics = BTreeMap::from([
            (format!("{REGULARIZERS}/total"), report.regularizer_total),
            (format!("{TOTAL}/grad_norm"), report.grad_norm),
        ]);
        for term in std::iter::once(&report.base).chain(&report.terms) {
            let name = &term.name;
            metrics.extend([
                (format!("{name}/value"), term.value),
                (format!("{name}/weight"), term.weight),
                (format!("{name}/contribution"), term.contribution),
                (format!("{name}/grad_norm"), term.grad_norm),
                (
                    format!("{name}/weighted_grad_norm"),
                    term.weighted_grad_norm,
                ),
            ]);
            metrics.extend(term.metrics.iter().map(|(metric, value)| match &**name {
                BASE => (metric.clone(), *value),
                name => (format!("{name}/{metric}"), *value),
            }));
        }
        Self {
            loss: report.loss,
            gradients: report.gradients,
            metrics,
        }
    }
}
