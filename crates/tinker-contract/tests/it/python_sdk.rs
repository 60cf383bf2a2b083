//! The official Python SDK 0.38 trains, samples and manages on our server.

use tinker_contract::python::{self, Printed};
use tinker_contract::target::Target;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_official_sdk_runs_the_whole_flow() {
    let python = match python::find() {
        Ok(python) => python,
        Err(reason) => return eprintln!("{reason}"),
    };
    let target = Target::start().await;

    let Printed { steps, summary } = python::run_script(
        &python,
        "sdk_flow.py",
        &[&target.base_url, &target.base_model],
        &target.api_key,
        target.home(),
    )
    .await;

    assert_eq!(steps.len(), 14, "{steps:#?}");
    assert_eq!(summary["losses"].as_array().unwrap().len(), 20);
    target.stop().await;
}
