//! Queues many samples at once, shows what is under way, and reads the results in the order asked.
//!
//! `TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-… cargo run --example many_samples`,
//! with the number of samples (100 if absent) as the first argument.

#![expect(clippy::print_stdout, reason = "examples talk to their reader")]

use std::time::Duration;

use tinker_api::{FinishReason, ModelInput, SampleOptions, SamplingParams, SamplingSource};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let n = std::env::args().nth(1).map_or(Ok(100), |n| n.parse())?;
    let service = examples::service_from_environment()?;
    let model = examples::first_model(&service).await?;
    let sampler = service
        .create_sampling_client(SamplingSource::BaseModel(model))
        .await?;

    // Queueing waits for nothing. The client sends as many at once as the server allows.
    let samples: Vec<_> = (0..n)
        .map(|seed| {
            let params = SamplingParams {
                max_tokens: Some(8),
                seed: Some(seed),
                ..SamplingParams::default()
            };
            let prompt = ModelInput::from_tokens(vec![11, 42, 7]);
            sampler.sample(prompt, params, SampleOptions::default())
        })
        .collect();

    // Another task may look at what the client is doing, for a progress line.
    let watch = tokio::spawn({
        let service = service.clone();
        async move {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let rows = service.in_flight();
                let oldest = rows.first().map(|row| row.age).unwrap_or_default();
                println!("{} under way, the oldest for {oldest:.1?}", rows.len());
            }
        }
    });

    // Results come in any order; each future brings its own.
    let mut n_tokens = 0;
    let mut total = 0.0;
    for sample in samples {
        for sequence in sample.await?.sequences {
            n_tokens += sequence.tokens.len();
            total += sequence.logprobs.iter().flatten().sum::<f32>();
        }
    }
    watch.abort();
    println!(
        "{n} samples, {n_tokens} tokens, mean log-probability {:.3}",
        f64::from(total) / n_tokens.max(1) as f64
    );

    // Another process samples from the same sampler by this text; it holds no key.
    let handle = sampler.get_sampler_handle().await?;
    let twin = service
        .create_sampling_client_from_handle(&handle.to_string().parse()?)
        .await?;
    let logprobs = twin
        .compute_logprobs(ModelInput::from_tokens(vec![11, 42, 7]))
        .await?;
    println!("by its handle: prompt log-probabilities {logprobs:?}");
    service.close(FinishReason::Success, None).await?;
    Ok(())
}
