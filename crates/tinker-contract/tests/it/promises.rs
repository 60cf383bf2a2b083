//! What training code counts on and cannot see go wrong, through the official Python SDK: one test for each promise.
//! A server that breaks one of them still answers every request, and spoils the run.

use std::collections::BTreeMap;

use tinker_contract::python;
use tinker_contract::target::Target;
use tokio::sync::OnceCell;

/// For each promise the empty text, or how it was broken; nothing without a Python.
type Verdicts = Option<BTreeMap<String, String>>;

/// Loading the SDK takes seconds, so one process checks all of them.
static VERDICTS: OnceCell<Verdicts> = OnceCell::const_new();

async fn all() -> Verdicts {
    let python = python::find()?;
    let target = Target::start().await;
    let arguments = [target.base_url.clone(), target.base_model.clone()];
    let (key, home) = (&target.api_key, target.home());
    let printed = python::run_script(&python, "sdk_promises.py", &arguments, key, home).await;
    target.stop().await;
    Some(serde_json::from_value(printed.summary).unwrap())
}

async fn check(promise: &str) {
    let Some(verdicts) = VERDICTS.get_or_init(all).await else {
        return;
    };
    assert_eq!(verdicts[promise], "", "{}", verdicts[promise]);
}

/// Makes a test of each promise, and one that none is left out.
macro_rules! promises {
    ($($name:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                check(stringify!($name)).await;
            }
        )*

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn every_promise_of_the_script_has_its_test() {
            let Some(verdicts) = VERDICTS.get_or_init(all).await else {
                return;
            };
            let mut named = vec![$(stringify!($name)),*];
            named.sort_unstable();
            assert_eq!(verdicts.keys().collect::<Vec<_>>(), named);
        }
    };
}

promises![
    a_sampler_snapshot_stays_what_it_was_while_training_goes_on,
    sampling_an_old_checkpoint_leaves_training_weights_alone,
    exports_name_every_target_module,
    prompt_logprobs_have_one_entry_per_token,
    an_unknown_base_model_is_refused,
    gradient_clipping_clips,
    losses_are_sums,
];
