//! The suite against a server anywhere, such as a SkyRL one: with `TINKER_CONTRACT_BASE_URL`, and
//! `TINKER_CONTRACT_API_KEY` and `TINKER_CONTRACT_BASE_MODEL` unless it needs no key and the first
//! model that it lists will do. Without the address each case says that it was skipped.

use std::time::Duration;

use tinker_contract::suite::{checkpoints, futures, sampling, training, weights};
use tinker_contract::target::Target;

/// Models elsewhere are large and their servers busy.
const PATIENCE: Duration = Duration::from_secs(1800);

macro_rules! cases {
    ($($group:ident: $($case:ident),+ $(,)?;)+) => {$($(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $case() {
            let Some(target) = Target::of_environment().await else {
                println!("skipped: {} is not set", tinker_contract::target::BASE_URL);
                return;
            };

            let case = $group::$case(&target);

            tokio::time::timeout(PATIENCE, case).await.expect("the case hangs");
        }
    )+)+};
}

tinker_contract::suite_cases!(cases);
