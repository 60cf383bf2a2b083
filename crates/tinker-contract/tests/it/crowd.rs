//! Many samplers with requests in the queue: all are served.

use tinker_contract::crowd::gather;
use tinker_contract::python;
use tinker_contract::soak::Place;
use tinker_contract::target::Target;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_samplers_with_ten_requests_each_are_served() {
    const N_SAMPLERS: usize = 200;
    let target = Target::start().await;
    let place = Place {
        base_url: target.base_url.clone(),
        api_key: target.api_key.clone(),
        base_model: target.base_model.clone(),
        n_tokens: 320,
    };

    let crowd = gather(&place, N_SAMPLERS, 10).await;

    assert_eq!(crowd.errors, Vec::<String>::new());
    assert_eq!(crowd.times.len(), N_SAMPLERS);
    println!("median {:?}, longest {:?}", crowd.median(), crowd.longest());
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_are_those_of_the_official_sdk() {
    let Some(python) = python::find() else {
        return;
    };
    let target = Target::start().await;
    let (samplers, each) = ("40", "5");
    let arguments = [&target.base_url, &target.base_model, samplers, each].map(str::to_owned);

    let printed = python::run_script(
        &python,
        "sdk_crowd.py",
        &arguments,
        &target.api_key,
        target.home(),
    )
    .await;

    assert_eq!(printed.summary["n_errors"], 0, "{}", printed.summary);
    target.stop().await;
}
