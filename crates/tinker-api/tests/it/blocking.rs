//! The clients without async: whole runs, order, and use where blocking is not welcome.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tinker_api::blocking::{ServiceClient, TrainingClient};
use tinker_api::custom_loss::differentiate;
use tinker_api::{
    AdamParams, Error, FinishReason, LoraConfig, LossFn, ModelInput, SampleOptions, SamplerKind,
    SamplingParams, SaveOptions,
};
use wiremock::{MockServer, ResponseTemplate};

use crate::support::*;

/// A server on a runtime of the test's, and a client outside of it.
fn rig() -> (tokio::runtime::Runtime, MockServer, ServiceClient) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(server());
    let service = ServiceClient::new(builder(&server)).unwrap();
    (runtime, server, service)
}

fn trainer(service: &ServiceClient) -> TrainingClient {
    service
        .create_lora_training_client("tinker/nano", LoraConfig::default())
        .unwrap()
}

#[test]
fn a_script_trains_saves_and_samples() {
    let (runtime, server, service) = rig();
    let trainer = trainer(&service);

    let pass = trainer.forward_backward(vec![datum()], LossFn::CrossEntropy);
    let step = trainer.optim_step(AdamParams::default());
    let loss = differentiate(|tape, _, x| Ok(tape.concat(x.to_vec()).sum()));
    let custom = trainer.forward_backward_custom(vec![datum()], loss);
    let saved = trainer.save_state("0001", SaveOptions::default());
    step.wait().unwrap();
    assert_eq!(pass.wait().unwrap().metrics["loss:sum"], 1.0);
    assert_eq!(custom.wait().unwrap().metrics["loss:sum"], -1.0);
    assert_eq!(
        saved.wait().unwrap().to_string(),
        "tinker://S1:train:0/weights/0001"
    );
    let sampler = trainer
        .save_weights_and_get_sampling_client(SamplerKind::Snapshot)
        .unwrap();
    let sample = sampler.sample(
        ModelInput::from_tokens(vec![1, 2]),
        SamplingParams::default(),
        SampleOptions::default(),
    );
    assert_eq!(sample.wait().unwrap().sequences[0].tokens, [5, 6]);

    let numbers = runtime.block_on(operations(&server));
    let numbers: Vec<u64> = numbers.into_iter().map(|(_, n)| n).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn waiting_ends_after_the_time_given() {
    let (runtime, server, service) = rig();
    let trainer = trainer(&service);
    let nothing = ResponseTemplate::new(408);
    runtime.block_on(answer_with(&server, "retrieve_future", None, nothing));

    let pass = trainer.forward(vec![datum()], LossFn::CrossEntropy);
    let error = pass.timeout(Duration::from_millis(20)).unwrap_err();

    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
}

#[test]
fn futures_of_the_async_clients_can_be_waited_for() {
    let (_runtime, _server, service) = rig();
    let inner = service.inner().clone();

    let id = service.wait_for(async move { inner.session_id().await });

    assert_eq!(id.unwrap().to_string(), "S1");
}

#[test]
fn a_future_that_panics_is_an_error() {
    let (_runtime, _server, service) = rig();

    let result: tinker_api::Result<()> = service.wait_for(async { panic!("no reason") });

    assert!(matches!(result, Err(Error::Abandoned(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_works_and_ends_within_another_runtime() {
    let server = server().await;
    let service = ServiceClient::new(builder(&server)).unwrap();

    let pass = trainer(&service).forward(vec![datum()], LossFn::CrossEntropy);

    assert_eq!(pass.wait().unwrap().loss_fn_outputs.len(), 1);
    drop(service);
}

#[test]
fn what_was_submitted_is_sent_before_the_client_ends() {
    let (runtime, server, service) = rig();
    let trainer = trainer(&service);

    drop(trainer.forward_backward(vec![datum()], LossFn::CrossEntropy));
    drop(trainer.optim_step(AdamParams::default()));
    drop(trainer.save_state("0001", SaveOptions::default()));
    drop((trainer, service));

    let sent = runtime.block_on(operations(&server));
    let sent: Vec<_> = sent.iter().map(|(route, n)| (route.as_str(), *n)).collect();
    let expected = [
        ("forward_backward", 1),
        ("optim_step", 2),
        ("save_weights", 3),
    ];
    assert_eq!(sent, expected);
}

#[test]
fn both_halves_of_a_custom_loss_are_sent_before_the_client_ends() {
    let (runtime, server, service) = rig();
    let trainer = trainer(&service);
    let loss = differentiate(|tape, _, x| Ok(tape.concat(x.to_vec()).sum()));

    drop(trainer.forward_backward_custom(vec![datum()], loss));
    drop((trainer, service));

    assert_eq!(runtime.block_on(operations(&server)).len(), 2);
}

#[test]
fn waiting_in_an_observer_is_an_error_that_says_what_to_do() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(server());
    let nothing = ResponseTemplate::new(503);
    runtime.block_on(answer_with(&server, "optim_step", Some(1), nothing));
    let (told, errors) = std::sync::mpsc::channel();
    let shared: Arc<OnceLock<ServiceClient>> = Arc::default();
    let own = Arc::downgrade(&shared);
    let observer = move |_: &tinker_api::Event| {
        if let Some(service) = own.upgrade() {
            let service = service.get().unwrap();
            told.send(service.get_server_capabilities()).unwrap();
        }
    };
    let service = ServiceClient::new(builder(&server).observer(observer)).unwrap();
    let trainer = trainer(&service);
    shared.set(service).unwrap();

    trainer.optim_step(AdamParams::default()).wait().unwrap();

    let error = errors.recv().unwrap().unwrap_err();
    assert!(matches!(error, Error::InvalidRequest(_)), "{error:?}");
    assert!(error.to_string().contains("another thread"), "{error}");
}

#[test]
fn a_closed_client_says_so() {
    let (runtime, server, service) = rig();
    runtime.block_on(async {
        let done = ok(serde_json::json!({}));
        answer_with(&server, "sessions/S1/finish", None, done).await;
    });
    let trainer = trainer(&service);

    service.close(FinishReason::Success, None).unwrap();
    let error = trainer.optim_step(AdamParams::default()).wait();

    assert!(matches!(error, Err(Error::Closed)), "{error:?}");
}
