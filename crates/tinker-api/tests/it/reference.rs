//! Losses and gradients of the tape are those of PyTorch.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use tinker_api::custom_loss::regularizers::*;
use tinker_api::custom_loss::{
    ComposedLoss, CustomLossError, Logprobs, LossAndGradient, Tape, Var, differentiate,
};
use tinker_api::{Datum, ModelInput, TensorData, TensorValues};

/// Relative to the larger of the value and 1. Both sides compute in 64-bit floats.
const TOLERANCE: f64 = 1e-9;

type Result<T> = std::result::Result<T, CustomLossError>;

#[derive(Clone, Deserialize)]
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
    constants: BTreeMap<String, Vec<Array>>,
    losses: BTreeMap<String, Case>,
    regularizers: BTreeMap<String, Case>,
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

impl Array {
    fn tensor(&self) -> TensorData {
        let values = self.values.iter().map(|&x| x as f32).collect();
        TensorData::dense(TensorValues::Float32(values), self.shape.clone()).unwrap()
    }

    fn logprobs(&self) -> Logprobs {
        let values = self.values.iter().map(|&x| x as f32).collect();
        Logprobs::new(values, self.shape.clone()).unwrap()
    }
}

impl Case {
    fn logprobs(&self) -> Vec<Logprobs> {
        self.inputs.iter().map(Array::logprobs).collect()
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
    let mut constant = |name: &str| reference.constants.remove(name).unwrap().remove(0).values;
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

/// The regularizers of `make.py`, alone with a weight of 1.
fn regularizer(name: &str, reference: Vec<Logprobs>) -> Option<ComposedLoss> {
    let mask = || Some("mask".to_owned());
    let values = ReferenceLogprobs::Values(reference);
    let input = ReferenceLogprobs::Input("reference".to_owned());
    let consistency = |distance| Consistency {
        pair: input.clone(),
        distance,
        ..Consistency::default()
    };
    let kl = KlDivergence::to(input.clone());
    let penalty = GradientPenalty::of(|tape, _, x| {
        let squares = tape.stack(x.iter().map(|x| x.exp().square().sum()));
        Ok(squares.sum() * x[0].sum())
    });
    let none = ComposedLoss::new(|tape, _, _| Ok(tape.number(0.0)));
    Some(match name {
        "l1" => none.with(name, 1.0, L1::default()),
        "l1_probs_mean" => {
            let (target, reduction) = (Target::Probs, Reduction::Mean);
            let scale = 2.0;
            none.with(
                name,
                1.0,
                L1 {
                    target,
                    scale,
                    reduction,
                    mask: None,
                },
            )
        }
        "l2" => none.with(name, 1.0, L2::default()),
        "l2_mean_center_clip" => {
            let l2 = L2 {
                scale: 0.5,
                reduction: Reduction::Mean,
                center: Center::Mean,
                clip: Some(0.3),
                ..L2::default()
            };
            none.with(name, 1.0, l2)
        }
        "l2_masked" => {
            let l2 = L2 {
                reduction: Reduction::Mean,
                center: Center::At(-1.0),
                mask: mask(),
                ..L2::default()
            };
            none.with(name, 1.0, l2)
        }
        "elastic_net" => {
            let net = ElasticNet {
                l1_ratio: 0.25,
                ..ElasticNet::default()
            };
            none.with(name, 1.0, net)
        }
        "entropy" => none.with(name, 1.0, Entropy::default()),
        "entropy_soft" => {
            let entropy = Entropy {
                goal: EntropyGoal::Minimize,
                reduction: Reduction::Sum,
                normalize: true,
                temperature: 0.7,
                mask: mask(),
            };
            none.with(name, 1.0, entropy)
        }
        "kl" => none.with(name, 1.0, kl),
        "kl_reversed" => {
            let (direction, reduction) = (KlDirection::ReferenceToModel, Reduction::Sum);
            none.with(
                name,
                1.0,
                KlDivergence {
                    direction,
                    reduction,
                    ..kl
                },
            )
        }
        "kl_symmetric" => {
            let direction = KlDirection::Symmetric;
            none.with(
                name,
                1.0,
                KlDivergence {
                    direction,
                    mask: mask(),
                    ..kl
                },
            )
        }
        "kl_soft" => none.with(name, 1.0, KlDivergence::to(values)),
        "kl_soft_reversed" => {
            let compute = match values {
                ReferenceLogprobs::Values(values) => {
                    ReferenceLogprobs::compute(move |_| Ok(values.clone()))
                }
                other => other,
            };
            let direction = KlDirection::ReferenceToModel;
            none.with(
                name,
                1.0,
                KlDivergence {
                    direction,
                    ..KlDivergence::to(compute)
                },
            )
        }
        "consistency_mse" => none.with(name, 1.0, consistency(Distance::Mse)),
        "consistency_mae" => none.with(name, 1.0, consistency(Distance::Mae)),
        "consistency_cosine" => none.with(name, 1.0, consistency(Distance::Cosine)),
        "consistency_kl" => none.with(name, 1.0, consistency(Distance::Kl)),
        "orthogonality" => none.with(name, 1.0, Orthogonality::default()),
        "orthogonality_identity" => {
            let orthogonality = Orthogonality {
                target: Target::Probs,
                mode: OrthogonalityMode::Identity,
                normalize: false,
            };
            none.with(name, 1.0, orthogonality)
        }
        "gradient_penalty" => none.with(name, 1.0, penalty),
        "gradient_penalty_between" => {
            let (reference, mix) = (input, 0.3);
            let mut penalty = penalty;
            penalty.at = PenaltyPoint::Between { reference, mix };
            penalty.target_norm = 0.5;
            none.with(name, 1.0, penalty)
        }
        _ => return None,
    })
}

#[test]
fn regularizers_and_their_gradients_are_those_of_pytorch() {
    let Reference {
        constants,
        regularizers,
        ..
    } = reference();
    assert_eq!(regularizers.len(), 21);

    for (name, case) in &regularizers {
        let logprobs = case.logprobs();
        let kind = if logprobs[0].shape().len() == 2 {
            "soft"
        } else {
            "one"
        };
        let references = &constants[&format!("{kind}_reference")];
        let masks = &constants[&format!("{kind}_mask")];
        let datum = |(reference, mask): (&Array, &Array)| {
            Datum::from_wire(ModelInput::from_tokens(vec![1]), BTreeMap::new())
                .with_input("reference", reference.tensor())
                .with_input("mask", mask.tensor())
        };
        let data: Vec<Datum> = references.iter().zip(masks).map(datum).collect();
        let reference = references.iter().map(Array::logprobs).collect();
        let loss = regularizer(name, reference).unwrap();

        let report = loss.evaluate(&data, &logprobs).unwrap();

        case.check(name, report.loss, &report.gradients);
        let norm = case.gradients.iter().flat_map(|g| &g.values);
        let norm = norm.map(|g| g * g).sum::<f64>().sqrt();
        assert_close(name, report.terms[0].grad_norm, norm);
        assert_close(name, report.terms[0].value, case.loss);
    }
}

fn pair() -> [Logprobs; 2] {
    [vec![-1.0, -2.0], vec![-0.5]].map(|values| {
        let shape = vec![values.len()];
        Logprobs::new(values, shape).unwrap()
    })
}

fn sum_of_all() -> ComposedLoss {
    ComposedLoss::new(|tape, _, x| {
        tape.metric("seen", x.len() as f64);
        Ok(-tape.concat(x.to_vec()).sum())
    })
}

#[test]
fn terms_report_value_weight_and_gradient_and_add_up() {
    let loss =
        sum_of_all()
            .with("l2", 0.5, L2::default())
            .with_function("first", 0.0, |tape, _, x| {
                tape.metric("m", 2.0);
                Ok(x[0].sum())
            });

    let report = loss.evaluate(&[], &pair()).unwrap();

    assert_eq!(report.base.value, 3.5);
    assert_eq!(report.base.grad_norm, 3.0_f64.sqrt());
    let l2 = &report.terms[0];
    assert_eq!((l2.value, l2.weight, l2.contribution), (5.25, 0.5, 2.625));
    assert_eq!(l2.grad_norm, (4.0 * 5.25_f64).sqrt());
    assert_eq!(l2.weighted_grad_norm, 0.5 * l2.grad_norm);
    assert_eq!((report.loss, report.regularizer_total), (6.125, 2.625));
    assert_eq!(report.gradients, [vec![-2.0, -3.0], vec![-1.5]]);
    assert_eq!(report.grad_norm, (4.0 + 9.0 + 2.25_f64).sqrt());
    let metrics = LossAndGradient::from(report).metrics;
    assert_eq!(metrics.len(), 2 + 3 * 5 + 2);
    for (name, value) in [
        ("seen", 2.0),
        ("first/m", 2.0),
        ("first/weight", 0.0),
        ("l2/contribution", 2.625),
        ("base/value", 3.5),
        ("regularizers/total", 2.625),
    ] {
        assert_eq!(metrics.get(name), Some(&value), "{name}");
    }
}

#[test]
fn threads_do_not_change_the_result() {
    let loss = |is_parallel| {
        (0..9)
            .fold(sum_of_all(), |loss, i| {
                loss.with(format!("l1_{i}"), 0.1 * f64::from(i), L1::default())
            })
            .parallel(is_parallel)
    };

    let one = loss(false).evaluate(&[], &pair()).unwrap();
    let many = loss(true).evaluate(&[], &pair()).unwrap();

    assert_eq!(one, many);
}

fn check_refused(loss: ComposedLoss, expected: &str) {
    let error = loss.evaluate(&[], &pair()).unwrap_err();
    assert_eq!(error.to_string(), expected);
}

#[test]
fn terms_that_cannot_be_composed_are_named() {
    let l1 = L1::default;
    check_refused(
        sum_of_all().with("a", 1.0, l1()).with("a", 1.0, l1()),
        "the name `a` is taken: choose another one",
    );
    check_refused(
        sum_of_all().with("total", 1.0, l1()),
        "the name `total` is taken: choose another one",
    );
    check_refused(
        sum_of_all().with("a", -1.0, l1()),
        "weight -1 of `a`: it must be 0 or more",
    );
    check_refused(
        sum_of_all().with("a", f64::NAN, l1()),
        "weight NaN of `a`: it must be 0 or more",
    );
    check_refused(
        sum_of_all().with("", 1.0, l1()),
        "a regularizer has no name",
    );
    assert!(sum_of_all().with("", 1.0, l1()).into_loss().is_err());
}

#[test]
fn a_term_that_fails_is_named() {
    let reference = ReferenceLogprobs::Values(pair()[..1].to_vec());
    check_refused(
        sum_of_all().with("kl", 1.0, KlDivergence::to(reference)),
        "term `kl`: the custom loss failed: 1 reference log-probabilities for 2 data",
    );
    let mut swapped = pair();
    swapped.reverse();
    let reference = ReferenceLogprobs::Values(swapped.to_vec());
    check_refused(
        sum_of_all().with("kl", 1.0, KlDivergence::to(reference)),
        "term `kl`: the custom loss failed: reference log-probabilities of datum 0 have shape \
         [1], the model's have [2]",
    );
    check_refused(
        sum_of_all().with("c", 1.0, Consistency::default()),
        "term `c`: the custom loss failed: there are log-probabilities of a datum 0, \
         but no such datum",
    );
    check_refused(
        sum_of_all().with_function("raises", 1.0, |_, _, _| Err("no pairs".into())),
        "term `raises`: the custom loss failed: no pairs",
    );
    check_refused(
        sum_of_all().with_function("panics", 1.0, |_, _, _| panic!("index 7")),
        "term `panics`: the custom loss panicked: index 7",
    );
    check_refused(
        sum_of_all().with_function("ln", 1.0, |_, _, x| Ok(x[0].ln().sum())),
        "term `ln`: the loss is NaN: it must be finite",
    );
    check_refused(
        sum_of_all().with("o", 1.0, Orthogonality::default()),
        "term `o`: cannot compute stack: the shapes [2] and [1] differ",
    );
    let entropy = Entropy {
        normalize: true,
        ..Entropy::default()
    };
    check_refused(
        sum_of_all().with("e", 1.0, entropy),
        "term `e`: the custom loss failed: entropy of log-probabilities of shape [2] with \
         temperature 1 and normalize true: temperature and normalize need [tokens, k] with k of \
         2 or more",
    );
}

#[test]
fn a_term_that_takes_too_long_is_named() {
    let endless = |tape: &Tape| while !tape.number(0.0).exp().value().is_nan() {};
    let loss = sum_of_all()
        .with_function("endless", 1.0, move |tape, _, x| {
            endless(tape);
            Ok(x[0].sum())
        })
        .time_limit(std::time::Duration::from_millis(20));

    check_refused(loss, "term `endless`: the custom loss takes too long");
}
