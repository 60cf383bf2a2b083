//! Trains a little while all that is said is recorded, looks into the recording, and trains again
//! against the recording alone.
//!
//! `TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-… cargo run --example record_replay`

#![expect(clippy::print_stdout, reason = "examples talk to their reader")]

use anyhow::ensure;
use tinker_api::cassette::{Cassette, Pace, Recorder, Replay};
use tinker_api::{
    AdamParams, Datum, FinishReason, LoraConfig, LossFn, ModelInput, SampleOptions, SamplingParams,
    SaveOptions, ServiceClient,
};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let name = format!("record_replay-{}.cassette.jsonl", std::process::id());
    let path = std::env::temp_dir().join(name);
    let recorder = Recorder::create(&path)?;
    let service = examples::builder_from_environment()?
        .record(recorder.clone())
        .build()?;
    let base_model = examples::first_model(&service).await?;
    let recorded = train(&service, &base_model).await?;
    let stats = recorder.finish().await?;
    println!("{} exchanges in {}", stats.n_exchanges, path.display());

    let cassette = Cassette::open(&path)?;
    print!("{}", cassette.summary());

    let replay = Replay::start(cassette, Pace::Instant).await?;
    // Nobody checks the key: there is nothing but the file.
    let service = ServiceClient::builder(replay.base_url().to_string())
        .api_key("tml-replay".parse()?)
        .build()?;
    examples::first_model(&service).await?;
    let replayed = train(&service, &base_model).await?;

    ensure!(replayed == recorded, "{replayed:?} is not {recorded:?}");
    let report = replay.report();
    ensure!(report.unmatched.is_empty(), "{:?}", report.unmatched);
    println!("replayed: losses and tokens {replayed:?}");
    std::fs::remove_file(path)?;
    Ok(())
}

/// The losses of three steps, and what the result says.
async fn train(service: &ServiceClient, base_model: &str) -> anyhow::Result<(Vec<f64>, Vec<u32>)> {
    let trainer = service
        .create_lora_training_client(base_model, LoraConfig::default())
        .await?;
    let input = ModelInput::from_tokens(vec![11, 42, 7]);
    let mut losses = Vec::new();
    for _ in 0..3 {
        let datum = Datum::cross_entropy(input.clone(), vec![42, 7, 99], vec![1.0; 3])?;
        let pass = trainer.forward_backward(vec![datum], LossFn::CrossEntropy);
        let step = trainer.optim_step(AdamParams::default());
        losses.extend(pass.await?.metrics.get("loss:sum"));
        step.await?;
    }
    let weights = trainer
        .save_weights_for_sampler("final", SaveOptions::default())
        .await?;
    let params = SamplingParams {
        max_tokens: Some(8),
        seed: Some(1),
        ..SamplingParams::default()
    };
    let sampler = service.create_sampling_client(&weights).await?;
    let said = sampler
        .sample(input, params, SampleOptions::default())
        .await?;
    service.close(FinishReason::Success, None).await?;
    let tokens = said.sequences.into_iter().flat_map(|s| s.tokens);
    Ok((losses, tokens.collect()))
}
