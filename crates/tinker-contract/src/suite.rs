//! What every server must do for our client, one function each, by endpoint group.

pub mod checkpoints;
pub mod futures;
pub mod sampling;
pub mod training;
pub mod weights;

use tinker_api::{
    AdamParams, Datum, ForwardBackwardOutput, LoraConfig, LossFn, ModelInput, TrainingClient,
};

use crate::target::Target;

/// A run of rank 4 whose initial weights follow from `seed`.
pub(crate) async fn trainer(target: &Target, seed: u64) -> TrainingClient {
    let lora = LoraConfig {
        rank: 4,
        seed: Some(seed),
        ..LoraConfig::default()
    };
    target
        .service()
        .create_lora_training_client(&target.base_model, lora)
        .await
        .expect("a training run")
}

/// `n` tokens that follow from `seed`, none of them special.
pub fn tokens(seed: u32, n: usize) -> Vec<u32> {
    // A linear congruential generator; its high bits are random enough for test data.
    let step = |x: u32| x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    let states = std::iter::successors(Some(step(seed)), |&x| Some(step(x)));
    states.take(n).map(|x| 3 + (x >> 16) % 256).collect()
}

/// Next-token prediction over `n + 1` tokens that follow from `seed`, every weight 1.
#[must_use]
pub fn datum(seed: u32, n: usize) -> Datum {
    let all = tokens(seed, n + 1);
    let input = ModelInput::from_tokens(all[..n].to_vec());
    Datum::cross_entropy(input, all[1..].to_vec(), vec![1.0; n]).expect("equal lengths")
}

/// Data of several lengths.
#[must_use]
pub fn batch(seed: u32) -> Vec<Datum> {
    [3, 9, 17]
        .iter()
        .map(|&n| datum(seed.wrapping_add(n), n as usize))
        .collect()
}

pub(crate) const CE: LossFn = LossFn::CrossEntropy;

pub(crate) fn adam() -> AdamParams {
    AdamParams {
        learning_rate: 5e-3,
        ..AdamParams::default()
    }
}

/// One pass and one step; the loss before the step.
pub(crate) async fn step(trainer: &TrainingClient, data: Vec<Datum>) -> f64 {
    let pass = trainer.forward_backward(data, CE);
    let step = trainer.optim_step(adam());
    let loss = loss(&pass.await.expect("a pass"));
    step.await.expect("a step");
    loss
}

pub(crate) fn loss(output: &ForwardBackwardOutput) -> f64 {
    output.metrics["loss:sum"]
}

/// The log-probabilities of every datum.
pub(crate) fn logprobs(output: &ForwardBackwardOutput) -> Vec<Vec<f32>> {
    let rows = output.loss_fn_outputs.iter();
    rows.map(|row| row["logprobs"].as_floats().expect("floats").to_vec())
        .collect()
}

/// What the run says of `data` now.
pub(crate) async fn score(trainer: &TrainingClient, data: Vec<Datum>) -> Vec<Vec<f32>> {
    logprobs(&trainer.forward(data, CE).await.expect("a forward pass"))
}

/// Asserts that numbers agree to a tolerance.
#[track_caller]
pub(crate) fn assert_close(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!((x - y).abs() <= tolerance, "value {i}: {x} against {y}");
    }
}

/// Names every case of the suite to a macro that makes a test of each: `group: case, …;`.
#[macro_export]
macro_rules! suite_cases {
    ($make:ident) => {
        $make! {
            training:
                losses_fall,
                steps_have_metrics,
                the_loss_is_a_sum_over_targets,
                results_may_be_awaited_in_reverse,
                chunked_data_is_scored_as_alone,
                forward_leaves_the_gradient_alone,
                gradients_accumulate,
                runs_do_not_notice_each_other,
                policy_losses_agree_with_their_formulas,
                bad_data_is_refused_and_the_run_goes_on,
                an_unknown_model_is_named;
            weights:
                state_with_optimizer_continues_bit_for_bit,
                weights_alone_start_a_new_optimizer,
                saving_between_a_pass_and_its_step_changes_nothing,
                names_are_taken_once,
                an_unknown_checkpoint_is_named;
            sampling:
                sampled_log_probabilities_can_be_recomputed,
                samplers_have_the_trained_weights,
                samplers_are_isolated,
                snapshots_do_not_follow_their_run,
                seeds_repeat_and_samples_differ,
                greedy_takes_the_most_likely,
                stops_end_a_continuation,
                tables_of_the_prompt_have_a_row_for_each_token,
                unsupported_extras_are_refused_by_name,
                bad_prompts_are_refused,
                many_samples_at_once;
            checkpoints:
                runs_are_listed_page_by_page,
                checkpoints_are_listed_and_deleted,
                an_unknown_run_is_named,
                base_models_are_listed;
            futures:
                gaps_are_held,
                repetitions_are_recognised,
                a_reused_number_is_refused,
                results_stay,
                unknown_futures_are_refused,
                a_wrong_key_is_refused;
        }
    };
}
