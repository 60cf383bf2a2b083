//! Many samplers with requests in the queue: all are served.

use std::path::Path;

use tinker_contract::crowd::gather;
use tinker_contract::python;
use tinker_contract::soak::Place;
use tinker_contract::target::Target;
use tinker_server::TlsFiles;

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

    assert_all_are_served(&python, target, 40, None).await;
}

/// By TLS the SDK speaks HTTP/2, and takes nothing after a GOAWAY.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_are_those_of_the_official_sdk_by_tls_where_there_are_few_connections() {
    let Some(python) = python::find() else {
        return;
    };
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tls");
    let files = TlsFiles {
        cert: fixtures.join("first.cert.pem"),
        key: fixtures.join("first.key.pem"),
    };
    let certificate = files.cert.clone();
    let target = Target::start_as(|options| {
        options.tls = Some(files);
        options.max_connections = Some(8);
    })
    .await;
    assert!(target.base_url.starts_with("https://"));

    assert_all_are_served(&python, target, 24, Some(&certificate)).await;
}

/// Has so many of the SDK's samplers queue five requests each.
async fn assert_all_are_served(
    python: &Path,
    target: Target,
    n_samplers: usize,
    certificate: Option<&Path>,
) {
    let samplers = n_samplers.to_string();
    let arguments = [&target.base_url, &target.base_model, samplers.as_str(), "5"];

    let printed = python::run_script_that_trusts(
        python,
        "sdk_crowd.py",
        &arguments.map(str::to_owned),
        &target.api_key,
        target.home(),
        certificate,
    )
    .await;

    assert_eq!(printed.summary["n_errors"], 0, "{}", printed.summary);
    target.stop().await;
}
