//! Teaches a model a preference with a loss that the server does not have: DPO on sequence
//! log-probabilities, held near the start by a KL penalty.
//!
//! `TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-… cargo run --example custom_loss`

#![expect(clippy::print_stdout, reason = "examples talk to their reader")]

use anyhow::Context;
use tinker_api::custom_loss::regularizers::{KlDivergence, ReferenceLogprobs};
use tinker_api::custom_loss::{ComposedLoss, Logprobs};
use tinker_api::{
    AdamParams, Datum, FinishReason, LoraConfig, LossFn, ModelInput, ServiceClient, TrainingClient,
};

/// The first is better than the second.
const PAIR: [[u32; 7]; 2] = [[11, 42, 7, 99, 23, 5, 64], [11, 42, 7, 31, 8, 77, 19]];
const BETA: f64 = 0.5;
const N_STEPS: usize = 10;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let service = examples::service_from_environment()?;
    let trainer = create(&service).await?;
    let data = PAIR.map(datum).into_iter().collect::<Result<Vec<_>, _>>()?;
    let reference = logprobs(&trainer, &data).await?;

    let adam = AdamParams {
        learning_rate: 1e-3,
        ..AdamParams::default()
    };
    for step in 0..N_STEPS {
        let loss = preference(&reference).into_loss()?;
        // Both are on their way before either is awaited.
        let pass = trainer.forward_backward_custom(data.clone(), loss);
        let update = trainer.optim_step(adam);
        let metrics = pass.await?.metrics;
        update.await?;
        let metric = |name: &str| metrics.get(name).copied().context("a metric is missing");
        println!(
            "step {step:2}  loss {:.4}  margin {:7.3}  kl {:.4}  |gradient| {:.3}",
            metric("loss:sum")?,
            metric("margin")?,
            metric("kl/value")?,
            metric("total/grad_norm")?,
        );
    }
    service.close(FinishReason::Success, None).await?;
    Ok(())
}

async fn create(service: &ServiceClient) -> anyhow::Result<TrainingClient> {
    let base_model = examples::first_model(service).await?;
    let trainer = service
        .create_lora_training_client(&base_model, LoraConfig::default())
        .await?;
    println!("training run {} on {base_model}", trainer.training_run_id());
    Ok(trainer)
}

/// Every token predicts the next one.
fn datum(tokens: [u32; 7]) -> anyhow::Result<Datum> {
    let input = ModelInput::from_tokens(tokens[..6].to_vec());
    Ok(Datum::cross_entropy(
        input,
        tokens[1..].to_vec(),
        vec![1.0; 6],
    )?)
}

/// What the model thinks of the data before it learns.
async fn logprobs(trainer: &TrainingClient, data: &[Datum]) -> anyhow::Result<Vec<Logprobs>> {
    let output = trainer.forward(data.to_vec(), LossFn::CrossEntropy).await?;
    let outputs = output.loss_fn_outputs.iter();
    outputs
        .map(|output| {
            let tensor = output.get("logprobs").context("no log-probabilities")?;
            let values = tensor.as_floats().context("no floats")?;
            Ok(Logprobs::new(values.to_vec(), tensor.shape().to_vec())?)
        })
        .collect()
}

/// `-ln sigmoid(beta * margin)` (Rafailov et al. 2023, eq. 7), where the margin is by how much more
/// the better sequence has gained than the worse one.
fn preference(reference: &[Logprobs]) -> ComposedLoss {
    let before: Vec<f64> = reference
        .iter()
        .map(|logprobs| logprobs.values().iter().copied().map(f64::from).sum())
        .collect();
    let dpo = ComposedLoss::new(move |tape, _data, logprobs| {
        let now = tape.stack(logprobs.iter().map(|l| l.sum()));
        let gained = now - tape.constant(&before);
        let margin = gained.gather(&[0]).sum() - gained.gather(&[1]).sum();
        tape.metric("margin", margin.value());
        Ok(-(margin * BETA).logsigmoid())
    });
    let reference = ReferenceLogprobs::Values(reference.to_vec());
    dpo.with("kl", 0.1, KlDivergence::to(reference))
}
