//! A training run that can be killed at any moment: started again, it goes on where it was.
//!
//! `TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-… cargo run --example resume`, with the
//! path of the ledger (`resume.ledger` if absent) and the number of steps as arguments. Stop it with
//! Ctrl-C, or harder, and start it again: finished steps are read from the ledger in no time, those
//! that were under way are not applied twice. A finished run only shows its results again.

#![expect(clippy::print_stdout, reason = "examples talk to their reader")]

use anyhow::Context;
use tinker_api::{
    AdamParams, Datum, FinishReason, LoraConfig, LossFn, ModelInput, Recovery, RecoveryEvent,
    RecoveryPolicy, Result, SaveOptions, Start, TinkerPath,
};

/// A checkpoint is saved every so many steps.
const SAVE_EVERY: u32 = 10;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let ledger = arguments.next().unwrap_or_else(|| "resume.ledger".into());
    let n_steps = arguments.next().map_or(Ok(40), |n| n.parse())?;
    // The ledger is all that is different from a program that cannot be resumed.
    let service = examples::builder_from_environment()?
        .ledger(&ledger)
        .build()?;
    let base_model = examples::first_model(&service).await?;

    // A restart of the program is the ledger's business; the loss of the model on the server, by the
    // end of its session for example, is that of the recovery.
    let recovery = Recovery::new(service.clone(), RecoveryPolicy::default()).observer(|event| {
        if let RecoveryEvent::Restarted { checkpoint, .. } = event {
            println!("the server lost the model; going on from {checkpoint}");
        }
    });
    let path = recovery
        .run(
            // The seed is part of the program: it must do the same every time.
            |service| async move {
                let lora = LoraConfig {
                    seed: Some(1),
                    ..LoraConfig::default()
                };
                service.create_lora_training_client(base_model, lora).await
            },
            |start| train(start, n_steps),
        )
        .await
        .with_context(|| format!("start the program again to go on from {ledger}"))?;
    println!("saved {path}");
    service.close(FinishReason::Success, None).await?;
    Ok(())
}

async fn train(start: Start, n_steps: u32) -> Result<TinkerPath> {
    let trainer = &start.trainer;
    let adam = AdamParams {
        learning_rate: 2e-3,
        ..AdamParams::default()
    };
    for step in first_step(&start)..n_steps {
        let pass = trainer.forward_backward(vec![datum(step)?], LossFn::CrossEntropy);
        let update = trainer.optim_step(adam);
        let metrics = pass.await?.metrics;
        update.await?;
        let loss = metrics.get("loss:sum").copied().unwrap_or(f64::NAN);
        println!("step {step:3}  loss {loss:.4}");
        if (step + 1) % SAVE_EVERY == 0 {
            let name = format!("{}", step + 1);
            trainer.save_state(name, SaveOptions::default()).await?;
        }
    }
    trainer.save_state("final", SaveOptions::default()).await
}

/// The step that follows the checkpoint, whose name is the number of steps before it.
fn first_step(start: &Start) -> u32 {
    let checkpoint = start.checkpoint.as_ref();
    checkpoint
        .and_then(|path| path.checkpoint.name().parse().ok())
        .unwrap_or(0)
}

/// Data that follow from the step: another process makes the same.
fn datum(step: u32) -> Result<Datum> {
    let tokens: Vec<u32> = (0..13).map(|i| 3 + (step * 7 + i * 5) % 200).collect();
    let input = ModelInput::from_tokens(tokens[..12].to_vec());
    Ok(Datum::cross_entropy(
        input,
        tokens[1..].to_vec(),
        vec![1.0; 12],
    )?)
}
