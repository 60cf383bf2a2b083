//! Order, de-duplication and results of training operations.

use serde_json::json;
use tinker_types::{LossFn, TensorData};

use crate::harness::{Harness, create_body, datum, fb, optim, raw_datum};

#[tokio::test]
async fn a_step_answers_with_loss_logprobs_and_gradient_norm() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    assert_eq!(run, format!("{session}:train:0"));

    let first = server.forward_backward(&run, 1, &[1, 2, 3]).await;
    let second = server.optim_step(&run, 2).await;

    let output = server.output(&first).await;
    assert_eq!(output.metrics.keys().collect::<Vec<_>>(), ["loss:sum"]);
    assert_eq!(output.loss_fn_outputs[0]["logprobs"].shape(), [3]);
    let step = server.result(&second).await.json();
    assert_eq!(step["metrics"]["step"], 1.0);
    assert!(step["metrics"]["grad_norm"].as_f64().unwrap() > 0.0);
}

#[tokio::test]
async fn two_dimensional_targets_keep_their_shape() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let input = tinker_types::ModelInput::from_tokens(vec![1, 2]);
    let soft = tinker_types::Datum::soft_cross_entropy(input, vec![1; 6], vec![0.5; 6], 3).unwrap();

    let answer = server
        .post_proto(&fb(&run, 1, vec![soft, datum(&[4])]))
        .await;

    let output = server
        .output(answer.json()["request_id"].as_str().unwrap())
        .await;
    assert_eq!(output.loss_fn_outputs[0]["logprobs"].shape(), [2, 3]);
    assert_eq!(output.loss_fn_outputs[1]["logprobs"].shape(), [1]);
}

#[tokio::test]
async fn a_later_chunk_waits_for_the_earlier_one() {
    let home = tempfile::tempdir().unwrap();
    let mut options = crate::harness::options(home.path());
    options.limits.poll_hold = std::time::Duration::from_millis(50);
    let server = Harness::with(options);
    let run = server.run(&server.session().await, 0).await;

    let later = server.forward_backward(&run, 2, &[5, 6]).await;
    let held = server.poll(&later).await;
    assert_eq!(held.status, 408);
    assert_eq!(held.json()["type"], "try_again");
    let reason = held.json()["queue_state_reason"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(reason.contains("waiting for operation 1"), "{reason}");

    let earlier = server.forward_backward(&run, 1, &[1, 2]).await;
    drop(server.output(&earlier).await);
    drop(server.output(&later).await);
}

#[tokio::test]
async fn a_repeated_request_gets_the_same_future() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;

    let first = server.forward_backward(&run, 1, &[1, 2]).await;
    let again = server.forward_backward(&run, 1, &[1, 2]).await;
    assert_eq!(first, again);
    let created = server
        .submit("/create_model", create_body(&session, 0))
        .await;
    assert_eq!(created, format!("{run}:op:0"));

    // One operation, one effect: the step sees one gradient and is the run's first.
    let step = server.optim_step(&run, 2).await;
    assert_eq!(server.optim_step(&run, 2).await, step);
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn another_request_under_a_used_number_is_refused_naming_both() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    server.forward_backward(&run, 1, &[1, 2]).await;

    let other = server.post_proto(&fb(&run, 1, vec![datum(&[2, 1])])).await;
    assert_eq!(other.status, 422);
    let id = format!("{run}:op:1");
    assert!(other.detail().contains(&id) && other.detail().contains("forward_backward"));
    let step = server.post("/optim_step", optim(&run, 1)).await;
    assert_eq!(step.status, 422);
    let mut body = create_body(&session, 0);
    body["lora_config"]["rank"] = json!(4);
    assert_eq!(server.post("/create_model", body).await.status, 422);
}

#[tokio::test]
async fn of_two_creations_under_one_number_the_accepted_one_is_made() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;

    for number in 0..8 {
        let body = |rank: u64| {
            let mut body = create_body(&session, number);
            body["lora_config"]["rank"] = json!(rank);
            body
        };
        let (two, three) = tokio::join!(
            server.post("/create_model", body(2)),
            server.post("/create_model", body(3))
        );

        let mut statuses = [two.status, three.status];
        let accepted = if two.status == 200 { 2 } else { 3 };
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 422]);
        let run = format!("/training_runs/{session}:train:{number}");
        assert_eq!(server.get(&run).await.json()["lora_rank"], accepted);
    }
}

#[tokio::test]
async fn json_that_differs_only_in_order_is_the_same_request() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let a =
        format!(r#"{{"model_id":"{run}","seq_id":1,"adam_params":{{"beta1":0.5,"beta2":0.5}}}}"#);
    let b =
        format!(r#"{{"seq_id": 1, "adam_params":{{"beta2":0.5,"beta1":0.5}},"model_id":"{run}"}}"#);

    let first = server
        .post_bytes("/optim_step", "application/json", a.into_bytes())
        .await;
    let again = server
        .post_bytes("/optim_step", "application/json", b.into_bytes())
        .await;

    assert_eq!(first, again);
}

#[tokio::test]
async fn bad_data_fail_their_own_operation_and_no_other() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let nan = ("weights", TensorData::floats(vec![1.0, f32::NAN]));
    let bad = [
        (
            vec![datum(&[1]), datum(&[2, 99])],
            "datum 1: token 99 at position 1 is outside the vocabulary of 32",
        ),
        (
            vec![datum(&[1; 65])],
            "datum 0: 65 tokens do not fit the model's context of 64",
        ),
        (
            vec![raw_datum(
                &[1, 2],
                vec![("target_tokens", TensorData::ints(vec![1, 2])), nan],
            )],
            "datum 0: weights is NaN at position 1",
        ),
        (
            vec![raw_datum(
                &[1, 2],
                vec![("target_tokens", TensorData::ints(vec![1]))],
            )],
            "datum 0: target_tokens of shape [1] for 2 input tokens",
        ),
        (vec![], "the request holds no data"),
    ];

    let mut seq = 0;
    for (data, expected) in bad {
        seq += 1;
        let answer = server.post_proto(&fb(&run, seq, data)).await;
        let failure = server
            .failure(answer.json()["request_id"].as_str().unwrap())
            .await;
        assert!(failure.contains(expected), "{failure}");
    }
    let mut unsupported = fb(&run, seq + 1, vec![datum(&[1])]);
    unsupported.loss_fn = LossFn::StableReinforce;
    let answer = server.post_proto(&unsupported).await;
    let failure = server
        .failure(answer.json()["request_id"].as_str().unwrap())
        .await;
    assert!(
        failure.contains("loss stable_reinforce is not supported"),
        "{failure}"
    );

    let good = server.forward_backward(&run, seq + 2, &[1, 2]).await;
    assert!(server.output(&good).await.metrics["loss:sum"].is_finite());
}

#[tokio::test]
async fn forward_leaves_the_gradient_alone() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let mut forward = fb(&run, 1, vec![datum(&[1, 2])]);
    forward.forward_only = true;

    server.post_proto(&forward).await;
    let step = server.optim_step(&run, 2).await;

    assert_eq!(
        server.result(&step).await.json()["metrics"]["grad_norm"],
        0.0
    );
}

#[tokio::test]
async fn old_clients_may_send_and_receive_json() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let body = json!({"model_id": run, "seq_id": 1, "forward_backward_input": {
        "loss_fn": "cross_entropy",
        "data": [{"model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
                  "loss_fn_inputs": {"target_tokens": {"data": [2, 3], "dtype": "int64"}}}]}});

    let id = server.submit("/forward_backward", body).await;
    let answer = server
        .post("/retrieve_future", json!({"request_id": id}))
        .await;

    assert_eq!(answer.content_type, "application/json");
    assert!(answer.json()["metrics"]["loss:sum"].is_number());
}

#[tokio::test]
async fn a_compressed_body_is_read() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let message =
        tinker_types::proto::ForwardBackwardRequest::try_from(&fb(&run, 1, vec![datum(&[1, 2])]))
            .unwrap();
    let body = zstd::encode_all(&prost::Message::encode_to_vec(&message)[..], 1).unwrap();
    let request = Harness::request(axum::http::Method::POST, "/forward_backward")
        .header("content-type", "application/x-protobuf")
        .header("content-encoding", "zstd")
        .body(body.into());

    let answer = server.send(request.unwrap()).await;

    server
        .output(answer.json()["request_id"].as_str().unwrap())
        .await;
}

#[tokio::test]
async fn a_panic_in_the_engine_fails_one_operation_and_the_run_goes_on() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    server.forward_backward(&run, 1, &[1, 2]).await;

    let broken = server.forward_backward(&run, 2, &[13, 13, 13]).await;
    let answer = server.result(&broken).await.json();
    assert_eq!(answer["category"], "server");

    let step = server.optim_step(&run, 3).await;
    let metrics = server.result(&step).await.json()["metrics"].clone();
    assert!(
        metrics["grad_norm"].as_f64().unwrap() > 0.0,
        "the first gradient was rebuilt: {metrics}"
    );
}
