//! Teaches a model one sentence, one operation at a time.
//!
//! `TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-… cargo run --example train_by_hand`

#![expect(clippy::print_stdout, reason = "examples talk to their reader")]

use anyhow::Context;
use tinker_api::{
    AdamParams, Datum, FinishReason, LoraConfig, LossFn, ModelInput, SampleOptions, SamplingParams,
    SaveOptions, ServiceClient,
};

/// Tokens to be learned; any ids of the model's vocabulary will do.
const SENTENCE: [u32; 12] = [11, 42, 7, 99, 23, 5, 64, 31, 8, 77, 19, 3];
const N_STEPS: usize = 20;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let service = examples::service_from_environment()?;
    let base_model = examples::first_model(&service).await?;
    let trainer = service
        .create_lora_training_client(&base_model, LoraConfig::default())
        .await?;
    println!("training run {} on {base_model}", trainer.training_run_id());

    let adam = AdamParams {
        learning_rate: 2e-3,
        ..AdamParams::default()
    };
    for step in 0..N_STEPS {
        // Both are on their way before either is awaited.
        let pass = trainer.forward_backward(vec![next_token_datum()?], LossFn::CrossEntropy);
        let update = trainer.optim_step(adam);
        let metrics = pass.await?.metrics;
        update.await?;
        let loss = metrics.get("loss:sum").context("no loss was reported")?;
        println!("step {step:2}  loss {:.4} per token", loss / 11.0);
    }

    let path = trainer.save_state("final", SaveOptions::default()).await?;
    println!("saved {path}");
    let weights = trainer
        .save_weights_for_sampler("final", SaveOptions::default())
        .await?;
    continue_sentence(&service, &weights).await?;
    service.close(FinishReason::Success, None).await?;
    Ok(())
}

/// Every token predicts the next one.
fn next_token_datum() -> anyhow::Result<Datum> {
    let (input, targets) = (&SENTENCE[..11], &SENTENCE[1..]);
    let input = ModelInput::from_tokens(input.to_vec());
    Ok(Datum::cross_entropy(
        input,
        targets.to_vec(),
        vec![1.0; 11],
    )?)
}

async fn continue_sentence(
    service: &ServiceClient,
    weights: &tinker_api::TinkerPath,
) -> anyhow::Result<()> {
    let sampler = service.create_sampling_client(weights).await?;
    let greedy = SamplingParams {
        max_tokens: Some(6),
        temperature: 0.0,
        ..SamplingParams::default()
    };
    let prompt = ModelInput::from_tokens(SENTENCE[..6].to_vec());
    let sample = sampler
        .sample(prompt, greedy, SampleOptions::default())
        .await?;
    println!(
        "after {:?} comes {:?}",
        &SENTENCE[..6],
        sample.sequences[0].tokens
    );
    println!("         learned {:?}", &SENTENCE[6..]);
    Ok(())
}
