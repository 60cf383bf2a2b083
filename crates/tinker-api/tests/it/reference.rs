//! Losses and gradients of the tape are those of PyTorch.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use tinker_api::custom_loss::{CustomLossError, Logprobs, Tape, Var, differentiate};

/// Relative to the larger of the value and 1. Both sides compute in 64-bit floats.
const TOLERANCE: f64 = 1e-9;

type Result<T> = std::result::Result<T, CustomLossError>;

#[derive(Deserialize)]
struct Array {
    shape: Vec<usize>,
    values: Vec<f64>,
}

#[derive(Deserialize)]
struct Case {
    inputs: Vec<Array>,
    loss: f64,
    gradients: Vec<Array>,
}

#[derive(Deserialize)]
struct Reference {
    constants: BTreeMap<String, Array>,
    losses: BTreeMap<String, Case>,
}

fn reference() -> Reference {
    let path = "../../fixtures/custom_loss/reference.json";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn assert_close(name: &str, actual: f64, expected: f64) {
    let error = (actual - expected).abs() / expected.abs().max(1.0);
    assert!(error < TOLERANCE, "{name}: {actual} is not {expected}");
}

impl Case {
    fn logprobs(&self) -> Vec<Logprobs> {
        let logprobs = |array: &Array| {
            let values = array.values.iter().map(|&x| x as f32).collect();
            Logprobs::new(values, array.shape.clone()).unwrap()
        };
        self.inputs.iter().map(logprobs).collect()
    }

    fn check(&self, name: &str, loss: f64, gradients: &[Vec<f64>]) {
        assert_close(name, loss, self.loss);
        assert_eq!(gradients.len(), self.gradients.len());
        for (actual, expected) in gradients.iter().zip(&self.gradients) {
            assert_eq!(actual.len(), expected.values.len());
            for (actual, expected) in actual.iter().zip(&expected.values) {
                assert_close(name, *actual, *expected);
            }
        }
    }
}

/// The losses of `make.py`; `other`, `advantages` and `mask` are its constants.
fn loss<'t>(name: &str, tape: &'t Tape, x: &[Var<'t>], constants: &Constants) -> Option<Var<'t>> {
    let a = x[0];
    let other = tape.constant(&constants.other);
    Some(match name {
        "exp_ln" => (a.exp() + 1.0).ln().sum(),
        "expm1_log1p" => (a.exp_m1() * 0.5).ln_1p().sum(),
        "sqrt_tanh" => ((-a).sqrt() * a.tanh()).sum(),
        "sigmoid" => ((3.0 * a).sigmoid() / (2.0 - a)).sum(),
        "logsigmoid" => -(40.0 * (a + 1.0)).logsigmoid().sum(),
        "softplus" => (a * 2.0 + 1.0).softplus().sum(),
        "powf" => (-a).powf(1.7).mean(),
        "abs_relu_clamp" => {
            ((a + 1.0).abs() + (a + 0.7).relu() * 2.0 + a.clamp(-1.2, -0.4).square()).sum()
        }
        "maximum_minimum" => (a.maximum(other) * 2.0 - a.minimum(other)).sum(),
        "ties" => a.maximum(a.detach()).sum() + 3.0 * a.max() + a.min(),
        "division" => (1.0 / (a - 1.0) + other / (a - 2.0)).sum(),
        "broadcast" => (a * x[1] - x[1] / (a - 1.0)).mean(),
        "broadcast_column" => {
            let sums = a.sum_axis(1).reshape(&[4, 1]);
            (sums * a + a.mean_axis(0)).sum()
        }
        "axes" => a.sum_axis(0).exp().sum() + a.mean_axis(1).square().sum(),
        "log_sum_exp" => (a * 300.0).log_sum_exp() + 0.1 * a.log_sum_exp(),
        "log_sum_exp_axis" => {
            (a * 2.0).log_sum_exp_axis(1).square().sum() + a.log_sum_exp_axis(0).exp().sum()
        }
        "gather" => {
            let weights = tape.constant(&[1.0, 2.0, 3.0, 4.0]);
            (a.gather(&[4, 0, 0, 2]) * weights).exp().sum()
        }
        "gather_rows" => a.gather_rows(&[2, 0, 1, 1]).sum() + a.norm(),
        "concat_stack" => {
            let means = [a.sum(), x[1].sum(), a.mean()];
            tape.concat([a, x[1], a]).square().sum() + tape.stack(means).log_sum_exp()
        }
        "matmul" => {
            let mut identity = [0.0; 16];
            (0..4).for_each(|i| identity[5 * i] = 1.0);
            let identity = tape.constant(&identity).reshape(&[4, 4]);
            let gram = a.matmul(a.transpose()) - identity;
            gram.square().sum() + a.transpose().matmul(a).max()
        }
        "masked_mean" => a.exp().masked_mean(&constants.mask),
        "norm" => a.norm() * x[1].norm() + (x[1] - x[1].detach()).norm(),
        "detach" => ((a.detach() - 0.5) * a).sum(),
        "second_order" => {
            let gradient = tape.gradients(a.exp().square().sum(), &[a])[0]?;
            (gradient.norm() - 1.0).square()
        }
        "ppo" => {
            let advantages = tape.constant(&constants.advantages);
            let ratio = (a - other).exp();
            -(ratio * advantages)
                .minimum(ratio.clamp(0.8, 1.2) * advantages)
                .sum()
        }
        "dpo" => {
            let margins = [a.sum() - x[1].sum() + 1.0, x[2].sum() - x[3].sum() - 0.5];
            -(tape.stack(margins) * 0.1).logsigmoid().mean()
        }
        _ => return None,
    })
}

struct Constants {
    other: Vec<f64>,
    advantages: Vec<f64>,
    mask: Vec<f64>,
}

#[test]
fn losses_and_gradients_are_those_of_pytorch() {
    let mut reference = reference();
    let mut constant = |name: &str| reference.constants.remove(name).unwrap().values;
    let constants = Constants {
        other: constant("other"),
        advantages: constant("advantages"),
        mask: constant("mask"),
    };
    assert_eq!(reference.losses.len(), 26);

    for (name, case) in &reference.losses {
        let evaluate = differentiate(|tape, _, x| -> Result<_> {
            loss(name, tape, x, &constants).ok_or_else(|| name.as_str().into())
        });
        let evaluation = evaluate(&[], &case.logprobs()).unwrap();

        case.check(name, evaluation.loss, &evaluation.gradients);
    }
}
