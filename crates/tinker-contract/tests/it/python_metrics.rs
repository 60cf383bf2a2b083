//! The official Prometheus client library reads what our server counts.

use tinker_api::{LoraConfig, LossFn};
use tinker_contract::python;
use tinker_contract::suite::batch;
use tinker_contract::target::Target;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_official_prometheus_parser_reads_the_counters() {
    let Some(python) = python::find() else {
        return;
    };
    let target = Target::start().await;
    let service = target.service();
    let lora = LoraConfig {
        rank: 4,
        ..LoraConfig::default()
    };
    let created = service.create_lora_training_client(&target.base_model, lora);
    let trainer = created.await.unwrap();
    let passed = trainer.forward_backward(batch(1), LossFn::CrossEntropy);
    passed.await.unwrap();

    let printed = python::run_script(
        &python,
        "prometheus_page.py",
        std::slice::from_ref(&target.base_url),
        &target.api_key,
        target.home(),
    )
    .await;

    assert_eq!(printed.steps.len(), 3, "{:#?}", printed.steps);
    let texts = |key: &str| -> Vec<String> {
        serde_json::from_value(printed.summary[key].clone()).unwrap()
    };
    for name in [
        "tinker_tokens",
        "tinker_operations",
        "tinker_operation_seconds",
    ] {
        assert!(texts("families").contains(&name.to_owned()), "{name}");
    }
    let labels = texts("labels");
    assert!(
        labels.contains(&"forward_backward".to_owned()),
        "{labels:?}"
    );
    let run = trainer.training_run_id().to_string();
    let session = run.split(':').next().unwrap();
    let from_requests = |label: &&String| {
        label.contains(session) || label.contains(&target.base_model) || label.contains("tml-")
    };
    assert_eq!(labels.iter().find(from_requests), None);
    drop(trainer);
    target.stop().await;
}
