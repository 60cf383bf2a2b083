//! The official Python SDK 0.38 shares samplers and checkpoints, moves sessions and reads traces.

use tinker_contract::python;
use tinker_contract::target::Target;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_official_sdk_shares_and_manages() {
    let Some(python) = python::find() else {
        return;
    };
    let target = Target::start_with(|config| {
        config.pjwt_auth_enabled = true;
        config.sample_use_retrieve_futures = true;
    })
    .await;
    let folder = target.home().display().to_string();
    let arguments = [target.base_url.clone(), target.base_model.clone(), folder];

    let printed = python::run_script(
        &python,
        "sdk_sharing.py",
        &arguments,
        &target.api_key,
        target.home(),
    )
    .await;

    assert_eq!(printed.steps.len(), 11, "{:#?}", printed.steps);
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_official_openai_and_anthropic_clients_sample() {
    let Some(python) = python::find() else {
        return;
    };
    let target = Target::start().await;
    let arguments = [target.base_url.clone(), "tinker/nano".to_owned()];

    let printed = python::run_script(
        &python,
        "compatible_clients.py",
        &arguments,
        &target.api_key,
        target.home(),
    )
    .await;

    assert_eq!(printed.steps.len(), 12, "{:#?}", printed.steps);
    target.stop().await;
}
