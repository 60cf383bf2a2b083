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

tinker_contract::suite_cases!(cases);
