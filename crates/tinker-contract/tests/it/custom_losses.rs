//! Losses computed by the client: our run is that of the official SDK.

use std::path::Path;

use serde_json::Value;
use tinker_api::custom_loss::{CustomLossError, Tape, Var, differentiate};
use tinker_api::{AdamParams, Datum, LoraConfig, ModelInput, SaveOptions, TensorData, TinkerPath};
use tinker_contract::python;
use tinker_contract::target::{Target, checkpoint_tensors};

/// As in `sdk_custom_loss.py`.
const SEQUENCES: [&[u32]; 4] = [
    &[5, 9, 2, 7, 7, 1],
    &[5, 9, 4, 4],
    &[3, 8, 6, 1, 2],
    &[3, 8, 9, 9, 9, 9, 2],
];

/// The version of PyTorch that `stand_in/torch.py` claims to be.
const STAND_IN: &str = "stand-in";

type Result<'t> = std::result::Result<Var<'t>, CustomLossError>;
type Loss = for<'t> fn(&'t Tape, &[Datum], &[Var<'t>]) -> Result<'t>;

fn squares<'t>(tape: &'t Tape, data: &[Datum], logprobs: &[Var<'t>]) -> Result<'t> {
    tape.metric("n_data", data.len() as f64);
    Ok(tape.stack(logprobs.iter().map(|l| l.square().sum())).sum())
}

fn preferences<'t>(tape: &'t Tape, _: &[Datum], logprobs: &[Var<'t>]) -> Result<'t> {
    let pairs = logprobs.chunks_exact(2);
    let margins = tape.stack(pairs.map(|pair| pair[0].sum() - pair[1].sum())) * 0.5;
    tape.metric("margin", margins.mean().value());
    Ok(-margins.logsigmoid().mean())
}

/// Without weights, as the SDK's: the forward pass gets zeros.
fn datum(tokens: &[u32]) -> Datum {
    let (input, targets) = (&tokens[..tokens.len() - 1], &tokens[1..]);
    let targets = targets.iter().map(|&token| i64::from(token)).collect();
    Datum::from_wire(ModelInput::from_tokens(input.to_vec()), Default::default())
        .with_input("target_tokens", TensorData::ints(targets))
}

/// Trains as the script does: the metrics of each step and the checkpoint.
async fn train(target: &Target, loss: Loss) -> (Vec<Value>, TinkerPath) {
    let lora = LoraConfig {
        rank: 4,
        seed: Some(7),
        ..LoraConfig::default()
    };
    let service = target.service();
    let trainer = service
        .create_lora_training_client(&target.base_model, lora)
        .await
        .unwrap();
    let adam = AdamParams {
        learning_rate: 5e-3,
        ..AdamParams::default()
    };
    let mut passes = Vec::new();
    for _ in 0..3 {
        let data = SEQUENCES.iter().map(|tokens| datum(tokens)).collect();
        passes.push(trainer.forward_backward_custom(data, differentiate(loss)));
        drop(trainer.optim_step(adam));
    }
    let path = trainer.save_state("ours", SaveOptions::default()).await;
    let mut metrics = Vec::new();
    for pass in passes {
        metrics.push(serde_json::to_value(pass.await.unwrap().metrics).unwrap());
    }
    (metrics, path.unwrap())
}

fn assert_close(ours: &Value, theirs: &Value) {
    let (ours, theirs) = (ours.as_object().unwrap(), theirs.as_object().unwrap());
    assert!(ours.contains_key("surrogate_loss:sum"));
    assert!(ours.keys().eq(theirs.keys()), "{ours:?} is not {theirs:?}");
    for (name, ours) in ours {
        let (ours, theirs) = (ours.as_f64().unwrap(), theirs[name].as_f64().unwrap());
        // The SDK's loss is made of 32-bit floats.
        let error = (ours - theirs).abs() / theirs.abs().max(1.0);
        assert!(error < 1e-5, "{name}: {ours} is not {theirs}");
    }
}

/// What the script trained: with PyTorch, or with what stands in for it where there is none.
async fn train_with_sdk(python: &Path, target: &Target, more: &[&str]) -> Value {
    let mut arguments = vec![target.base_url.clone(), target.base_model.clone()];
    arguments.extend(more.iter().map(ToString::to_string));
    let (script, key) = ("sdk_custom_loss.py", &target.api_key);
    let printed = python::run_script(python, script, &arguments, key, target.home());
    printed.await.summary
}

fn assert_steps_close(ours: &[Value], theirs: &Value) {
    let theirs = theirs["steps"].as_array().unwrap();
    assert_eq!((ours.len(), theirs.len()), (3, 3));
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_close(ours, theirs);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn custom_losses_train_as_with_the_official_sdk() {
    let Some(python) = python::find() else {
        return;
    };
    let target = Target::start().await;
    let mut of_sdk = vec![train_with_sdk(&python, &target, &[]).await];
    if of_sdk[0]["torch"] != STAND_IN {
        // Where there is PyTorch, what stands in for it elsewhere is tried too.
        of_sdk.push(train_with_sdk(&python, &target, &["--stand-in"]).await);
        assert_eq!(of_sdk[1]["torch"], STAND_IN);
    }

    let losses: [(&str, Loss); 2] = [("squares", squares), ("preferences", preferences)];
    for (name, loss) in losses {
        let (steps, path) = train(&target, loss).await;
        for theirs in of_sdk.iter().map(|of_sdk| &of_sdk[name]) {
            assert_steps_close(&steps, theirs);
            if name == "squares" {
                // Twice a 32-bit float is exact, so both sent the same bytes.
                let path_of_theirs = theirs["path"].as_str().unwrap().parse().unwrap();
                let ours = checkpoint_tensors(target.home(), &path);
                assert!(ours == checkpoint_tensors(target.home(), &path_of_theirs));
            }
        }
    }
    target.stop().await;
}
