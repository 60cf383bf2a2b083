//! The suite against our server, each case with a server of its own.

use std::time::Duration;

use tinker_contract::suite::{checkpoints, futures, sampling, training, weights};
use tinker_contract::target::Target;

/// A case takes a second; one that takes this long waits for something that never comes.
const PATIENCE: Duration = Duration::from_secs(20);

macro_rules! cases {
    ($($group:ident: $($case:ident),+ $(,)?;)+) => {$($(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $case() {
            let target = Target::start().await;

            let case = $group::$case(&target);
            tokio::time::timeout(PATIENCE, case).await.expect("the case hangs");

            tokio::time::timeout(PATIENCE, target.stop()).await.expect("the server does not stop");
        }
    )+)+};
}

cases! {
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
