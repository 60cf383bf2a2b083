//! Older versions of the official Python SDK train, save and sample on our server.
//!
//! 0.15 sends JSON and reads JSON; 0.24 began to send protobuf; both create models and samplers with
//! other calls than 0.38.

use tinker_contract::python::{self, Printed, Sdk};
use tinker_contract::target::Target;

async fn check(sdk: Sdk) {
    let Some(python) = python::find_version(sdk) else {
        return;
    };
    let target = Target::start().await;
    let arguments = [target.base_url.clone(), target.base_model.clone()];

    let Printed { steps, summary } = python::run_script(
        &python,
        "sdk_old_flow.py",
        &arguments,
        &target.api_key,
        target.home(),
    )
    .await;

    assert_eq!(steps.len(), 6, "{steps:#?}");
    assert_eq!(summary["version"], sdk.version());
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_0_15_trains_saves_and_samples() {
    check(Sdk::V0_15).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_0_24_trains_saves_and_samples() {
    check(Sdk::V0_24).await;
}
