//! The official Python SDK 0.38 trains, samples and manages on our server.

use tinker_contract::python::{self, Printed};
use tinker_contract::target::{Target, checkpoint_tensors};

/// Runs the flow on a base model of a fresh server.
async fn check(base_model: impl FnOnce(&Target) -> String) {
    let Some(python) = python::find() else {
        return;
    };
    let target = Target::start().await;
    let arguments = [target.base_url.clone(), base_model(&target)];

    let Printed { steps, summary } = python::run_script(
        &python,
        "sdk_flow.py",
        &arguments,
        &target.api_key,
        target.home(),
    )
    .await;

    assert_eq!(steps.len(), 20, "{steps:#?}");
    // A run and its continuation from a checkpoint, saved after the same steps.
    let twins: Vec<_> = summary["twins"]
        .as_array()
        .unwrap()
        .iter()
        .map(|path| checkpoint_tensors(target.home(), &path.as_str().unwrap().parse().unwrap()))
        .collect();
    assert_eq!(twins[0].len(), 2, "adapter and optimizer");
    assert!(
        twins[0] == twins[1],
        "the continued run has other weights than the uninterrupted one"
    );
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_official_sdk_runs_the_whole_flow_on_a_model_directory() {
    check(|target| target.base_model.clone()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_official_sdk_runs_the_whole_flow_on_the_embedded_model() {
    check(|_| "tinker/nano".to_owned()).await;
}
