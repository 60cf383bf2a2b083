//! Numbers of operations: order, gaps, repetitions, and keys.

use std::time::Duration;

use tinker_api::{ErrorKind, ForwardBackwardOutput, TrainingClient};
use tinker_http::{Client, PollPolicy, Resolved, RetryPolicy};
use tinker_types::{
    ForwardBackwardRequest, OptimStepRequest, OptimStepTag, RequestId, TrainingRunId,
};

use super::{CE, adam, batch, loss, step, trainer};
use crate::target::Target;

fn client(target: &Target, key: &str) -> Client {
    Client::builder(&target.base_url)
        .api_key(key.parse().unwrap())
        .retry_policy(RetryPolicy::never())
        .poll_policy(PollPolicy::default())
        .build()
        .unwrap()
}

fn pass(run: &TrainingRunId, seq_id: u64, seed: u32) -> ForwardBackwardRequest {
    ForwardBackwardRequest {
        model_id: run.clone(),
        seq_id,
        data: batch(seed),
        loss_fn: CE,
        loss_fn_config: Default::default(),
        forward_only: false,
    }
}

fn optim_step(run: &TrainingRunId, seq_id: u64) -> OptimStepRequest {
    OptimStepRequest {
        model_id: run.clone(),
        seq_id,
        adam_params: Some(adam()),
        optimizer_params: None,
        tag: OptimStepTag,
    }
}

/// A run that only numbered requests will be sent to, and a client to send them.
async fn run(target: &Target) -> (Client, TrainingClient, TrainingRunId) {
    let trainer = trainer(target, 1).await;
    let run = trainer.training_run_id().clone();
    (client(target, &target.api_key), trainer, run)
}

async fn output(client: &Client, id: &RequestId) -> ForwardBackwardOutput {
    match client.retrieve_forward_backward(id, None).await.unwrap() {
        Resolved::Ready(output) => output,
        Resolved::Failed(failure) => panic!("{}", failure.error),
    }
}

/// Operations that arrive out of order are held until those before them have come.
pub async fn gaps_are_held(target: &Target) {
    let (client, _trainer, run) = run(target).await;
    let twin = trainer(target, 1).await;
    let expected = [step(&twin, batch(1)).await, step(&twin, batch(2)).await];

    let third = client
        .forward_backward(pass(&run, 3, 2))
        .await
        .unwrap()
        .request_id;
    let second = client
        .optim_step(&optim_step(&run, 2))
        .await
        .unwrap()
        .request_id;
    let early = tokio::time::timeout(
        Duration::from_millis(50),
        client.retrieve_optim_step(&second, None),
    );
    assert!(
        early.await.is_err(),
        "operation 2 was executed before operation 1 came"
    );
    let first = client
        .forward_backward(pass(&run, 1, 1))
        .await
        .unwrap()
        .request_id;

    assert_eq!(loss(&output(&client, &third).await), expected[1]);
    assert_eq!(loss(&output(&client, &first).await), expected[0]);
}

/// The same operation sent twice is one operation.
pub async fn repetitions_are_recognised(target: &Target) {
    let (client, trainer, run) = run(target).await;

    let once = client.forward_backward(pass(&run, 1, 1)).await.unwrap();
    let twice = client.forward_backward(pass(&run, 1, 1)).await.unwrap();
    let first = output(&client, &once.request_id).await;
    let late = client.forward_backward(pass(&run, 1, 1)).await.unwrap();

    assert_eq!(once.request_id, twice.request_id);
    assert_eq!(once.request_id, late.request_id);
    assert_eq!(output(&client, &late.request_id).await, first);
    // The gradient was added once.
    client.optim_step(&optim_step(&run, 2)).await.unwrap();
    let twin = self::trainer(target, 1).await;
    step(&twin, batch(1)).await;
    let after = client
        .forward_backward(pass(&run, 3, 2))
        .await
        .unwrap()
        .request_id;
    let expected = twin.forward_backward(batch(2), CE).await.unwrap();
    assert_eq!(loss(&output(&client, &after).await), loss(&expected));
    drop(trainer);
}

/// A number that is used for something else is refused for good, in a way that nobody retries.
pub async fn a_reused_number_is_refused(target: &Target) {
    let (client, _trainer, run) = run(target).await;
    client.forward_backward(pass(&run, 1, 1)).await.unwrap();

    let error = client.forward_backward(pass(&run, 1, 2)).await.unwrap_err();

    assert_eq!(error.status(), Some(422), "{error}");
    assert_eq!(*error.kind(), ErrorKind::InvalidRequest);
    assert!(
        error.to_string().contains("operation 1 of training run"),
        "{error}"
    );
}

/// A result can be fetched more than once.
pub async fn results_stay(target: &Target) {
    let (client, _trainer, run) = run(target).await;
    let id = client
        .forward_backward(pass(&run, 1, 1))
        .await
        .unwrap()
        .request_id;

    let first = output(&client, &id).await;

    assert_eq!(output(&client, &id).await, first);
}

/// A future that nobody made is not waited for.
pub async fn unknown_futures_are_refused(target: &Target) {
    let (client, _trainer, _run) = run(target).await;

    let error = client
        .retrieve_optim_step(&"nothing-1".parse().unwrap(), None)
        .await
        .unwrap_err();

    let known = [ErrorKind::NotFound, ErrorKind::Expired];
    assert!(known.contains(error.kind()), "{error}");
}

/// Nobody without the key learns anything.
pub async fn a_wrong_key_is_refused(target: &Target) {
    let stranger = client(target, "tml-not-the-key");

    for error in [
        stranger.config().await.unwrap_err(),
        stranger.get_server_capabilities().await.unwrap_err(),
    ] {
        assert_eq!(*error.kind(), ErrorKind::Unauthenticated, "{error}");
        assert!(!error.to_string().contains(&target.api_key));
    }
}
