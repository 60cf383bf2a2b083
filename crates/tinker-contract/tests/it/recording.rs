//! Recording a run against our server and replaying it without one.

use tempfile::TempDir;
use tinker_api::cassette::{Cassette, Pace, Recorder, Replay};
use tinker_api::{
    AdamParams, Datum, FinishReason, LoraConfig, LossFn, ModelInput, SampleOptions, SamplingParams,
    SaveOptions, ServiceClient,
};
use tinker_contract::target::Target;

/// What a short run with a sample at its end brings.
async fn run(service: &ServiceClient, base_model: &str) -> String {
    let trainer = service
        .create_lora_training_client(base_model, LoraConfig::default())
        .await
        .unwrap();
    let input = ModelInput::from_tokens(vec![11, 42, 7]);
    let mut said = Vec::new();
    for _ in 0..3 {
        let datum = Datum::cross_entropy(input.clone(), vec![42, 7, 99], vec![1.0; 3]).unwrap();
        let pass = trainer.forward_backward(vec![datum.clone(), datum], LossFn::CrossEntropy);
        let step = trainer.optim_step(AdamParams::default());
        said.push(format!(
            "{:?} {:?}",
            pass.await.unwrap(),
            step.await.unwrap()
        ));
    }
    let options = SaveOptions::default();
    let weights = trainer
        .save_weights_for_sampler("end", options)
        .await
        .unwrap();
    let sampler = service.create_sampling_client(&weights).await.unwrap();
    let params = SamplingParams {
        max_tokens: Some(8),
        seed: Some(1),
        ..SamplingParams::default()
    };
    let sample = sampler.sample(input, params, SampleOptions::default());
    said.push(format!("{:?}", sample.await.unwrap()));
    service.close(FinishReason::Success, None).await.unwrap();
    said.join("\n")
}

#[tokio::test]
async fn a_run_replays_from_its_cassette_to_the_last_digit() {
    let target = Target::start().await;
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("run.cassette.jsonl");
    let recorder = Recorder::create(&path).unwrap();
    let service = ServiceClient::builder(&target.base_url)
        .api_key(target.api_key.parse().unwrap())
        .record(recorder.clone())
        .build()
        .unwrap();
    let base_model = target.base_model.clone();
    let recorded = run(&service, &base_model).await;
    let stats = recorder.finish().await.unwrap();
    let key = target.api_key.clone();
    target.stop().await;

    let cassette = Cassette::open(&path).unwrap();
    let replay = Replay::start(cassette, Pace::Instant).await.unwrap();
    let service = ServiceClient::builder(replay.base_url().to_string())
        .api_key("tml-replay".parse().unwrap())
        .build()
        .unwrap();
    let replayed = run(&service, &base_model).await;

    assert_eq!(replayed, recorded);
    let report = replay.report();
    assert_eq!(report.unmatched, []);
    assert!(report.n_replayed + report.unused.len() as u64 == stats.n_exchanges);
    assert!(!std::fs::read_to_string(&path).unwrap().contains(&key));
}
