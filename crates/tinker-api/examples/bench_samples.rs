//! Times samples of one token on a real server; `cargo xtask bench server` runs it after the official SDK.
//!
//! `bench_samples URL MODEL N`, the key in `TINKER_API_KEY`: makes an adapter of rank 16, asks for 110
//! samples one after another and then for N at once. No prompt, of 16 tokens, comes twice. Prints one
//! JSON object.
#![expect(clippy::print_stdout, reason = "the result of the program")]

use std::time::Instant;

use serde_json::json;
use tinker_api::{
    LoraConfig, ModelInput, SampleOptions, SamplerKind, SamplingClient, SamplingParams,
    ServiceClient, Stop,
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const PROMPT: u32 = 16;
/// Tokens of the model that the benchmark makes.
const VOCABULARY: u32 = 4096;
const FIRST: u32 = 10;
const SINGLE: u32 = 100;

#[expect(
    clippy::disallowed_methods,
    reason = "the benchmark hands the key over as to any program"
)]
#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, model, n] = &arguments[..] else {
        return Err("usage: bench_samples URL MODEL N".into());
    };
    let n: u32 = n.parse()?;
    let key = std::env::var("TINKER_API_KEY")?;
    let service = ServiceClient::builder(url).api_key(key.parse()?).build()?;
    let adapter = LoraConfig {
        rank: 16,
        ..LoraConfig::default()
    };
    let trainer = service.create_lora_training_client(model, adapter).await?;
    let sampler = trainer
        .save_weights_and_get_sampling_client(SamplerKind::Snapshot)
        .await?;
    for number in 0..FIRST {
        sample(&sampler, number).await?;
    }
    let mut single = Vec::new();
    for number in FIRST..FIRST + SINGLE {
        let start = Instant::now();
        sample(&sampler, number).await?;
        single.push(start.elapsed().as_secs_f64());
    }
    single.sort_by(f64::total_cmp);
    let start = Instant::now();
    let asked: Vec<_> = (0..n).map(|i| sample(&sampler, 1000 + i)).collect();
    for sampled in asked {
        sampled.await?;
    }
    let report = json!({
        "one_sample": single.get(single.len() / 2),
        "samples_per_second": f64::from(n) / start.elapsed().as_secs_f64(),
    });
    println!("{report}");
    Ok(())
}

/// Asks for one token after a prompt that is only this number's. The request is made by the call.
fn sample(
    sampler: &SamplingClient,
    number: u32,
) -> impl Future<Output = Result<(), Failure>> + use<> {
    // The factor is odd, so up to 4,096 prompts differ in their first token: nothing of one is cached.
    let prompt =
        (0..PROMPT).map(|i| number.wrapping_mul(2_654_435_761).rotate_left(i) % VOCABULARY);
    let params = SamplingParams {
        max_tokens: Some(1),
        stop: Some(Stop::Tokens(Vec::new())),
        ..SamplingParams::default()
    };
    let prompt = ModelInput::from_tokens(prompt.collect());
    let asked = sampler.sample(prompt, params, SampleOptions::default());
    async move {
        let lengths: Vec<_> = asked
            .await?
            .sequences
            .iter()
            .map(|s| s.tokens.len())
            .collect();
        if lengths != [1] {
            return Err(format!("continuations of {lengths:?} tokens, not of one").into());
        }
        Ok(())
    }
}
