//! Times the client against a server that computes nothing; `cargo xtask bench client` runs it
//! beside the official SDK.
//!
//! `bench_client sample|forward_backward URL N`: queues N samples at once and awaits them in order,
//! or makes one pass of N data of 1,024 tokens, from plain token lists to the last byte sent, noted in
//! a step ledger. Prints one JSON object.
#![expect(clippy::print_stdout, reason = "the result of the program")]

use std::time::Instant;

use serde_json::{Value, json};
use tinker_api::{
    Datum, LoraConfig, LossFn, ModelInput, SampleOptions, SamplingParams, SamplingSource,
    ServiceClient,
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const PROMPT: u32 = 64;
const DATUM: u32 = 1024;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [task, url, n] = &arguments[..] else {
        return Err("usage: bench_client sample|forward_backward URL N".into());
    };
    let n = n.parse()?;
    // As a program has it that samples beside its own work: one thread for the client.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let dir = tempfile::tempdir()?;
    let mut builder = ServiceClient::builder(url).api_key("tml-benchmark".parse()?);
    if task == "forward_backward" {
        builder = builder.ledger(dir.path().join("ledger.jsonl"));
    }
    let service = builder.build()?;
    let mut report = runtime.block_on(async {
        match task.as_str() {
            "sample" => sample(&service, n).await,
            "forward_backward" => forward_backward(&service, n).await,
            other => Err(format!("no task `{other}`").into()),
        }
    })?;
    report["peak_bytes"] = json!(peak_bytes());
    report["name"] = json!(concat!("tinker-api ", env!("CARGO_PKG_VERSION")));
    println!("{report}");
    Ok(())
}

async fn sample(service: &ServiceClient, n: u32) -> Result<Value, Failure> {
    let source = SamplingSource::BaseModel("tinker/nano".into());
    let sampler = service.create_sampling_client(source).await?;
    let params = SamplingParams {
        max_tokens: Some(64),
        ..SamplingParams::default()
    };
    let (start, cpu_start) = (Instant::now(), cpu_seconds()?);
    let samples: Vec<_> = (0..n)
        .map(|i| {
            let prompt = ModelInput::from_tokens((i..i + PROMPT).collect());
            sampler.sample(prompt, params.clone(), SampleOptions::default())
        })
        .collect();
    let mut n_tokens = 0;
    for (i, sample) in (0..).zip(samples) {
        for sequence in sample.await?.sequences {
            // The server's first token is the number that the sample got when it was asked for.
            if sequence.tokens.first() != Some(&i) {
                return Err(format!("result {i} is of another sample: {sequence:?}").into());
            }
            n_tokens += sequence.tokens.len();
            if sequence
                .logprobs
                .is_none_or(|l| l.len() != sequence.tokens.len())
            {
                return Err("a token has no log-probability".into());
            }
        }
    }
    measured(start, cpu_start, n_tokens)
}

async fn forward_backward(service: &ServiceClient, n: u32) -> Result<Value, Failure> {
    let trainer = service
        .create_lora_training_client("tinker/nano", LoraConfig::default())
        .await?;
    // The lists are the caller's; everything made of them is the client's.
    let inputs: Vec<Vec<u32>> = (0..n).map(|i| (i..i + DATUM).collect()).collect();
    let targets: Vec<Vec<u32>> = (1..=n).map(|i| (i..i + DATUM).collect()).collect();
    let weights: Vec<Vec<f32>> = (0..n).map(|_| vec![1.0; DATUM as usize]).collect();
    let (start, cpu_start) = (Instant::now(), cpu_seconds()?);
    let lists = inputs.into_iter().zip(targets).zip(weights);
    let data = lists
        .map(|((tokens, targets), weights)| {
            Datum::cross_entropy(ModelInput::from_tokens(tokens), targets, weights)
        })
        .collect::<Result<_, _>>()?;
    let output = trainer.forward_backward(data, LossFn::CrossEntropy).await?;
    if !output.metrics.contains_key("loss:sum") {
        return Err("the pass has no loss".into());
    }
    measured(start, cpu_start, (n * DATUM) as usize)
}

fn measured(start: Instant, cpu_start: f64, n_tokens: usize) -> Result<Value, Failure> {
    Ok(json!({
        "seconds": start.elapsed().as_secs_f64(),
        "cpu_seconds": cpu_seconds()? - cpu_start,
        "n_tokens": n_tokens,
    }))
}

/// Processor time of all threads of this process so far, as Linux counts it.
fn cpu_seconds() -> Result<f64, Failure> {
    let mut nanoseconds = 0.0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        let first = text.split_whitespace().next().ok_or("empty schedstat")?;
        nanoseconds += first.parse::<f64>()?;
    }
    Ok(nanoseconds / 1e9)
}

/// Largest resident memory of this process; 0 where the system does not tell.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}
