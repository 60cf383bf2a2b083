//! Training through the library: order, numbering, chunking, failures, saving and loading.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tinker_api::{
    AdamParams, Error, ErrorCategory, ErrorKind, FinishReason, ForwardBackwardOutput, LoraConfig,
    Loss, LossFn, Page, SamplerKind, SaveOptions, ServiceClient, StateOptions, TinkerPath,
    TrainingClient,
};
use tinker_contract::mock::{
    Mock, failed, forward_backward_output, json as reply, lost_connection, proto, refusal,
    try_again,
};
use tinker_types::{
    CREATE_MODEL, CREATE_SAMPLING_SESSION, CREATE_SESSION, FORWARD_BACKWARD, LOAD_WEIGHTS,
    LossConfigValue, OPTIM_STEP, RETRIEVE_FUTURE, SAVE_WEIGHTS, SAVE_WEIGHTS_FOR_SAMPLER,
    TRAINING_RUNS,
};

use crate::support::{KEY, datum, ms, service, trainer};

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
        (seen.json()["request_id"] == "slow").then(|| reply(200, &json!({ "metrics": {} })))
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

// Creating, saving and loading.

fn client(mock: &Mock) -> ServiceClient {
    service(&mock.base_url(), KEY).build().unwrap()
}

#[tokio::test]
async fn a_run_is_waited_for_until_it_exists() {
    let mock = Mock::start().await;
    mock.script(RETRIEVE_FUTURE, vec![try_again(408, json!({})); 3]);

    let trainer = client(&mock)
        .create_lora_training_client("test/base", LoraConfig::default())
        .await
        .unwrap();

    assert_eq!(trainer.training_run_id().as_str(), "S1:train:0");
    assert_eq!(trainer.base_model(), Some("test/base"));
    let request = mock.seen_at(CREATE_MODEL)[0].json();
    assert_eq!(request["optimizer_config"], json!({ "type": "adamw" }));
    assert_eq!(
        request["lora_config"],
        json!({ "rank": 32, "train_unembed": true, "train_mlp": true, "train_attn": true })
    );
    assert_eq!(mock.seen_at(RETRIEVE_FUTURE).len(), 4);
}

#[tokio::test]
async fn a_run_that_cannot_be_created_says_why() {
    let mock = Mock::start().await;
    mock.script(
        RETRIEVE_FUTURE,
        [failed("base model \"no/such\" is unknown", "user")],
    );

    let error = client(&mock)
        .create_lora_training_client("no/such", LoraConfig::default())
        .await
        .unwrap_err();

    assert!(error.is_user_error());
    assert!(
        error
            .to_string()
            .contains("base model \"no/such\" is unknown"),
        "{error}"
    );
}

#[tokio::test]
async fn an_adapter_that_trains_nothing_is_refused_here() {
    let mock = Mock::start().await;
    let nothing = LoraConfig {
        train_attn: false,
        train_mlp: false,
        train_unembed: false,
        ..LoraConfig::default()
    };

    for lora in [
        nothing,
        LoraConfig {
            rank: 0,
            ..LoraConfig::default()
        },
    ] {
        let error = client(&mock)
            .create_lora_training_client("test/base", lora)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::InvalidRequest(_)), "{error}");
    }

    assert!(mock.seen().is_empty());
}

#[tokio::test]
async fn one_session_is_opened_for_everything_and_runs_are_numbered() {
    let mock = Mock::start().await;
    let service = client(&mock);
    let path: TinkerPath = "tinker://S0:train:0/weights/a".parse().unwrap();

    let (a, b, c) = tokio::join!(
        service.create_lora_training_client("test/base", LoraConfig::default()),
        service.create_lora_training_client("test/base", LoraConfig::default()),
        service.create_training_client_from_state(&path, StateOptions::default()),
    );

    let mut ids = [a, b, c].map(|client| client.unwrap().training_run_id().to_string());
    ids.sort();
    assert_eq!(ids, ["S1:train:0", "S1:train:1", "S1:train:2"]);
    assert_eq!(mock.seen_at(CREATE_SESSION).len(), 1);
}

#[tokio::test]
async fn state_is_loaded_with_or_without_its_optimizer() {
    let mock = Mock::start().await;
    let service = client(&mock);
    let path: TinkerPath = "tinker://S0:train:0/weights/a".parse().unwrap();

    let options = StateOptions::default;
    service
        .create_training_client_from_state(&path, options())
        .await
        .unwrap();
    service
        .create_training_client_from_state_with_optimizer(&path, options())
        .await
        .unwrap();

    let seen = mock.seen_at(LOAD_WEIGHTS);
    let fields = |i: usize| {
        let body = seen[i].json();
        [
            &body["optimizer"],
            &body["session_id"],
            &body["model_seq_id"],
            &body["model_id"],
        ]
        .map(Value::clone)
    };
    assert_eq!(
        fields(0),
        [json!(false), json!("S1"), json!(0), Value::Null]
    );
    assert_eq!(fields(1), [json!(true), json!("S1"), json!(1), Value::Null]);
    assert_eq!(seen[1].json()["path"], "tinker://S0:train:0/weights/a");
}

#[tokio::test]
async fn a_path_of_the_wrong_kind_names_its_twin_and_sends_nothing() {
    let mock = Mock::start().await;
    let service = client(&mock);
    let state: TinkerPath = "tinker://r/weights/a".parse().unwrap();
    let sampler: TinkerPath = "tinker://r/sampler_weights/a".parse().unwrap();

    let of_sampler = service.create_sampling_client(&state).await.unwrap_err();
    let of_state = service
        .create_training_client_from_state(&sampler, StateOptions::default())
        .await
        .unwrap_err();

    assert!(
        of_sampler
            .to_string()
            .contains("did you mean tinker://r/sampler_weights/a?")
    );
    assert!(
        of_state
            .to_string()
            .contains("did you mean tinker://r/weights/a?")
    );
    assert!(
        mock.seen_at(CREATE_SAMPLING_SESSION).is_empty() && mock.seen_at(LOAD_WEIGHTS).is_empty()
    );
}

#[tokio::test]
async fn saving_is_an_operation_among_the_others() {
    let (mock, trainer) = mock_and_trainer().await;

    let step = trainer.optim_step(adam());
    let options = SaveOptions {
        ttl: Some(Duration::from_secs(7200)),
        overwrite: true,
        user_metadata: Some([("note".to_owned(), "mine".to_owned())].into()),
    };
    let state = trainer.save_state("0001", options);
    let sampler = trainer.save_weights_for_sampler("final", SaveOptions::default());
    step.await.unwrap();

    assert_eq!(
        state.await.unwrap().to_string(),
        "tinker://S1:train:0/weights/0001"
    );
    assert_eq!(
        sampler.await.unwrap().to_string(),
        "tinker://S1:train:0/sampler_weights/final"
    );
    let body = mock.seen_at(SAVE_WEIGHTS)[0].json();
    assert_eq!(
        body,
        json!({
            "model_id": "S1:train:0", "path": "0001", "seq_id": 2, "ttl_seconds": 7200,
            "overwrite": true, "user_metadata": { "note": "mine" }, "type": "save_weights",
        })
    );
    let body = mock.seen_at(SAVE_WEIGHTS_FOR_SAMPLER)[0].json();
    assert_eq!(body["kind"], "snapshot");
    assert_eq!(
        (body["seq_id"].clone(), body.get("ttl_seconds")),
        (json!(3), None)
    );
}

#[tokio::test]
async fn samplers_of_one_session_have_different_numbers() {
    let mock = Mock::start().await;
    let service = client(&mock);
    let trainer = service
        .create_lora_training_client("test/base", LoraConfig::default())
        .await
        .unwrap();
    let path: TinkerPath = "tinker://S0:train:0/sampler_weights/a".parse().unwrap();

    service.create_sampling_client(&path).await.unwrap();
    trainer
        .save_weights_and_get_sampling_client(SamplerKind::Snapshot)
        .await
        .unwrap();
    trainer.create_sampling_client(&path).await.unwrap();

    let number =
        |path: &str, i: usize| mock.seen_at(path)[i].json()["sampling_session_seq_id"].clone();
    assert_eq!(number(CREATE_SAMPLING_SESSION, 0), 0);
    assert_eq!(number(SAVE_WEIGHTS_FOR_SAMPLER, 0), 1);
    assert_eq!(number(CREATE_SAMPLING_SESSION, 1), 2);
    let save = mock.seen_at(SAVE_WEIGHTS_FOR_SAMPLER)[0].json();
    assert_eq!(save.get("path"), None, "an unnamed save has no path");
}

#[tokio::test]
async fn a_save_that_does_not_say_where_is_an_error() {
    let (mock, trainer) = mock_and_trainer().await;
    mock.script(RETRIEVE_FUTURE, [reply(200, &json!({ "path": null }))]);

    let error = trainer
        .save_weights_for_sampler("a", SaveOptions::default())
        .await
        .unwrap_err();

    assert!(matches!(error, Error::Protocol(_)), "{error}");
}

// Sessions and lists.

#[tokio::test]
async fn a_session_is_described_and_finished_once() {
    let mock = Mock::start().await;
    let service = service(&mock.base_url(), KEY)
        .display_name("demo")
        .project("proj-1".parse().unwrap())
        .tags(["b".into(), "a".into(), "b".into()])
        .user_metadata([("exp".to_owned(), json!(1))].into())
        .build()
        .unwrap();
    assert!(
        mock.seen().is_empty(),
        "nothing is sent before it is needed"
    );

    assert_eq!(service.session_id().await.unwrap().as_str(), "S1");
    service.close(FinishReason::Success, None).await.unwrap();
    service.close(FinishReason::Errored, None).await.unwrap();

    let body = mock.seen_at(CREATE_SESSION)[0].json();
    assert_eq!(
        body,
        json!({
            "tags": ["a", "b"], "user_metadata": { "exp": 1 }, "sdk_version": "0.38.0",
            "project_id": "proj-1", "display_name": "demo", "type": "create_session",
        })
    );
    let finished = mock.seen_at("/api/v1/sessions/S1/finish");
    assert_eq!(finished.len(), 1);
    assert_eq!(
        finished[0].json(),
        json!({ "reason": { "type": "success" }, "detail": null })
    );
}

#[tokio::test]
async fn closing_an_unused_client_sends_nothing() {
    let mock = Mock::start().await;

    client(&mock)
        .close(FinishReason::Success, None)
        .await
        .unwrap();

    assert!(mock.seen().is_empty());
}

#[tokio::test]
async fn looking_around_needs_no_session() {
    let mock = Mock::start().await;

    let page = Page {
        limit: 5,
        offset: 10,
    };
    client(&mock)
        .rest_client()
        .list_training_runs(page)
        .await
        .unwrap();

    assert!(mock.seen_at(CREATE_SESSION).is_empty());
    let seen = &mock.seen_at(TRAINING_RUNS)[0];
    assert_eq!(seen.query, "limit=5&offset=10&access_scope=owned");
}

/// A server with this many runs, asked for up to `limit`, is asked for these offsets and limits.
async fn check_pages(n_runs: u64, limit: Option<u64>, expected: &[&str]) {
    let mock = Mock::start().await;
    mock.answer(TRAINING_RUNS, move |seen| {
        let number = |name: &str| {
            let pair = seen.query.split('&').find_map(|p| p.strip_prefix(name));
            pair.unwrap().parse::<u64>().unwrap()
        };
        let (limit, offset) = (number("limit="), number("offset="));
        let rows: Vec<Value> = (offset..n_runs.min(offset + limit))
            .map(|i| {
                json!({
                    "training_run_id": format!("S1:train:{i}"), "base_model": "m",
                    "model_owner": "me", "is_lora": true, "last_request_time": "2026-01-01T00:00:00Z",
                })
            })
            .collect();
        let cursor = json!({ "offset": offset, "limit": limit, "total_count": n_runs });
        Some(reply(200, &json!({ "training_runs": rows, "cursor": cursor })))
    });

    let runs = client(&mock)
        .rest_client()
        .list_all_training_runs(limit)
        .await
        .unwrap();

    assert_eq!(runs.len() as u64, limit.unwrap_or(n_runs).min(n_runs));
    let asked: Vec<String> = mock
        .seen_at(TRAINING_RUNS)
        .into_iter()
        .map(|s| s.query)
        .collect();
    let expected: Vec<String> = expected
        .iter()
        .map(|page| format!("{page}&access_scope=owned"))
        .collect();
    assert_eq!(asked, expected);
}

#[tokio::test]
async fn lists_are_read_page_by_page() {
    check_pages(0, None, &["limit=100&offset=0"]).await;
    check_pages(130, None, &["limit=100&offset=0", "limit=100&offset=100"]).await;
    check_pages(130, Some(20), &["limit=20&offset=0"]).await;
    check_pages(
        300,
        Some(120),
        &["limit=100&offset=0", "limit=20&offset=100"],
    )
    .await;
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
