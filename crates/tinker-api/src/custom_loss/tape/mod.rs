//! A reverse-mode tape: write the loss, get its gradient.
//!
//! Operations on [`Var`]s are computed at once in 64-bit floats and noted; the gradient is found by
//! going back through the notes. Gradients are themselves made of noted operations, so they can be
//! differentiated again.

mod arithmetic;
mod gradient;
mod op;
mod reduce;
mod structure;
mod tensor;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::time::Instant;

use op::Op;
use tensor::{Tensor, n_cells};
use tinker_types::{Datum, TensorData, TensorValues};

use super::error::CustomLossError;
use super::evaluation::{Logprobs, LossAndGradient};

/// Row-major, of one input.
pub(super) type Gradient = Vec<f64>;

/// The notes of one computation.
///
/// An operation that makes no sense, such as a sum of unlike shapes, ends the computation: what
/// follows is not a number, and the loss fails with the first such error.
#[derive(Debug, Default)]
pub struct Tape {
    nodes: RefCell<Vec<Node>>,
    metrics: RefCell<BTreeMap<String, f64>>,
    fault: RefCell<Option<CustomLossError>>,
    is_faulty: Cell<bool>,
    deadline: Option<Instant>,
}

#[derive(Debug)]
struct Node {
    op: Op,
    value: Tensor,
}

/// A value on a [`Tape`]: an array of any shape, `[]` for a single number.
///
/// Shapes are aligned at the last axis and repeated where one of them is missing or 1, as in
/// PyTorch.
#[derive(Clone, Copy)]
pub struct Var<'t> {
    tape: &'t Tape,
    id: usize,
}

/// Makes a loss for
/// [`forward_backward_custom`](crate::TrainingClient::forward_backward_custom) of a function that
/// has no derivative.
///
/// `loss` gets the tape, the data and the log-probabilities of each datum, `[tokens]` or
/// `[tokens, k]`, and returns a single number.
///
/// ```
/// use tinker_api::custom_loss::{Logprobs, differentiate};
///
/// let loss = differentiate(|tape, _data, logprobs| {
///     let squares = logprobs.iter().map(|l| l.square().sum());
///     let total = tape.stack(squares).sum();
///     tape.metric("squares", total.value());
///     Ok(total)
/// });
/// let logprobs = Logprobs::new(vec![-1.0, -2.0], vec![2])?;
/// let evaluation = loss(&[], &[logprobs])?;
/// assert_eq!(evaluation.loss, 5.0);
/// assert_eq!(evaluation.gradients, [[-2.0, -4.0]]);
/// # Ok::<(), tinker_api::custom_loss::CustomLossError>(())
/// ```
///
/// # Errors
/// The loss made so fails with the error of `loss`, that of its first impossible operation, or
/// [`CustomLossError::NoGradient`] if it leaves a datum out.
pub fn differentiate<F>(
    loss: F,
) -> impl FnOnce(&[Datum], &[Logprobs]) -> Result<LossAndGradient, CustomLossError>
where
    F: for<'t> FnOnce(&'t Tape, &[Datum], &[Var<'t>]) -> Result<Var<'t>, CustomLossError>,
{
    move |data, logprobs| {
        let tape = Tape::default();
        let inputs: Vec<Var<'_>> = logprobs.iter().map(|l| tape.logprobs(l)).collect();
        let loss = loss(&tape, data, &inputs)?;
        let (loss, gradients) = tape.evaluate(loss, &inputs)?;
        let gradients = gradients.into_iter().enumerate();
        let gradients = gradients.map(|(datum, g)| g.ok_or(CustomLossError::NoGradient { datum }));
        Ok(LossAndGradient {
            loss,
            gradients: gradients.collect::<Result<_, _>>()?,
            metrics: tape.metrics.take(),
        })
    }
}

impl Tape {
    /// A tape whose operations fail after a moment.
    pub(super) fn until(deadline: Option<Instant>) -> Self {
        Self {
            deadline,
            ..Self::default()
        }
    }

    /// A single number that is not differentiated.
    pub fn number(&self, value: f64) -> Var<'_> {
        self.leaf(Tensor::scalar(value))
    }

    /// `[values]` that are not differentiated.
    pub fn constant<T: Into<f64> + Copy>(&self, values: &[T]) -> Var<'_> {
        let values: Rc<[f64]> = values.iter().map(|&x| x.into()).collect();
        self.leaf(Tensor::new([values.len()], values))
    }

    /// A loss input of a datum by its name, in its shape; not differentiated.
    ///
    /// Fails if the datum lacks it.
    pub fn input(&self, datum: &Datum, name: &str) -> Var<'_> {
        match datum.loss_fn_inputs().get(name) {
            Some(tensor) => self.tensor_data(tensor),
            None => self.fail("input", format!("the datum has no input `{name}`")),
        }
    }

    /// A tensor; not differentiated.
    pub fn tensor_data(&self, tensor: &TensorData) -> Var<'_> {
        let tensor = tensor.to_dense();
        let values: Rc<[f64]> = match tensor.values() {
            TensorValues::Float32(values) => values.iter().map(|&x| x.into()).collect(),
            TensorValues::Int64(values) => values.iter().map(|&x| x as f64).collect(),
        };
        self.leaf(Tensor::new(tensor.shape(), values))
    }

    /// Adds a metric to the result of the pass; the last one of a name counts.
    pub fn metric(&self, name: impl Into<String>, value: f64) {
        self.metrics.borrow_mut().insert(name.into(), value);
    }

    pub(super) fn take_metrics(&self) -> BTreeMap<String, f64> {
        self.metrics.take()
    }

    pub(super) fn logprobs(&self, logprobs: &Logprobs) -> Var<'_> {
        let values: Rc<[f64]> = logprobs.values().iter().map(|&x| x.into()).collect();
        self.leaf(Tensor::new(logprobs.shape(), values))
    }

    /// The loss, and its gradient with respect to each input that it depends on.
    pub(super) fn evaluate<'t>(
        &'t self,
        loss: Var<'t>,
        inputs: &[Var<'t>],
    ) -> Result<(f64, Vec<Option<Gradient>>), CustomLossError> {
        let value = loss.value();
        let gradients = self.gradients(loss, inputs);
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let values = |gradient: Option<Var<'_>>| gradient.map(|g| g.values());
        Ok((value, gradients.into_iter().map(values).collect()))
    }

    /// Whether an operation made no sense.
    pub(super) fn is_faulty(&self) -> bool {
        self.is_faulty.get()
    }

    fn leaf(&self, value: Tensor) -> Var<'_> {
        self.push(Op::Leaf, value)
    }

    fn push(&self, op: Op, value: Tensor) -> Var<'_> {
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(Node { op, value });
        Var {
            tape: self,
            id: nodes.len() - 1,
        }
    }

    /// Computes and notes an operation whose operands fit, unless the computation has ended.
    fn apply(&self, op: Op, shape: impl Into<Rc<[usize]>>) -> Var<'_> {
        if self.is_faulty.get() {
            return self.number(f64::NAN);
        }
        if self
            .deadline
            .is_some_and(|deadline| Instant::now() > deadline)
        {
            return self.end(CustomLossError::OutOfTime);
        }
        let value = op.compute(&shape.into(), |id| self.value_of(id));
        self.push(op, value)
    }

    fn value_of(&self, id: usize) -> Tensor {
        self.nodes.borrow()[id].value.clone()
    }

    fn fail(&self, operation: &'static str, detail: String) -> Var<'_> {
        self.end(CustomLossError::Operation { operation, detail })
    }

    fn end(&self, error: CustomLossError) -> Var<'_> {
        self.is_faulty.set(true);
        self.fault.borrow_mut().get_or_insert(error);
        self.number(f64::NAN)
    }
}

impl<'t> Var<'t> {
    /// The tape that it is on.
    #[must_use]
    pub const fn tape(self) -> &'t Tape {
        self.tape
    }

    /// Its dimensions; `[]` for a single number.
    #[must_use]
    pub fn shape(self) -> Vec<usize> {
        self.tensor().shape.to_vec()
    }

    /// Its values, row-major.
    #[must_use]
    pub fn values(self) -> Vec<f64> {
        self.tensor().values.to_vec()
    }

    /// Its only value. The computation fails if it has more or none.
    #[must_use]
    pub fn value(self) -> f64 {
        let tensor = self.tensor();
        if let [value] = *tensor.values {
            return value;
        }
        let detail = format!("one number is needed, not the shape {:?}", tensor.shape);
        self.tape.fail("value", detail).value()
    }

    /// The same values, cut off from what they were computed from.
    #[must_use]
    pub fn detach(self) -> Self {
        self.tape.leaf(self.tensor())
    }

    fn tensor(self) -> Tensor {
        self.tape.value_of(self.id)
    }

    fn n_values(self) -> usize {
        n_cells(&self.tensor().shape)
    }
}

impl fmt::Debug for Var<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tensor = self.tensor();
        write!(f, "Var {:?} {:?}", tensor.shape, tensor.values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The error of a loss of two data, `[2]` and `[3]`.
    fn check(loss: impl for<'t> FnOnce(&'t Tape, &[Var<'t>]) -> Var<'t>, expected: &str) {
        let logprobs = [2, 3].map(|n| Logprobs::new(vec![-1.0; n], vec![n]).unwrap());
        let result = differentiate(|tape, _, x| Ok(loss(tape, x)))(&[], &logprobs);
        assert_eq!(result.unwrap_err().to_string(), expected);
    }

    #[test]
    fn the_first_operation_that_makes_no_sense_is_named() {
        check(
            |_, x| (x[0] + x[1]).gather(&[7]).sum(),
            "cannot compute add: the shapes [2] and [3] do not fit together",
        );
        check(
            |_, x| x[0].gather(&[1, 2]).sum() + x[1].sum(),
            "cannot compute gather: position 2 of 2 values",
        );
        check(
            |_, x| x[0].mask(&[1.0_f32]).sum() + x[1].sum(),
            "cannot compute mask: 1 weights for the shape [2]",
        );
        check(
            |_, x| x[0].masked_mean(&[0.0, 0.0]) + x[1].sum(),
            "cannot compute masked_mean: the weights add up to 0",
        );
        check(
            |_, x| x[0].matmul(x[1]),
            "cannot compute matmul: the shapes [2] and [3] do not fit together",
        );
        check(
            |tape, x| tape.stack(x.iter().copied()).sum(),
            "cannot compute stack: the shapes [2] and [3] differ",
        );
        check(
            |_, x| x[0].slice(0..0).mean() + x[1].sum(),
            "cannot compute mean: there are no values",
        );
        check(
            |_, x| x[0].sum_axis(1) + x[1].log_sum_exp_axis(4),
            "cannot compute sum_axis: the shape [2] has no axis 1",
        );
    }

    #[test]
    fn a_loss_is_one_number() {
        let expected = "cannot compute value: one number is needed, not the shape [2]";
        check(|_, x| x[0], expected);
    }

    #[test]
    fn a_loss_that_leaves_a_datum_out_is_refused() {
        let expected = "the custom loss does not depend on the log-probabilities of datum 1: \
                        remove it from the data, or mask it";
        check(|_, x| x[0].sum(), expected);
        check(|_, x| x[0].sum() + x[1].detach().sum(), expected);
    }

    #[test]
    fn a_masked_datum_has_a_gradient_of_zeros() {
        let logprobs = Logprobs::new(vec![f32::NEG_INFINITY, -1.0], vec![2]).unwrap();
        let loss = differentiate(|_, _, x| Ok(x[0].exp().mask(&[0.0, 0.0]).sum()));

        let evaluation = loss(&[], &[logprobs]).unwrap();

        assert_eq!(evaluation.loss, 0.0);
        assert_eq!(evaluation.gradients, [[0.0, 0.0]]);
    }

    #[test]
    fn values_of_two_tapes_do_not_mix() {
        let (one, other) = (Tape::default(), Tape::default());

        let sum = one.number(1.0) + other.number(1.0);
        let gradients = one.gradients(one.number(2.0), &[other.number(1.0)]);

        assert!(sum.value().is_nan());
        assert!(gradients[0].is_none());
    }

    #[test]
    fn metrics_travel_with_the_loss() {
        let logprobs = Logprobs::new(vec![-1.0], vec![1]).unwrap();
        let loss = differentiate(|tape, _, x| {
            tape.metric("m", 1.0);
            tape.metric("m", x[0].mean().value());
            Ok(x[0].sum())
        });

        let metrics = loss(&[], &[logprobs]).unwrap().metrics;

        assert_eq!(metrics, [("m".to_owned(), -1.0)].into());
    }
}
