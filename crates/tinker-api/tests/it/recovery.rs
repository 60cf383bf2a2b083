//! A run whose server lost its model goes on from a checkpoint, a bounded number of times.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use tinker_api::{
    AdamParams, Error, LoraConfig, Recovery, RecoveryEvent, RecoveryPolicy, Result, ServiceClient,
    Start,
};
use tinker_http::machine::Backoff;
use wiremock::matchers::{method, path_regex};
use wiremock::{Mock, MockServer, Request, ResponseTemplate};

use crate::support::*;

/// Checkpoints of every run, in no order.
const LISTED: [(&str, &str); 4] = [
    ("weights/0002", "2026-01-01T00:02:00Z"),
    ("weights/0001", "2026-01-01T00:01:00Z"),
    ("sampler_weights/0009", "2026-01-01T00:09:00Z"),
    ("weights/0003", "2026-01-01T00:03:00Z"),
];

fn listed(request: &Request) -> ResponseTemplate {
    let run = request.url.path().split('/').nth(4).unwrap_or_default();
    let run = run.replace("%3A", ":");
    let row = |(id, time): &(&str, &str)| {
        let kind = if id.starts_with("sampler") {
            "sampler"
        } else {
            "training"
        };
        json!({
            "checkpoint_id": id, "checkpoint_type": kind, "time": time, "public": false,
            "tinker_path": format!("tinker://{run}/{id}"),
        })
    };
    ok(json!({"checkpoints": LISTED.iter().map(row).collect::<Vec<_>>()}))
}

/// A server that lists checkpoints and, once a run has failed, knows it no more.
async fn forgetful_server() -> MockServer {
    let server = server().await;
    Mock::given(method("GET"))
        .and(path_regex("^/api/v1/training_runs/.*/checkpoints$"))
        .respond_with(listed)
        .with_priority(5)
        .mount(&server)
        .await;
    server
}

fn policy() -> RecoveryPolicy {
    RecoveryPolicy {
        max_restarts: 2,
        backoff: Backoff {
            base_delay: Duration::from_millis(1),
            max_delay: Duration::from_millis(1),
            jitter: 0.0,
        },
    }
}

type Log = Arc<Mutex<Vec<String>>>;

fn recovery(server: &MockServer) -> (Recovery, Log) {
    let log = Log::default();
    let told = Arc::clone(&log);
    let recovery = Recovery::new(service(server), policy()).observer(move |event| {
        let line = match event {
            RecoveryEvent::Lost { run, .. } => format!("lost {run}"),
            RecoveryEvent::Unusable { checkpoint, .. } => format!("unusable {checkpoint}"),
            RecoveryEvent::Restarted {
                checkpoint,
                n_in_a_row,
                ..
            } => {
                format!("restarted from {checkpoint}, {n_in_a_row} in a row")
            }
            RecoveryEvent::GaveUp { n_restarts } => format!("gave up after {n_restarts}"),
            other => format!("{other:?}"),
        };
        told.lock().unwrap().push(line);
    });
    (recovery, log)
}

async fn begin(service: ServiceClient) -> Result<tinker_api::TrainingClient> {
    service
        .create_lora_training_client("tinker/nano", LoraConfig::default())
        .await
}

async fn step(start: Start) -> Result<Option<String>> {
    start.trainer.optim_step(AdamParams::default()).await?;
    Ok(start.checkpoint.map(|path| path.to_string()))
}

/// The next step is refused as one of a model that is gone, which it then is.
async fn lose_the_model(server: &MockServer, n_times: u64) {
    lose_the_model_with(server, n_times, &refusal(404)).await;
}

/// The same, with these words.
async fn lose_the_model_with(server: &MockServer, n_times: u64, gone: &ResponseTemplate) {
    answer_with(server, "optim_step", Some(n_times), gone.clone()).await;
    // Asked for at the start, after the loss, and at the next start.
    let asked = AtomicU32::new(0);
    let gone = gone.clone();
    let describe = move |request: &Request| match asked.fetch_add(1, Ordering::Relaxed) % 2 {
        0 => ok(json!({
            "model_id": body(request)["model_id"], "model_data": {"model_name": "tinker/nano"},
        })),
        _ => gone.clone(),
    };
    answer_with(server, "get_info", None, describe).await;
}

#[tokio::test]
async fn a_model_is_lost_in_whatever_words() {
    let bare = ResponseTemplate::new(404).set_body_json(json!({"detail": "Not Found"}));
    for gone in [bare, ResponseTemplate::new(404), ResponseTemplate::new(410)] {
        let server = forgetful_server().await;
        lose_the_model_with(&server, 1, &gone).await;
        let (recovery, log) = recovery(&server);

        let from = recovery.run(begin, step).await.unwrap();

        assert_eq!(from.as_deref(), Some("tinker://S1:train:0/weights/0003"));
        assert_eq!(log.lock().unwrap()[0], "lost S1:train:0");
    }
}

#[tokio::test]
async fn a_lost_run_goes_on_from_the_newest_checkpoint_that_loads() {
    let server = forgetful_server().await;
    lose_the_model(&server, 1).await;
    let broken = ok(json!({"error": "its hash is wrong", "category": "user"}));
    let load = |request: &Request| {
        let path = body(request)["path"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let kind = if path.ends_with("0003") {
            "broken"
        } else {
            "model"
        };
        ok(json!({"request_id": format!("{kind}-{path}")}))
    };
    answer_with(&server, "load_weights", None, load).await;
    let retrieve = move |request: &Request| {
        let id = body(request)["request_id"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        if id.starts_with("broken") {
            broken.clone()
        } else {
            result(&id)
        }
    };
    answer_with(&server, "retrieve_future", None, retrieve).await;
    let (recovery, log) = recovery(&server);

    let from = recovery.run(begin, step).await.unwrap();

    assert_eq!(from.as_deref(), Some("tinker://S1:train:0/weights/0002"));
    assert_eq!(
        *log.lock().unwrap(),
        [
            "lost S1:train:0",
            "unusable tinker://S1:train:0/weights/0003",
            "restarted from tinker://S1:train:0/weights/0002, 1 in a row",
        ]
    );
    let loads = requests(&server, "load_weights").await;
    assert!(loads.iter().all(|load| body(load)["optimizer"] == true));
    let sessions = requests(&server, "create_session").await.len();
    assert_eq!(sessions, 3, "each attempt has a session of its own");
}

#[tokio::test]
async fn restarts_without_progress_are_bounded() {
    let server = forgetful_server().await;
    lose_the_model(&server, 99).await;
    let (recovery, log) = recovery(&server);

    let error = recovery.run(begin, step).await.unwrap_err();

    assert!(error.to_string().contains("404"), "{error}");
    assert_eq!(
        log.lock().unwrap().last().map(String::as_str),
        Some("gave up after 2")
    );
    assert_eq!(requests(&server, "load_weights").await.len(), 2);
}

#[tokio::test]
async fn other_errors_are_not_recovered_from() {
    let server = forgetful_server().await;
    // The model is there and says no.
    answer_with(&server, "optim_step", Some(1), refusal(404)).await;
    let run = json!({
        "training_run_id": "S1:train:0", "base_model": "tinker/nano", "model_owner": "me",
        "is_lora": true, "last_request_time": "2026-01-01T00:00:00Z",
    });
    Mock::given(path_regex("^/api/v1/training_runs/[^/]*$"))
        .respond_with(ok(run))
        .with_priority(5)
        .mount(&server)
        .await;
    let (recovery, log) = recovery(&server);

    let error = recovery.run(begin, step).await.unwrap_err();

    assert!(error.to_string().contains("404"), "{error}");
    assert!(log.lock().unwrap().is_empty());
    let refused: Result<()> = recovery
        .run(begin, async |_| {
            Err(Error::InvalidRequest("no data".into()))
        })
        .await;
    assert_eq!(refused.unwrap_err().to_string(), "no data");
}

#[tokio::test]
async fn a_run_without_a_checkpoint_is_lost() {
    let server = server().await;
    lose_the_model(&server, 1).await;
    let (recovery, log) = recovery(&server);

    recovery.run(begin, step).await.unwrap_err();

    assert_eq!(*log.lock().unwrap(), ["lost S1:train:0", "gave up after 0"]);
}
