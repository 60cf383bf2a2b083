//! The suite against our server, each case with a server of its own.

use std::time::Duration;

use tinker_contract::suite::{checkpoints, futures, sampling, training, weights};
use tinker_contract::target::Target;

use crate::plain_http::plain_http;

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

/// Sends every recorded request whose endpoint our server has: none of them may be refused for its
/// form or break it. The things that they name do not exist there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_recorded_request_is_understood() {
    let target = Target::start().await;
    let http = plain_http();
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../fixtures/wire/recorded.jsonl"
    );
    let (mut n_sent, mut refused) = (0, Vec::new());
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = |name: &str| record[name].as_str().unwrap_or_default();
        let body = &record["request"]["json"];
        // Polls of futures that do not exist, and what the recording keeps in protobuf, are
        // cases of their own.
        if body.is_null() || record["path"] == tinker_types::RETRIEVE_FUTURE {
            continue;
        }
        let answer = http
            .request(
                text("method").parse().unwrap(),
                format!("{}{}", target.base_url, text("path")),
            )
            .header("x-api-key", &target.api_key)
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
            .await
            .unwrap();
        let status = answer.status().as_u16();
        let said = answer.text().await.unwrap();
        n_sent += 1;
        let is_of_form = [
            "missing field",
            "invalid type",
            "unknown variant",
            "expected",
        ]
        .iter()
        .any(|word| said.contains(word));
        if status >= 500 || is_of_form {
            refused.push(format!(
                "{} {}: {status} {said}",
                text("method"),
                text("path")
            ));
        }
    }
    tokio::time::timeout(PATIENCE, target.stop())
        .await
        .expect("the server does not stop");

    assert!(n_sent > 50, "{n_sent}");
    assert_eq!(refused, Vec::<String>::new());
}
