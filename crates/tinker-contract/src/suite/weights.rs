//! Saving and loading.

use tinker_api::{Error, SaveOptions, StateOptions, TinkerPath, TrainingClient};

use super::{batch, score, step, trainer};
use crate::target::Target;

/// Losses of three more steps.
async fn three_steps(trainer: &TrainingClient) -> Vec<f64> {
    let mut losses = Vec::new();
    for i in 50..53 {
        losses.push(step(trainer, batch(i)).await);
    }
    losses
}

async fn saved_after_five(target: &Target) -> (TrainingClient, TinkerPath) {
    let trainer = trainer(target, 7).await;
    for i in 0..5 {
        step(&trainer, batch(i)).await;
    }
    let path = trainer
        .save_state("five", SaveOptions::default())
        .await
        .unwrap();
    (trainer, path)
}

/// A run made from a state with its optimizer continues bit for bit.
pub async fn state_with_optimizer_continues_bit_for_bit(target: &Target) {
    let (trainer, path) = saved_after_five(target).await;
    assert_eq!(
        path.to_string(),
        format!("tinker://{}/weights/five", trainer.training_run_id())
    );
    let uninterrupted = three_steps(&trainer).await;

    let restored = target
        .service()
        .create_training_client_from_state_with_optimizer(&path, StateOptions::default())
        .await
        .unwrap();

    assert_ne!(restored.training_run_id(), trainer.training_run_id());
    assert_eq!(restored.info().lora_rank, Some(4));
    assert_eq!(three_steps(&restored).await, uninterrupted);
    assert_eq!(
        score(&restored, batch(1)).await,
        score(&trainer, batch(1)).await
    );
}

/// A run made from weights alone starts a new optimizer.
pub async fn weights_alone_start_a_new_optimizer(target: &Target) {
    let (trainer, path) = saved_after_five(target).await;
    let before = score(&trainer, batch(1)).await;
    let uninterrupted = three_steps(&trainer).await;

    let options = StateOptions::default();
    let restored = target
        .service()
        .create_training_client_from_state(&path, options)
        .await
        .unwrap();

    assert_eq!(score(&restored, batch(1)).await, before);
    let restarted = three_steps(&restored).await;
    assert_eq!(restarted[0], uninterrupted[0]);
    assert_ne!(restarted[1..], uninterrupted[1..]);
}

/// A gradient that waits for its step is part of the state.
pub async fn saving_between_a_pass_and_its_step_changes_nothing(target: &Target) {
    let (plain, saving) = (trainer(target, 8).await, trainer(target, 8).await);

    step(&plain, batch(1)).await;
    saving.forward_backward(batch(1), super::CE).await.unwrap();
    saving
        .save_state("between", SaveOptions::default())
        .await
        .unwrap();
    saving.optim_step(super::adam()).await.unwrap();

    assert_eq!(
        score(&saving, batch(1)).await,
        score(&plain, batch(1)).await
    );
}

/// A name is taken once, unless it is to be overwritten.
pub async fn names_are_taken_once(target: &Target) {
    let (trainer, path) = saved_after_five(target).await;

    let error = trainer
        .save_state("five", SaveOptions::default())
        .await
        .unwrap_err();
    assert!(
        error.is_user_error() && error.to_string().contains("five"),
        "{error}"
    );
    step(&trainer, batch(9)).await;
    let overwrite = SaveOptions {
        overwrite: true,
        ..SaveOptions::default()
    };
    assert_eq!(trainer.save_state("five", overwrite).await.unwrap(), path);

    let options = StateOptions::default();
    let restored = target
        .service()
        .create_training_client_from_state(&path, options)
        .await
        .unwrap();
    assert_eq!(
        score(&restored, batch(1)).await,
        score(&trainer, batch(1)).await
    );
}

/// A checkpoint that is not there is named.
pub async fn an_unknown_checkpoint_is_named(target: &Target) {
    let (trainer, _) = saved_after_five(target).await;
    let run = trainer.training_run_id();
    for path in [
        format!("tinker://{run}/weights/six"),
        "tinker://nobody:train:0/weights/five".into(),
    ] {
        let path: TinkerPath = path.parse().unwrap();

        let error = target
            .service()
            .create_training_client_from_state(&path, StateOptions::default())
            .await
            .unwrap_err();

        assert!(
            error.is_user_error() && error.to_string().contains(&path.to_string()),
            "{error}"
        );
        assert!(!matches!(error, Error::WrongCheckpointKind { .. }));
    }
}
