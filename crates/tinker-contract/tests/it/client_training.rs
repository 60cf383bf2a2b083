//! Training through the library: order, numbering, chunking and failures.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use tinker_api::{
    AdamParams, Error, ErrorCategory, ErrorKind, ForwardBackwardOutput, Loss, LossFn, SaveOptions,
    TrainingClient,
};
use tinker_contract::mock::{
    Mock, failed, forward_backward_output, json as reply, lost_connection, proto, refusal,
    try_again,
};
use tinker_types::{FORWARD_BACKWARD, LossConfigValue, OPTIM_STEP, RETRIEVE_FUTURE};

use crate::support::{datum, ms, trainer};

const CE: LossFn = LossFn::CrossEntropy;

fn adam() -> AdamParams {
    AdamParams::default()
}

async fn mock_and_trainer() -> (Mock, TrainingClient) {
    let mock = Mock::start().await;
    let trainer = trainer(&mock).await;
    (mock, trainer)
}

/// Path and `seq_id` of every training operation, in order of arrival.
fn operations(mock: &Mock) -> Vec<(String, u64)> {
    let mut seen = mock.seen();
    seen.retain(|seen| seen.path != RETRIEVE_FUTURE);
    seen.iter()
        .map(|seen| (seen.path.clone(), seen.seq_id()))
        .collect()
}

/// The first token of every datum of every request, in order of arrival.
fn requests(mock: &Mock) -> Vec<Vec<u32>> {
    let first = |datum: &tinker_api::Datum| datum.model_input.tokens().unwrap()[0];
    mock.seen_at(FORWARD_BACKWARD)
        .iter()
        .map(|seen| seen.forward_backward().data.iter().map(first).collect())
        .collect()
}

/// The log-probability that the double gives to every target of a datum names the datum.
fn names(output: &ForwardBackwardOutput) -> Vec<u32> {
    let name = |map: &tinker_types::LossFnOutput| -map["logprobs"].as_floats().unwrap()[0] as u32;
    output.loss_fn_outputs.iter().map(name).collect()
}

// Order and numbering.

#[tokio::test]
async fn operations_arrive_in_the_order_of_the_calls_without_being_awaited() {
    let (mock, trainer) = mock_and_trainer().await;

    let mut passes = Vec::new();
    let mut steps = Vec::new();
    for i in 0..10 {
        passes.push(trainer.forward_backward(vec![datum(i, 4)], CE));
        steps.push(trainer.optim_step(adam()));
    }
    for step in steps.into_iter().rev() {
        step.await.unwrap();
    }
    for (i, pass) in passes.into_iter().enumerate().rev() {
        assert_eq!(names(&pass.await.unwrap()), [i as u32]);
    }

    let expected: Vec<_> = (0..20_u64)
        .map(|i| {
            (
                [FORWARD_BACKWARD, OPTIM_STEP][i as usize % 2].to_owned(),
                i + 1,
            )
        })
        .collect();
    assert_eq!(operations(&mock), expected);
}

#[tokio::test]
async fn a_slow_submission_holds_up_the_ones_after_it() {
    let (mock, trainer) = mock_and_trainer().await;
    mock.answer(FORWARD_BACKWARD, |seen| {
        (seen.seq_id() == 1)
            .then(|| reply(200, &json!({ "request_id": "slow" })).map(|t| t.set_delay(ms(60))))
    });
    mock.answer(RETRIEVE_FUTURE, |seen| {
        (seen.json()["request_id"] == "slow")
            .then(|| reply(200, &json!({ "metrics": {}, "loss_fn_outputs": [{}] })))
    });

    let pass = trainer.forward_backward(vec![datum(1, 4)], CE);
    let step = trainer.optim_step(adam());
    step.await.unwrap();
    pass.await.unwrap();

    let seen = mock.seen();
    let at = |path: &str| seen.iter().find(|s| s.path == path).unwrap().at;
    assert!(at(OPTIM_STEP) - at(FORWARD_BACKWARD) >= ms(60));
}

#[tokio::test]
async fn clones_share_one_order() {
    let (mock, trainer) = mock_and_trainer().await;

    let clone = trainer.clone();
    let calls = [
        trainer.optim_step(adam()),
        clone.optim_step(adam()),
        trainer.optim_step(adam()),
    ];
    assert!(join_all(calls).await.iter().all(Result::is_ok));

    let numbers: Vec<u64> = operations(&mock)
        .into_iter()
        .map(|(_, seq_id)| seq_id)
        .collect();
    assert_eq!(numbers, [1, 2, 3]);
}

#[tokio::test]
async fn a_dropped_future_is_still_submitted_in_its_place() {
    let (mock, trainer) = mock_and_trainer().await;

    drop(trainer.forward_backward(vec![datum(1, 4)], CE));
    trainer.optim_step(adam()).await.unwrap();

    assert_eq!(
        operations(&mock),
        [(FORWARD_BACKWARD.to_owned(), 1), (OPTIM_STEP.to_owned(), 2)]
    );
}

#[tokio::test]
async fn a_failed_operation_does_not_stop_later_ones() {
    let (mock, trainer) = mock_and_trainer().await;
    mock.script(RETRIEVE_FUTURE, [failed("token 9 is out of range", "user")]);

    let error = trainer
        .forward_backward(vec![datum(1, 4)], CE)
        .await
        .unwrap_err();

    let text = error.to_string();
    let Error::RequestFailed {
        category,
        message,
        request_id,
        ..
    } = error
    else {
        panic!("{text}")
    };
    assert_eq!(
        (category, message.as_str()),
        (ErrorCategory::User, "token 9 is out of range")
    );
    assert!(
        text.contains("ForwardBackward failed") && text.contains(request_id.as_str()),
        "{text}"
    );
    trainer.optim_step(adam()).await.unwrap();
    assert_eq!(operations(&mock).last(), Some(&(OPTIM_STEP.to_owned(), 2)));
}

#[tokio::test]
async fn a_refused_operation_leaves_its_number_to_the_next() {
    let (mock, trainer) = mock_and_trainer().await;
    mock.script(OPTIM_STEP, [refusal(422, "no gradient")]);

    let error = trainer.optim_step(adam()).await.unwrap_err();

    assert_eq!(error.kind(), Some(&ErrorKind::InvalidRequest));
    trainer.optim_step(adam()).await.unwrap();
    let numbers: Vec<u64> = operations(&mock)
        .into_iter()
        .map(|(_, seq_id)| seq_id)
        .collect();
    assert_eq!(numbers, [1, 1]);
}

#[tokio::test]
async fn a_repeated_submission_has_the_same_number_and_the_same_bytes() {
    let (mock, trainer) = mock_and_trainer().await;
    mock.script(
        FORWARD_BACKWARD,
        [
            lost_connection(),
            refusal(503, "restart"),
            refusal(409, "busy"),
            refusal(429, "slow"),
        ],
    );

    let output = trainer
        .forward_backward(vec![datum(1, 4), datum(2, 3)], CE)
        .await
        .unwrap();

    assert_eq!(names(&output), [1, 2]);
    let seen = mock.seen_at(FORWARD_BACKWARD);
    assert_eq!(seen.len(), 5);
    assert!(
        seen.iter()
            .all(|s| s.seq_id() == 1 && s.body == seen[0].body)
    );
}

#[tokio::test]
async fn after_a_submission_of_unknown_fate_nothing_more_is_sent() {
    let (mock, trainer) = mock_and_trainer().await;
    mock.answer(OPTIM_STEP, |_| Some(refusal(500, "broken")));

    let first = trainer.optim_step(adam()).await.unwrap_err();
    let n = mock.seen().len();
    let second = trainer.forward(vec![datum(1, 4)], CE).await.unwrap_err();

    assert_eq!(first.kind(), Some(&ErrorKind::Server));
    assert!(matches!(second, Error::Stopped(_)), "{second}");
    assert_eq!(mock.seen().len(), n);
}

#[tokio::test]
async fn an_expired_training_future_is_reported_and_never_sent_again() {
    let (mock, trainer) = mock_and_trainer().await;
    mock.script(RETRIEVE_FUTURE, [refusal(410, "forgotten")]);

    let error = trainer.optim_step(adam()).await.unwrap_err();

    assert_eq!(error.kind(), Some(&ErrorKind::Expired));
    assert_eq!(mock.seen_at(OPTIM_STEP).len(), 1);
}

#[tokio::test]
async fn waiting_may_end_before_the_operation() {
    let (mock, trainer) = mock_and_trainer().await;
    mock.answer(RETRIEVE_FUTURE, |_| Some(try_again(408, json!({}))));

    let error = trainer
        .optim_step(adam())
        .timeout(ms(40))
        .await
        .unwrap_err();

    assert!(
        matches!(error, Error::TimedOut { after, .. } if after == ms(40)),
        "{error}"
    );
    assert_eq!(error.to_string(), "no result of OptimStep after 40ms");
}

// Chunking.

/// Data of these lengths is sent in requests of these sizes.
async fn check_chunks(lengths: &[usize], expected: &[usize]) {
    let (mock, trainer) = mock_and_trainer().await;
    let data = lengths
        .iter()
        .enumerate()
        .map(|(i, &n)| datum(i as u32, n))
        .collect();

    let output = trainer.forward(data, CE).await.unwrap();

    let mut sent: Vec<_> = mock.seen_at(FORWARD_BACKWARD);
    sent.sort_by_key(|seen| seen.seq_id());
    let sizes: Vec<usize> = sent
        .iter()
        .map(|s| s.forward_backward().data.len())
        .collect();
    assert_eq!(sizes, expected);
    assert!(sent.iter().all(|seen| seen.forward_backward().forward_only));
    let all: Vec<u32> = (0..lengths.len() as u32).collect();
    assert_eq!(names(&output), all, "one output per datum, in order");
    assert_eq!(output.metrics["loss:sum"], lengths.len() as f64);
}

#[tokio::test]
async fn data_is_split_above_1024() {
    check_chunks(&[1; 1024], &[1024]).await;
    check_chunks(&[1; 1025], &[1024, 1]).await;
}

#[tokio::test]
async fn data_is_split_above_five_million_bytes() {
    check_chunks(&[6250; 51], &[50, 1]).await;
}

#[tokio::test]
async fn a_datum_of_more_than_five_million_bytes_is_one_request() {
    check_chunks(&[320_000], &[1]).await;
}

#[tokio::test]
async fn chunks_travel_together_and_the_first_comes_last() {
    let mock = Mock::with_config(json!({ "fwdbwd_max_chunk_len": 2 })).await;
    let trainer = trainer(&mock).await;

    let pass = trainer.forward_backward((0..7).map(|i| datum(i, 2)).collect(), CE);
    let step = trainer.optim_step(adam());
    let output = pass.await.unwrap();
    step.await.unwrap();

    assert_eq!(names(&output), [0, 1, 2, 3, 4, 5, 6]);
    let mut numbers: Vec<u64> = operations(&mock)
        .into_iter()
        .map(|(_, seq_id)| seq_id)
        .collect();
    assert_eq!(
        numbers[3..],
        [1, 5],
        "the first chunk closes the call, then comes the step"
    );
    numbers.sort_unstable();
    assert_eq!(numbers, [1, 2, 3, 4, 5]);
    assert_eq!(requests(&mock)[3], [0, 1]);
}

#[tokio::test]
async fn chunks_go_one_by_one_where_the_server_wants_that() {
    let config = json!({ "fwdbwd_max_chunk_len": 2, "parallel_fwdbwd_chunks": false });
    let mock = Mock::with_config(config).await;
    let trainer = trainer(&mock).await;

    trainer
        .forward_backward((0..5).map(|i| datum(i, 2)).collect(), CE)
        .await
        .unwrap();

    assert_eq!(requests(&mock), [vec![0, 1], vec![2, 3], vec![4]]);
    let numbers: Vec<u64> = operations(&mock)
        .into_iter()
        .map(|(_, seq_id)| seq_id)
        .collect();
    assert_eq!(numbers, [1, 2, 3]);
}

#[tokio::test]
async fn one_failed_chunk_fails_the_call_and_only_the_call() {
    let mock = Mock::with_config(json!({ "fwdbwd_max_chunk_len": 1 })).await;
    let trainer = trainer(&mock).await;
    mock.answer(FORWARD_BACKWARD, |seen| {
        (seen.seq_id() == 2).then(|| reply(200, &json!({ "request_id": "bad" })))
    });
    mock.answer(RETRIEVE_FUTURE, |seen| {
        (seen.json()["request_id"] == "bad").then(|| failed("datum 0 is bad", "user"))
    });

    let error = trainer
        .forward((0..3).map(|i| datum(i, 2)).collect(), CE)
        .await
        .unwrap_err();

    assert!(matches!(error, Error::RequestFailed { .. }), "{error}");
    trainer.optim_step(adam()).await.unwrap();
    assert_eq!(operations(&mock).last(), Some(&(OPTIM_STEP.to_owned(), 4)));
}

#[tokio::test]
async fn metrics_of_chunks_are_reduced_by_their_suffix() {
    let mock = Mock::with_config(json!({ "fwdbwd_max_chunk_len": 3 })).await;
    let trainer = trainer(&mock).await;
    let metrics = [
        json!({ "loss:sum": 3.0, "a:mean": 1.0, "a:min": 1.0, "a:max": 1.0, "a:slack": 1.0,
                "a:unique": 4.0, "a:hash2": 9.0, "a:median": 1.0, "only_first:sum": 1.0 }),
        json!({ "loss:sum": 1.0, "a:mean": 5.0, "a:min": -5.0, "a:max": 5.0, "a:slack": 5.0,
                "a:unique": 5.0, "a:hash2": 1.0, "a:median": 5.0 }),
    ];
    mock.answer(FORWARD_BACKWARD, |seen| {
        Some(reply(
            200,
            &json!({ "request_id": seen.seq_id().to_string() }),
        ))
    });
    mock.answer(RETRIEVE_FUTURE, move |seen| {
        let seq_id: usize = seen.json()["request_id"].as_str()?.parse().ok()?;
        let n = if seq_id == 1 { 3 } else { 1 };
        let outputs = vec![json!({}); n];
        Some(reply(
            200,
            &json!({ "loss_fn_outputs": outputs, "metrics": metrics[seq_id - 1] }),
        ))
    });

    let output = trainer
        .forward_backward((0..4).map(|i| datum(i, 2)).collect(), CE)
        .await
        .unwrap();

    let expected = json!({
        "loss:sum": 4.0, "a:mean": 2.0, "a:min": -5.0, "a:max": 5.0, "a:slack": 3.0,
        "a:unique": 4.0, "a:unique_1": 5.0, "a:hash2": 10.0,
    });
    assert_eq!(serde_json::to_value(&output.metrics).unwrap(), expected);
    assert_eq!(output.loss_fn_outputs.len(), 4);
}

#[tokio::test]
async fn bodies_are_compressed_where_the_server_wants_that() {
    let mock = Mock::with_config(json!({ "proto_compress_fwdbwd": true })).await;
    let trainer = trainer(&mock).await;

    let output = trainer.forward(vec![datum(7, 4)], CE).await.unwrap();

    assert_eq!(names(&output), [7]);
    let seen = &mock.seen_at(FORWARD_BACKWARD)[0];
    assert_eq!(seen.header("content-encoding"), Some("zstd"));
    assert_eq!(seen.header("content-type"), Some("application/x-protobuf"));
}

// Requests that are refused before they are sent.

/// The call is refused here: nothing is sent and the next operation still has number 1.
async fn check_local<T: std::fmt::Debug>(
    call: impl AsyncFnOnce(&TrainingClient) -> Result<T, Error>,
    expected: &str,
) {
    let (mock, trainer) = mock_and_trainer().await;

    let error = call(&trainer).await.unwrap_err();

    assert!(
        error.is_user_error() && error.to_string().contains(expected),
        "{error}"
    );
    assert!(mock.seen().is_empty());
    trainer.optim_step(adam()).await.unwrap();
    assert_eq!(operations(&mock), [(OPTIM_STEP.to_owned(), 1)]);
}

#[tokio::test]
async fn no_data_is_refused_here() {
    check_local(async |t| t.forward_backward(vec![], CE).await, "no data").await;
}

#[tokio::test]
async fn a_misspelt_loss_is_refused_here_with_a_list() {
    let loss = || LossFn::from("cros_entropy");
    check_local(
        async |t| t.forward(vec![datum(1, 2)], loss()).await,
        "cross_entropy, importance_sampling",
    )
    .await;
}

#[tokio::test]
async fn an_input_that_the_loss_needs_is_missed_here() {
    check_local(
        async |t| t.forward(vec![datum(1, 2)], LossFn::Ppo).await,
        "datum 0: loss ppo needs `logprobs`",
    )
    .await;
}

#[tokio::test]
async fn hyper_parameters_out_of_range_are_refused_here() {
    let adam = AdamParams {
        learning_rate: -1.0,
        ..AdamParams::default()
    };
    check_local(async |t| t.optim_step(adam).await, "learning_rate -1").await;
}

#[tokio::test]
async fn names_and_lives_of_checkpoints_are_checked_here() {
    let ttl = |secs| SaveOptions {
        ttl: Some(Duration::from_secs(secs)),
        ..SaveOptions::default()
    };
    check_local(
        async |t| t.save_state("a", ttl(0)).await,
        "ttl of 0 seconds",
    )
    .await;
    check_local(
        async |t| t.save_state("a/b", SaveOptions::default()).await,
        "checkpoint name",
    )
    .await;
    check_local(
        async |t| {
            t.save_weights_for_sampler("..", SaveOptions::default())
                .await
        },
        "checkpoint name",
    )
    .await;
}

#[tokio::test]
async fn settings_of_a_loss_travel_as_numbers_in_both_forms() {
    let (mock, trainer) = mock_and_trainer().await;
    let input = tinker_api::ModelInput::from_tokens(vec![1, 2]);
    let datum =
        tinker_api::Datum::policy_gradient(input, vec![2, 3], vec![-1.0; 2], vec![0.5; 2]).unwrap();

    let loss = Loss::from(LossFn::Ppo).with("clip_low_threshold", 1.0);
    trainer.forward_backward(vec![datum], loss).await.unwrap();

    let seen = &mock.seen_at(FORWARD_BACKWARD)[0];
    let request = seen.forward_backward();
    assert_eq!(request.loss_fn, LossFn::Ppo);
    assert_eq!(
        request.loss_fn_config["clip_low_threshold"],
        LossConfigValue::Number(1.0)
    );
    let message: tinker_types::proto::ForwardBackwardRequest = (&request).try_into().unwrap();
    assert_eq!(
        message.loss_fn_config.len(),
        message.loss_fn_config_v2.len()
    );
}

#[tokio::test]
async fn one_output_per_datum_is_what_the_double_promises() {
    let request = tinker_types::ForwardBackwardRequest {
        model_id: "S1:train:0".parse().unwrap(),
        seq_id: 1,
        data: vec![datum(3, 4)],
        loss_fn: CE,
        loss_fn_config: Default::default(),
        forward_only: false,
    };
    let output = forward_backward_output(&request);
    let (mock, trainer) = mock_and_trainer().await;
    mock.script(
        RETRIEVE_FUTURE,
        [proto(&tinker_types::proto::ForwardBackwardOutput::from(
            &output,
        ))],
    );

    assert_eq!(
        trainer.forward(vec![datum(3, 4)], CE).await.unwrap(),
        output
    );
}
