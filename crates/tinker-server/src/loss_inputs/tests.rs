//! What a datum of each loss becomes for the engine, and what is refused and how it is named.

use std::sync::Arc;

use super::*;
use crate::custom_loss::Program;
use tinker_engine::{Bound, Loss};
use tinker_types::{LossConfig, LossFn, SparseIndex};

fn no_loss(id: &str) -> Result<Arc<Program>> {
    Err(Error::Invalid(format!("no loss {id}")))
}

fn info() -> BaseInfo {
    BaseInfo {
        vocab_size: 10,
        max_context: 4,
        hidden_size: 8,
        n_layers: 1,
        n_parameters: 1,
        architecture: "x".into(),
        precision: "cpu".into(),
    }
}

fn datum(tokens: &[u32], inputs: &[(&str, TensorData)]) -> Datum {
    let named = inputs
        .iter()
        .map(|(n, t)| ((*n).to_owned(), t.clone()))
        .collect();
    Datum::from_wire(ModelInput::from_tokens(tokens.to_vec()), named)
}

fn request(loss: LossFn, datum: Datum) -> ForwardBackwardRequest {
    ForwardBackwardRequest {
        model_id: "r".parse().unwrap(),
        seq_id: 1,
        data: vec![datum],
        loss_fn: loss,
        loss_fn_config: LossConfig::new(),
        forward_only: false,
    }
}

fn refusal(loss: LossFn, datum: Datum) -> String {
    sequences(&request(loss, datum), &info(), &no_loss)
        .unwrap_err()
        .to_string()
}

fn targets_of(n: usize) -> (&'static str, TensorData) {
    ("target_tokens", TensorData::ints(vec![1; n]))
}

fn floats_of(name: &'static str, values: &[f32]) -> (&'static str, TensorData) {
    (name, TensorData::floats(values.to_vec()))
}

#[test]
fn missing_weights_count_every_target_once() {
    let built = sequences(
        &request(LossFn::CrossEntropy, datum(&[1, 2], &[targets_of(2)])),
        &info(),
        &no_loss,
    );

    let expected = Loss::CrossEntropy {
        weights: vec![1.0, 1.0],
    };
    assert_eq!(built.unwrap()[0].loss, expected);
}

#[test]
fn sparse_targets_become_dense() {
    let index = SparseIndex {
        crow_indices: vec![0, 1, 2],
        col_indices: vec![0, 2],
    };
    let sparse = |v: TensorValues| TensorData::sparse(v, vec![2, 3], index.clone()).unwrap();
    let inputs = [
        ("target_tokens", sparse(TensorValues::Int64(vec![5, 6]))),
        ("weights", sparse(TensorValues::Float32(vec![0.5, 0.25]))),
    ];

    let built = sequences(
        &request(LossFn::CrossEntropy, datum(&[1, 2], &inputs)),
        &info(),
        &no_loss,
    )
    .unwrap();

    assert_eq!(
        (built[0].k, &built[0].targets[..]),
        (3, &[5, 0, 0, 0, 0, 6][..])
    );
    assert_eq!(
        built[0].loss,
        Loss::CrossEntropy {
            weights: vec![0.5, 0.0, 0.0, 0.0, 0.0, 0.25]
        }
    );
}

/// A tensor without values, which takes a few bytes on the wire whatever its width.
fn empty_targets(n_rows: usize, n_cols: usize) -> TensorData {
    let index = SparseIndex {
        crow_indices: vec![0; n_rows + 1],
        col_indices: Vec::new(),
    };
    TensorData::sparse(TensorValues::Int64(Vec::new()), vec![n_rows, n_cols], index).unwrap()
}

#[test]
fn wide_and_many_sparse_tensors_are_refused() {
    let ce = LossFn::CrossEntropy;
    let of_shape = |n, k| datum(&[1, 2], &[("target_tokens", empty_targets(n, k))]);

    assert_eq!(
        refusal(ce.clone(), of_shape(2, 1025)),
        "datum 0: target_tokens has 1025 targets per token: at most 1024 are taken"
    );
    assert_eq!(
        refusal(ce.clone(), of_shape(1, 1 << 20)),
        "datum 0: target_tokens of shape [1, 1048576] for 2 input tokens: it must be [2] or [2, k]"
    );
    let mut many = request(ce.clone(), of_shape(2, 1 << 20));
    many.data = vec![many.data[0].clone(); 33];
    assert_eq!(
        sequences(&many, &info(), &no_loss).unwrap_err().to_string(),
        "datum 32: the tensors of the data up to here have 69206016 cells, more than 67108864: send fewer data at once"
    );
    assert_eq!(
        sequences(&request(ce, of_shape(2, 1024)), &info(), &no_loss).unwrap()[0].k,
        1024
    );
}

#[test]
fn refusals_name_datum_position_and_limit() {
    let ce = LossFn::CrossEntropy;
    let nan = floats_of("weights", &[1.0, f32::NAN]);

    let cases = [
        (
            refusal(ce.clone(), datum(&[1, 10], &[targets_of(2)])),
            "datum 0: token 10 at position 1 is outside the vocabulary of 10 tokens",
        ),
        (
            refusal(ce.clone(), datum(&[1; 5], &[targets_of(5)])),
            "datum 0: 5 tokens do not fit the model's context of 4",
        ),
        (
            refusal(ce.clone(), datum(&[], &[targets_of(0)])),
            "datum 0: the input holds no tokens",
        ),
        (
            refusal(ce.clone(), datum(&[1, 2], &[targets_of(2), nan])),
            "datum 0: weights is NaN at position 1: it must be finite",
        ),
        (
            refusal(ce.clone(), datum(&[1, 2], &[targets_of(3)])),
            "datum 0: target_tokens of shape [3] for 2 input tokens: it must be [2] or [2, k]",
        ),
        (
            refusal(
                ce.clone(),
                datum(&[1, 2], &[targets_of(2), floats_of("weights", &[1.0])]),
            ),
            "datum 0: weights of shape [1] for target_tokens of shape [2]",
        ),
        (
            refusal(
                ce,
                datum(&[1, 2], &[targets_of(2), floats_of("mask", &[1.0, 1.0])]),
            ),
            "datum 0: loss cross_entropy does not take the input \"mask\": it takes target_tokens, weights",
        ),
        (
            refusal(
                LossFn::Ppo,
                datum(
                    &[1, 2],
                    &[targets_of(2), floats_of("logprobs", &[-1.0, -1.0])],
                ),
            ),
            "datum 0: loss ppo needs the input \"advantages\"",
        ),
    ];

    for (actual, expected) in cases {
        assert_eq!(actual, expected);
    }
}

/// Inputs of a policy loss of two targets, with others.
fn policy(others: &[(&'static str, TensorData)]) -> Datum {
    let mut inputs = vec![
        targets_of(2),
        floats_of("logprobs", &[-1.0, -2.0]),
        floats_of("advantages", &[1.0, -1.0]),
    ];
    inputs.extend_from_slice(others);
    datum(&[1, 2], &inputs)
}

#[test]
fn thresholds_of_a_datum_take_the_place_of_those_of_the_request() {
    let low = floats_of("clip_low_threshold", &[0.5, 0.75]);

    let built = sequences(&request(LossFn::Ppo, policy(&[low])), &info(), &no_loss).unwrap();

    let Loss::Ppo { clip, .. } = &built[0].loss else {
        panic!("{built:?}");
    };
    assert_eq!(clip.low, Bound::Each(vec![0.5, 0.75]));
    assert_eq!(clip.high, Bound::All(1.2));
}

#[test]
fn gspo_needs_a_mask_that_marks_something() {
    let mask = floats_of("sequence_ratio_mask", &[0.0, -2.0]);

    let built = sequences(&request(LossFn::Gspo, policy(&[mask])), &info(), &no_loss).unwrap();

    let Loss::Gspo { in_ratio, .. } = &built[0].loss else {
        panic!("{built:?}");
    };
    assert_eq!(in_ratio, &[false, true]);
    assert_eq!(
        refusal(LossFn::Gspo, policy(&[])),
        "datum 0: loss gspo needs the input \"sequence_ratio_mask\""
    );
    let nothing = floats_of("sequence_ratio_mask", &[0.0, 0.0]);
    assert_eq!(
        refusal(LossFn::Gspo, policy(&[nothing])),
        "datum 0: sequence_ratio_mask is 0 everywhere: it must mark the tokens of the sequence ratio"
    );
}

#[test]
fn refusals_of_policy_inputs_name_datum_and_position() {
    let infinite = floats_of("clip_high_threshold", &[1.5, f32::INFINITY]);
    assert_eq!(
        refusal(LossFn::Cispo, policy(&[infinite])),
        "datum 0: clip_high_threshold is inf at position 1: it must be finite"
    );
    let crossed = floats_of("clip_low_threshold", &[0.5, 1.25]);
    assert_eq!(
        refusal(LossFn::Ppo, policy(&[crossed])),
        "datum 0: clip_low_threshold 1.25 is above clip_high_threshold 1.2 at position 1: both are bounds of the ratio"
    );
    let soft = empty_targets(2, 3);
    let logprobs = floats_of("logprobs", &[-1.0, -2.0]);
    let advantages = floats_of("advantages", &[1.0, f32::NAN]);
    let inputs = [
        ("target_tokens", soft),
        logprobs.clone(),
        advantages.clone(),
    ];
    assert_eq!(
        refusal(LossFn::Dro, datum(&[1, 2], &inputs)),
        "datum 0: loss dro needs target_tokens of shape [2], got [2, 3]"
    );
    assert_eq!(
        refusal(
            LossFn::Dro,
            datum(&[1, 2], &[targets_of(2), logprobs, advantages])
        ),
        "datum 0: advantages is NaN at position 1: it must be finite"
    );
}

#[test]
fn outputs_name_what_each_target_adds() {
    let weights = floats_of("weights", &[0.5, 2.0]);
    let request = request(
        LossFn::CrossEntropy,
        datum(&[1, 2], &[targets_of(2), weights]),
    );
    let sequences = sequences(&request, &info(), &no_loss).unwrap();
    let computed = SequenceOutput {
        logprobs: vec![-1.0, -3.0],
        loss: 6.5,
    };

    let output = output(&request, &sequences, vec![computed]).unwrap();

    let named = &output.loss_fn_outputs[0];
    assert_eq!(named["elementwise_loss"].as_floats().unwrap(), [0.5, 6.0]);
    assert_eq!(named["logprobs"].as_floats().unwrap(), [-1.0, -3.0]);
    assert_eq!(
        output.metrics,
        BTreeMap::from([("loss:sum".to_owned(), 6.5)])
    );
}
