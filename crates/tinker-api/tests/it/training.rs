//! Order, chunks, failures and saves of a training run.

use std::time::Duration;

use serde_json::json;
use tinker_api::{
    AdamParams, Error, ErrorCategory, LossFn, SamplerKind, SaveOptions, ServiceClient,
};
use wiremock::{MockServer, Request, ResponseTemplate};

use crate::support::*;

fn names(operations: &[(String, u64)]) -> Vec<(&str, u64)> {
    operations
        .iter()
        .map(|(name, n)| (name.as_str(), *n))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operations_arrive_in_call_order_whatever_is_awaited_first() {
    let server = server().await;
    let trainer = trainer(&server).await;

    let mut steps = Vec::new();
    let mut passes = Vec::new();
    for _ in 0..10 {
        passes.push(trainer.forward_backward(vec![datum()], LossFn::CrossEntropy));
        steps.push(trainer.optim_step(AdamParams::default()));
    }
    for step in steps.into_iter().rev() {
        step.await.unwrap();
    }
    for pass in passes {
        pass.await.unwrap();
    }

    let expected: Vec<(&str, u64)> = (1..=20)
        .map(|n| (["optim_step", "forward_backward"][n % 2], n as u64))
        .collect();
    assert_eq!(names(&operations(&server).await), expected);
}

#[tokio::test]
async fn a_dropped_future_is_still_submitted_in_its_place() {
    let server = server().await;
    let pending = |request: &Request| match body(request)["request_id"].as_str() {
        Some(id) if id.starts_with("pass") => ResponseTemplate::new(408),
        Some(id) => result(id),
        None => panic!("no id"),
    };
    answer_with(&server, "retrieve_future", None, pending).await;
    let trainer = trainer(&server).await;

    drop(trainer.forward_backward(vec![datum()], LossFn::CrossEntropy));
    trainer.optim_step(AdamParams::default()).await.unwrap();

    let arrived = operations(&server).await;
    assert_eq!(
        names(&arrived),
        [("forward_backward", 1), ("optim_step", 2)]
    );
}

#[tokio::test]
async fn a_large_call_travels_in_chunks_with_the_first_one_last() {
    let server = server().await;
    let trainer = trainer(&server).await;

    let pass = trainer.forward_backward(vec![datum(); 2050], LossFn::CrossEntropy);
    let step = trainer.optim_step(AdamParams::default());
    let output = pass.await.unwrap();
    step.await.unwrap();

    assert_eq!(output.loss_fn_outputs.len(), 2050);
    assert_eq!(output.metrics["loss:sum"], 2050.0);
    let sent = requests(&server, "forward_backward").await;
    let mut chunks: Vec<(u64, usize)> = sent.iter().map(pass_size).collect();
    assert_eq!(chunks.last(), Some(&(1, 1024)));
    chunks.sort_unstable();
    assert_eq!(chunks, [(1, 1024), (2, 1024), (3, 2)]);
    assert_eq!(
        operations(&server).await.last().unwrap(),
        &("optim_step".to_owned(), 4)
    );
}

fn pass_size(request: &Request) -> (u64, usize) {
    let request = pass(request);
    (request.seq_id, request.data.len())
}

#[tokio::test]
async fn chunks_travel_in_order_where_the_server_wants_it() {
    let server = server().await;
    let config = ok(json!({"parallel_fwdbwd_chunks": false, "fwdbwd_max_chunk_len": 1}));
    answer_with(&server, "client/config", None, config).await;
    let trainer = trainer(&server).await;

    trainer
        .forward(vec![datum(); 3], LossFn::CrossEntropy)
        .await
        .unwrap();

    let sent = requests(&server, "forward_backward").await;
    let chunks: Vec<(u64, usize)> = sent.iter().map(pass_size).collect();
    assert_eq!(chunks, [(1, 1), (2, 1), (3, 1)]);
    assert!(sent.iter().all(|request| pass(request).forward_only));
}

#[tokio::test]
async fn a_failed_operation_keeps_its_category_and_later_ones_go_on() {
    let server = server().await;
    let failure = |request: &Request| match body(request)["request_id"].as_str() {
        Some(id) if id.starts_with("pass") => {
            ok(json!({"error": "token 9 is out of range", "category": "user"}))
        }
        Some(id) => result(id),
        None => panic!("no id"),
    };
    answer_with(&server, "retrieve_future", None, failure).await;
    let trainer = trainer(&server).await;

    let error = trainer
        .forward_backward(vec![datum()], LossFn::CrossEntropy)
        .await
        .unwrap_err();
    trainer.optim_step(AdamParams::default()).await.unwrap();

    assert!(error.is_user_error());
    assert!(
        matches!(&error, Error::RequestFailed { category: ErrorCategory::User, message, .. }
            if message == "token 9 is out of range"),
        "{error}"
    );
}

#[tokio::test]
async fn a_refused_operation_leaves_its_number_to_the_next_one() {
    let server = server().await;
    answer_with(&server, "optim_step", Some(1), refusal(400)).await;
    let trainer = trainer(&server).await;

    let refused = trainer.optim_step(AdamParams::default());
    let pass = trainer.forward_backward(vec![datum()], LossFn::CrossEntropy);

    assert!(
        refused
            .await
            .unwrap_err()
            .to_string()
            .starts_with("refused")
    );
    pass.await.unwrap();
    let arrived = operations(&server).await;
    assert_eq!(
        names(&arrived),
        [("optim_step", 1), ("forward_backward", 1)]
    );
}

#[tokio::test]
async fn a_save_whose_name_is_taken_fails_and_the_run_goes_on() {
    for statuses in [vec![409], vec![503, 409]] {
        let server = server().await;
        let n_attempts = 4_u64;
        for (i, status) in statuses.iter().enumerate() {
            let n = if i + 1 == statuses.len() {
                n_attempts - i as u64
            } else {
                1
            };
            answer_with(&server, "save_weights", Some(n), refusal(*status)).await;
        }
        let trainer = trainer(&server).await;

        let taken = trainer.save_state("a", SaveOptions::default());
        let pass = trainer.forward_backward(vec![datum()], LossFn::CrossEntropy);
        let free = trainer.save_state("b", SaveOptions::default());

        let error = taken.await.unwrap_err();
        assert!(
            matches!(error.kind(), Some(tinker_api::ErrorKind::Conflict)),
            "{error}"
        );
        // The first attempt may have taken the name that the others found taken.
        let may_be_made = matches!(error, Error::MaybeSaved { .. });
        assert_eq!(may_be_made, statuses.len() > 1, "{error}");
        pass.await.unwrap();
        free.await.unwrap();
        let arrived = operations(&server).await;
        let later = names(&arrived[n_attempts as usize..]).to_vec();
        assert_eq!(later, [("forward_backward", 1), ("save_weights", 2)]);
    }
}

#[tokio::test]
async fn a_conflict_of_another_operation_is_about_its_number_and_stops_the_client() {
    let server = server().await;
    answer_with(&server, "optim_step", None, refusal(409)).await;
    let trainer = trainer(&server).await;

    let step = trainer.optim_step(AdamParams::default()).await;
    let pass = trainer.forward_backward(vec![datum()], LossFn::CrossEntropy);

    assert!(step.unwrap_err().to_string().contains("409"));
    assert!(matches!(pass.await.unwrap_err(), Error::Stopped(_)));
}

#[tokio::test]
async fn a_submission_that_may_have_arrived_stops_the_client() {
    let server = server().await;
    answer_with(&server, "optim_step", None, refusal(500)).await;
    let trainer = trainer(&server).await;

    let lost = trainer.optim_step(AdamParams::default());
    let pass = trainer.forward_backward(vec![datum()], LossFn::CrossEntropy);

    assert!(lost.await.unwrap_err().is_server_lost());
    let error = pass.await.unwrap_err();
    assert!(matches!(error, Error::Stopped(_)), "{error}");
    let arrived = operations(&server).await;
    assert!(
        arrived
            .iter()
            .all(|(name, n)| name == "optim_step" && *n == 1)
    );
}

#[tokio::test]
async fn a_refusal_after_a_failure_that_may_have_arrived_stops_the_client() {
    for (first, last) in [(503, 401), (503, 403), (500, 404), (409, 422)] {
        let server = server().await;
        answer_with(&server, "optim_step", Some(1), refusal(first)).await;
        answer_with(&server, "optim_step", None, refusal(last)).await;
        let trainer = trainer(&server).await;

        let refused = trainer.optim_step(AdamParams::default());
        let pass = trainer.forward_backward(vec![datum()], LossFn::CrossEntropy);

        let message = refused.await.unwrap_err().to_string();
        assert!(message.contains(&last.to_string()), "{message}");
        let error = pass.await.unwrap_err();
        assert!(
            matches!(error, Error::Stopped(_)),
            "{first} {last}: {error}"
        );
        assert!(requests(&server, "forward_backward").await.is_empty());
    }
}

#[tokio::test]
async fn a_repeated_submission_has_the_same_number_and_bytes() {
    let server = server().await;
    answer_with(&server, "forward_backward", Some(2), refusal(503)).await;
    let trainer = trainer(&server).await;

    trainer
        .forward_backward(vec![datum()], LossFn::CrossEntropy)
        .await
        .unwrap();

    let sent = requests(&server, "forward_backward").await;
    assert_eq!(sent.len(), 3);
    assert!(sent.iter().all(|request| request.body == sent[0].body));
}

#[tokio::test]
async fn what_cannot_be_right_is_not_sent_and_takes_no_number() {
    let server = server().await;
    let trainer = trainer(&server).await;

    let empty = trainer.forward_backward(vec![], LossFn::CrossEntropy).await;
    let unfit = trainer.forward_backward(vec![datum()], LossFn::Ppo).await;
    let adam = AdamParams {
        learning_rate: -1.0,
        ..AdamParams::default()
    };
    let negative = trainer.optim_step(adam).await.map(drop);
    let short = SaveOptions {
        ttl: Some(Duration::from_secs(1)),
        ..SaveOptions::default()
    };
    let fleeting = trainer.save_state("a", short).await.map(drop);
    let nameless = trainer
        .save_weights_for_sampler("a/b", SaveOptions::default())
        .await;
    trainer.optim_step(AdamParams::default()).await.unwrap();

    for error in [
        empty.unwrap_err(),
        unfit.unwrap_err(),
        negative.unwrap_err(),
        fleeting.unwrap_err(),
        nameless.unwrap_err(),
    ] {
        assert!(matches!(error, Error::InvalidRequest(_)), "{error}");
    }
    assert_eq!(names(&operations(&server).await), [("optim_step", 1)]);
}

#[tokio::test]
async fn saves_name_paths_and_samplers() {
    let server = server().await;
    let trainer = trainer(&server).await;

    let state = trainer
        .save_state("0001", SaveOptions::default())
        .await
        .unwrap();
    let weights = trainer
        .save_weights_for_sampler("0001", SaveOptions::default())
        .await
        .unwrap();
    let sampler = trainer
        .save_weights_and_get_sampling_client(SamplerKind::Snapshot)
        .await
        .unwrap();

    assert_eq!(state.to_string(), "tinker://S1:train:0/weights/0001");
    assert_eq!(
        weights.to_string(),
        "tinker://S1:train:0/sampler_weights/0001"
    );
    assert_eq!(sampler.base_model(), "tinker/nano");
    let sent = requests(&server, "save_weights_for_sampler").await;
    assert_eq!(body(&sent[0])["path"], "0001");
    assert_eq!(body(&sent[1]).get("path"), None);
    assert_eq!(body(&sent[1])["sampling_session_seq_id"], 0);
    assert_eq!(requests(&server, "create_sampling_session").await.len(), 0);
}

#[tokio::test]
async fn a_wait_can_be_bounded() {
    let server = server().await;
    let trainer = trainer(&server).await;
    answer_with(&server, "retrieve_future", None, ResponseTemplate::new(408)).await;

    let error = trainer
        .optim_step(AdamParams::default())
        .timeout(Duration::from_millis(20))
        .await
        .unwrap_err();

    assert_eq!(error.to_string(), "no result of OptimStep after 20ms");
}

#[tokio::test]
async fn a_run_continues_from_a_checkpoint_with_its_optimizer() {
    let server: MockServer = server().await;
    let service: ServiceClient = service(&server);
    let path = "tinker://S0:train:0/weights/0007".parse().unwrap();

    let trainer = service
        .create_training_client_from_state_with_optimizer(&path, Default::default())
        .await
        .unwrap();

    assert_eq!(trainer.training_run_id().as_str(), "S1:train:0");
    let sent = body(&requests(&server, "load_weights").await[0]);
    assert_eq!(sent["optimizer"], true);
    assert_eq!(sent["model_seq_id"], 0);
    assert_eq!(sent["path"], "tinker://S0:train:0/weights/0007");
    let wrong = "tinker://S0:train:0/sampler_weights/0007".parse().unwrap();
    let error = service
        .create_training_client_from_state(&wrong, Default::default())
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("did you mean tinker://S0:train:0/weights/0007?")
    );
}
