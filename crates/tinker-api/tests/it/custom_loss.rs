//! Losses computed by the client: what travels, in which order, and what failure leaves.

use serde_json::json;
use tinker_api::custom_loss::{CustomLossError, Logprobs, LossAndGradient};
use tinker_api::{AdamParams, Datum, Error, LossFn, ModelInput, TensorData};
use wiremock::{Request, ResponseTemplate};

use crate::support::*;

type Evaluation = Result<LossAndGradient, CustomLossError>;

/// `sum l^2`, whose gradient is `2 l`.
fn squares(_: &[Datum], logprobs: &[Logprobs]) -> Evaluation {
    let values = || logprobs.iter().map(Logprobs::values);
    let loss = values().flatten().map(|&l| f64::from(l).powi(2)).sum();
    let gradient = |values: &[f32]| values.iter().map(|&l| 2.0 * f64::from(l)).collect();
    Ok(LossAndGradient {
        loss,
        gradients: values().map(gradient).collect(),
        metrics: [("largest".to_owned(), 1.0)].into(),
    })
}

#[tokio::test]
async fn runs_forward_then_backward_with_the_negative_gradient() {
    let server = server().await;
    let trainer = trainer(&server).await;

    let pass = trainer.forward_backward_custom(vec![datum()], squares);
    let step = trainer.optim_step(AdamParams::default());
    let output = pass.await.unwrap();
    step.await.unwrap();

    let sent: Vec<_> = requests(&server, "forward_backward").await;
    let sent: Vec<_> = sent.iter().map(pass_of).collect();
    assert_eq!(
        sent,
        [(1, true, vec![vec![1.0]]), (2, false, vec![vec![2.0]])]
    );
    assert_eq!(
        operations(&server).await.last(),
        Some(&("optim_step".to_owned(), 3))
    );
    let metrics = [
        ("largest", 1.0),
        ("loss:sum", 1.0),
        ("surrogate_loss:sum", 1.0),
    ];
    let metrics = metrics.map(|(name, value)| (name.to_owned(), value));
    assert_eq!(output.metrics, metrics.into());
    assert_eq!(output.loss_fn_outputs.len(), 1);
}

/// Number, whether forward only, and weights.
fn pass_of(request: &Request) -> (u64, bool, Vec<Vec<f32>>) {
    let request = pass(request);
    assert_eq!(request.loss_fn, LossFn::CrossEntropy);
    let weights = request.data.iter().map(|datum| {
        let inputs = datum.loss_fn_inputs();
        assert_eq!(inputs.len(), 2, "targets and weights");
        inputs["weights"].as_floats().unwrap().to_vec()
    });
    let weights = weights.collect();
    (request.seq_id, request.forward_only, weights)
}

#[tokio::test]
async fn both_halves_have_the_same_chunks_and_later_operations_come_after_them() {
    let server = server().await;
    let config = ok(json!({"fwdbwd_max_chunk_len": 2}));
    answer_with(&server, "client/config", None, config).await;
    let trainer = trainer(&server).await;

    let pass = trainer.forward_backward_custom(vec![datum(); 5], squares);
    let step = trainer.optim_step(AdamParams::default());
    step.await.unwrap();
    let output = pass.await.unwrap();

    assert_eq!(output.loss_fn_outputs.len(), 5);
    assert_eq!(output.metrics["loss:sum"], 5.0);
    let sent: Vec<_> = requests(&server, "forward_backward").await;
    let sent: Vec<_> = sent.iter().map(pass_of).collect();
    let mut numbers: Vec<_> = sent.iter().map(|(n, f, w)| (*n, *f, w.len())).collect();
    assert_eq!([numbers[2].0, numbers[5].0], [1, 4], "the first chunk last");
    numbers.sort_unstable();
    let expected = [(1, 2), (2, 2), (3, 1), (4, 2), (5, 2), (6, 1)];
    let expected = expected.map(|(n, len)| (n, n <= 3, len));
    assert_eq!(numbers, expected);
    let arrived = operations(&server).await;
    assert_eq!(arrived.last(), Some(&("optim_step".to_owned(), 7)));
}

/// What failed, after which everything else fails too; only the forward pass was sent.
async fn check_stops(loss: fn(&[Datum], &[Logprobs]) -> Evaluation, expected: &str) {
    let server = server().await;
    let trainer = trainer(&server).await;

    let pass = trainer.forward_backward_custom(vec![datum()], loss);
    let queued = trainer.optim_step(AdamParams::default());

    let error = pass.await.unwrap_err();
    assert!(matches!(error, Error::CustomLoss(_)), "{error:?}");
    assert_eq!(error.to_string(), expected);
    let message = queued.await.unwrap_err().to_string();
    assert!(message.contains(expected), "{message}");
    let later = trainer.optim_step(AdamParams::default()).await;
    assert!(matches!(later, Err(Error::Stopped(_))));
    let sent = operations(&server).await;
    assert_eq!(sent, [("forward_backward".to_owned(), 1)]);
}

#[tokio::test]
async fn a_loss_that_fails_stops_the_client() {
    check_stops(
        |_, _| Err("no pairs".into()),
        "the custom loss failed: no pairs",
    )
    .await;
}

#[tokio::test]
async fn a_loss_that_panics_stops_the_client() {
    check_stops(
        |_, _| panic!("index 7"),
        "the custom loss panicked: index 7",
    )
    .await;
}

#[tokio::test]
async fn gradients_that_do_not_fit_stop_the_client() {
    check_stops(
        |_, _| Ok(LossAndGradient::default()),
        "the custom loss returned 0 gradients for 1 data: return one per datum",
    )
    .await;
}

#[tokio::test]
async fn data_without_targets_are_refused_and_the_client_goes_on() {
    let server = server().await;
    let trainer = trainer(&server).await;
    let bare = Datum::from_wire(ModelInput::from_tokens(vec![1]), Default::default());

    let empty = trainer.forward_backward_custom(vec![], squares).await;
    let bare = trainer.forward_backward_custom(vec![bare], squares).await;
    trainer.optim_step(AdamParams::default()).await.unwrap();

    for error in [empty.unwrap_err(), bare.unwrap_err()] {
        assert!(matches!(error, Error::InvalidRequest(_)), "{error:?}");
    }
    assert_eq!(operations(&server).await, [("optim_step".to_owned(), 1)]);
}

#[tokio::test]
async fn a_dropped_future_still_leaves_its_gradient() {
    let server = server().await;
    let trainer = trainer(&server).await;

    drop(trainer.forward_backward_custom(vec![datum()], squares));
    trainer.optim_step(AdamParams::default()).await.unwrap();

    let arrived: Vec<u64> = operations(&server).await.iter().map(|(_, n)| *n).collect();
    assert_eq!(arrived, [1, 2, 3]);
}

#[tokio::test]
async fn the_loss_sees_every_input_and_only_two_travel() {
    let server = server().await;
    let trainer = trainer(&server).await;
    let datum = datum().with_input("reward", TensorData::floats(vec![3.0]));

    let output = trainer
        .forward_backward_custom(vec![datum], |data, logprobs| {
            let reward = &data[0].loss_fn_inputs()["reward"];
            let reward = reward.as_floats().ok_or("no floats")?[0];
            Ok(LossAndGradient {
                loss: f64::from(-reward * logprobs[0].values()[0]),
                gradients: vec![vec![f64::from(-reward)]],
                ..LossAndGradient::default()
            })
        })
        .await
        .unwrap();

    assert_eq!(output.metrics["loss:sum"], 3.0);
    let sent = requests(&server, "forward_backward").await;
    assert_eq!(pass_of(&sent[1]), (2, false, vec![vec![3.0]]));
}

#[tokio::test]
async fn log_probabilities_that_are_missing_are_an_error() {
    let server = server().await;
    let bare = json!({"loss_fn_outputs": [{}], "metrics": {"loss:sum": 0.0}});
    let answer = move |request: &Request| match body(request)["request_id"].as_str() {
        Some(id) if id.starts_with("pass") => ok(bare.clone()),
        Some(id) => result(id),
        None => ResponseTemplate::new(404),
    };
    answer_with(&server, "retrieve_future", None, answer).await;
    let trainer = trainer(&server).await;

    let pass = trainer.forward_backward_custom(vec![datum()], squares);

    let error = pass.await.unwrap_err().to_string();
    assert_eq!(error, "the server returned no log-probabilities of datum 0");
}
