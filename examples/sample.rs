//! Samples from a base model, or from the checkpoint given as the first argument.
//!
//! `TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-… cargo run --example sample`

#![expect(clippy::print_stdout, reason = "examples talk to their reader")]

use tinker_api::{
    FinishReason, ModelInput, SampleOptions, SamplingParams, SamplingSource, TinkerPath,
};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let service = examples::service_from_environment()?;
    let source = match std::env::args().nth(1) {
        Some(path) => SamplingSource::Checkpoint(path.parse::<TinkerPath>()?),
        None => SamplingSource::BaseModel(examples::first_model(&service).await?),
    };
    let sampler = service.create_sampling_client(source).await?;

    let params = SamplingParams {
        max_tokens: Some(16),
        seed: Some(1),
        ..SamplingParams::default()
    };
    let options = SampleOptions {
        num_samples: 3,
        prompt_logprobs: true,
        ..SampleOptions::default()
    };
    let prompt = ModelInput::from_tokens(vec![11, 42, 7]);
    let response = sampler.sample(prompt, params, options).await?;

    println!("prompt log-probabilities {:?}", response.prompt_logprobs);
    for sequence in &response.sequences {
        println!("{:?} ({})", sequence.tokens, sequence.stop_reason);
    }
    service.close(FinishReason::Success, None).await?;
    Ok(())
}
