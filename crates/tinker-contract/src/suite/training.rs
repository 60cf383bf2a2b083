//! Passes and steps.

use tinker_api::{Datum, Error, Loss, LossFn, ModelInput, TensorData};
use tinker_types::loss_input;

use super::{CE, adam, assert_close, batch, datum, logprobs, loss, score, step, tokens, trainer};
use crate::target::Target;

/// Training on one batch brings its loss down.
pub async fn losses_fall(target: &Target) {
    let trainer = trainer(target, 1).await;

    let mut losses = Vec::new();
    for _ in 0..20 {
        losses.push(step(&trainer, batch(1)).await);
    }

    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    assert!(losses[19] < 0.5 * losses[0], "{losses:?}");
}

/// The optimizer says how large the gradient was.
pub async fn steps_have_metrics(target: &Target) {
    let trainer = trainer(target, 1).await;

    trainer.forward_backward(batch(1), CE).await.unwrap();
    let metrics = trainer.optim_step(adam()).await.unwrap().metrics.unwrap();

    assert!(
        metrics.values().all(|value| value.is_finite()) && !metrics.is_empty(),
        "{metrics:?}"
    );
}

/// The loss is the weighted sum of the log-probabilities, and each datum has its own.
pub async fn the_loss_is_a_sum_over_targets(target: &Target) {
    let trainer = trainer(target, 1).await;
    let all = tokens(5, 7);
    let weights = vec![0.0, 1.0, 0.5, 0.0, 2.0, 1.0];
    let input = ModelInput::from_tokens(all[..6].to_vec());
    let datum = Datum::cross_entropy(input, all[1..].to_vec(), weights.clone()).unwrap();

    let output = trainer.forward(vec![datum], CE).await.unwrap();

    let row = &logprobs(&output)[0];
    assert!(row.iter().all(|&logprob| logprob <= 0.0), "{row:?}");
    let expected: f32 = row.iter().zip(&weights).map(|(l, w)| -l * w).sum();
    assert_close(&[loss(&output) as f32], &[expected], 1e-4);
}

/// Operations run in the order of the calls however their results are awaited.
pub async fn results_may_be_awaited_in_reverse(target: &Target) {
    let (forwards, backwards) = (trainer(target, 3).await, trainer(target, 3).await);
    let mut in_order = Vec::new();
    for i in 0..15 {
        in_order.push(step(&forwards, batch(i)).await);
    }

    let mut calls = Vec::new();
    for i in 0..15 {
        let pass = backwards.forward_backward(batch(i), CE);
        calls.push((pass, backwards.optim_step(adam())));
    }
    let mut reversed = Vec::new();
    for (pass, step) in calls.into_iter().rev() {
        step.await.unwrap();
        reversed.push(loss(&pass.await.unwrap()));
    }

    reversed.reverse();
    assert_eq!(reversed, in_order);
}

/// Data of several requests gives what each datum gives alone.
pub async fn chunked_data_is_scored_as_alone(target: &Target) {
    let trainer = trainer(target, 1).await;
    let data: Vec<Datum> = (0..2100).map(|i| datum(i, 2)).collect();

    let output = trainer.forward_backward(data.clone(), CE).await.unwrap();

    let rows = logprobs(&output);
    assert_eq!(rows.len(), 2100);
    let total: f64 = rows.iter().flatten().map(|&l| -f64::from(l)).sum();
    assert!(
        (loss(&output) / total - 1.0).abs() < 1e-5,
        "{} against {total}",
        loss(&output)
    );
    for i in [0, 1, 1023, 1024, 2047, 2048, 2099] {
        let alone = score(&trainer, vec![data[i].clone()]).await;
        assert_close(&alone[0], &rows[i], 1e-5);
    }
    // All three requests left their gradient.
    trainer.optim_step(adam()).await.unwrap();
    let after = loss(&trainer.forward(data, CE).await.unwrap());
    assert!(after < loss(&output), "{after}");
}

/// Forward alone changes nothing.
pub async fn forward_leaves_the_gradient_alone(target: &Target) {
    let (plain, curious) = (trainer(target, 2).await, trainer(target, 2).await);

    step(&plain, batch(1)).await;
    curious.forward_backward(batch(1), CE).await.unwrap();
    curious.forward(batch(2), CE).await.unwrap();
    curious.optim_step(adam()).await.unwrap();

    assert_eq!(
        score(&curious, batch(3)).await,
        score(&plain, batch(3)).await
    );
}

/// Passes add to the gradient until a step clears it.
pub async fn gradients_accumulate(target: &Target) {
    let (whole, parts) = (trainer(target, 2).await, trainer(target, 2).await);

    step(&whole, batch(1)).await;
    for datum in batch(1) {
        parts.forward_backward(vec![datum], CE).await.unwrap();
    }
    parts.optim_step(adam()).await.unwrap();

    let rows = score(&whole, batch(1))
        .await
        .into_iter()
        .zip(score(&parts, batch(1)).await);
    for (a, b) in rows {
        assert_close(&a, &b, 1e-5);
    }
}

/// A run does not notice another one that trains at the same time.
pub async fn runs_do_not_notice_each_other(target: &Target) {
    let alone = trainer(target, 4).await;
    let mut losses = Vec::new();
    for i in 0..8 {
        losses.push(step(&alone, batch(i)).await);
    }

    let (beside, noisy) = (trainer(target, 4).await, trainer(target, 5).await);
    let mut noise = Vec::new();
    for i in 0..8 {
        noise.push(noisy.forward_backward(batch(100 + i), CE));
        noise.push(noisy.forward_backward(batch(200 + i), CE));
        assert_eq!(step(&beside, batch(i)).await, losses[i as usize]);
    }

    for pass in noise {
        pass.await.unwrap();
    }
}

/// The policy losses at the sampler's own log-probabilities, where their ratio is one.
pub async fn policy_losses_agree_with_their_formulas(target: &Target) {
    let trainer = trainer(target, 1).await;
    let all = tokens(9, 13);
    let (inputs, targets) = (all[..12].to_vec(), all[1..].to_vec());
    let plain = datum(9, 12);
    let row = score(&trainer, vec![plain]).await.remove(0);
    let advantages: Vec<f32> = (0..12_i16).map(|i| f32::from(i - 5) / 4.0).collect();
    let sum = |terms: Vec<f32>| -terms.iter().sum::<f32>();
    let plain_sum = sum(advantages.clone());
    let weighted_sum = sum(row.iter().zip(&advantages).map(|(l, a)| l * a).collect());
    for (function, expected) in [
        (LossFn::ImportanceSampling, plain_sum),
        (LossFn::Ppo, plain_sum),
        (LossFn::Cispo, weighted_sum),
        (LossFn::Dro, weighted_sum),
    ] {
        let input = ModelInput::from_tokens(inputs.clone());
        let datum = Datum::policy_gradient(input, targets.clone(), row.clone(), advantages.clone())
            .unwrap();
        let config = Loss::from(function.clone());
        let config = if function == LossFn::Dro {
            config.with("beta", 0.05)
        } else {
            config
        };

        let output = trainer.forward_backward(vec![datum], config).await.unwrap();

        assert_close(&[loss(&output) as f32], &[expected], 2e-4);
        assert_close(&logprobs(&output)[0], &row, 1e-5);
    }
}

/// Bad data fails as the user's, says what is wrong, and leaves the run as it was.
pub async fn bad_data_is_refused_and_the_run_goes_on(target: &Target) {
    let (trainer, twin) = (trainer(target, 6).await, trainer(target, 6).await);
    let cross_entropy = |tokens: Vec<u32>, weights: Vec<f32>| {
        let targets = tokens.clone();
        Datum::cross_entropy(ModelInput::from_tokens(tokens), targets, weights).unwrap()
    };
    let mismatched = Datum::from_wire(
        ModelInput::from_tokens(vec![5, 6, 7]),
        [
            (
                loss_input::TARGET_TOKENS.to_owned(),
                TensorData::ints(vec![6, 7]),
            ),
            (
                loss_input::WEIGHTS.to_owned(),
                TensorData::floats(vec![1.0; 2]),
            ),
        ]
        .into(),
    );
    for (data, expected) in [
        (cross_entropy(vec![5, 4000], vec![1.0; 2]), "4000"),
        (cross_entropy(vec![5, 6], vec![1.0, f32::NAN]), "weights"),
        (cross_entropy(vec![5; 600], vec![1.0; 600]), "512"),
        (mismatched, "target_tokens"),
    ] {
        let error = trainer.forward_backward(vec![data], CE).await.unwrap_err();

        assert!(error.is_user_error(), "{error}");
        assert!(
            error.to_string().contains(expected),
            "{error} does not say {expected}"
        );
    }
    assert_eq!(step(&trainer, batch(1)).await, step(&twin, batch(1)).await);
    assert_eq!(
        score(&trainer, batch(1)).await,
        score(&twin, batch(1)).await
    );
}

/// A base model that is not there is named, beside those that are.
pub async fn an_unknown_model_is_named(target: &Target) {
    let lora = tinker_api::LoraConfig::default();

    let error = target
        .service()
        .create_lora_training_client("no/such", lora)
        .await
        .unwrap_err();

    assert!(error.is_user_error(), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("no/such") && text.contains(&target.base_model),
        "{text}"
    );
    assert!(!matches!(error, Error::Protocol(_)));
}
