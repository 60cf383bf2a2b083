//! A limit on what the server keeps: refused before anything is written, and said how to go on.

use std::path::Path;

use serde_json::json;
use tinker_server::{AppOptions, Limits};

use crate::harness::{Harness, create_body, optim, options};
use crate::losses::upload as loss_body;

fn limited(home: &Path, max_disk_bytes: u64) -> Harness {
    Harness::with(AppOptions {
        limits: Limits {
            max_disk_bytes: Some(max_disk_bytes),
            ..options(home).limits
        },
        ..options(home)
    })
}

fn save(run: &str, seq: u64) -> serde_json::Value {
    json!({"model_id": run, "seq_id": seq, "path": format!("x{seq}")})
}

#[tokio::test]
async fn a_save_without_room_fails_and_training_goes_on_once_there_is_room() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    drop(server);

    let server = limited(home.path(), 1);
    for (route, body) in [
        ("/save_weights", save(&run, 1)),
        ("/save_weights_for_sampler", save(&run, 2)),
        ("/save_weights_external", save(&run, 3)),
        (
            "/save_weights_for_sampler",
            json!({"model_id": run, "seq_id": 4, "sampling_session_seq_id": 5}),
        ),
    ] {
        let id = server.submit(route, body).await;
        let text = server.failure(&id).await;
        assert!(
            text.contains("there is no room for saved weights"),
            "{text}"
        );
        assert!(
            text.contains("may keep 1 (--max-disk); delete checkpoints"),
            "{text}"
        );
    }
    let listed = server.get("/checkpoints").await.json();
    assert_eq!(listed["checkpoints"], json!([]));
    drop(server);

    let server = limited(home.path(), 1 << 30);
    let step = server.optim_step(&run, 5).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
    let id = server.submit("/save_weights", save(&run, 6)).await;
    assert!(server.result(&id).await.json()["path"].is_string());
}

#[tokio::test]
async fn requests_without_room_are_refused_before_they_are_logged() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let known = server.optim_step(&run, 1).await;
    server.result(&known).await;
    let id = server.submit("/save_weights", save(&run, 2)).await;
    let path = server.result(&id).await.json()["path"].clone();
    drop(server);

    let server = limited(home.path(), 1);
    let later = server.post("/optim_step", optim(&run, 3)).await;
    let created = server.post("/create_model", create_body(&session, 1)).await;
    let copy = json!({"source_path": path, "session_id": session, "model_seq_id": 7});
    let copied = server.post("/copy_weights", copy).await;

    assert_eq!(later.status, 429, "it may be sent again");
    assert!(
        later.detail().contains("the optim_step request"),
        "{}",
        later.detail()
    );
    // Nothing waits for these.
    assert_eq!((created.status, copied.status), (400, 400));
    assert!(copied.detail().contains("a copy of"), "{}", copied.detail());
    // What is known needs no room.
    assert_eq!(server.optim_step(&run, 1).await, known);
    drop(server);
    let server = Harness::open(home.path());
    let step = server.optim_step(&run, 3).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 2.0);
}

#[tokio::test]
async fn a_loss_without_room_is_refused_and_may_be_sent_again() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    drop(server);
    let loss = loss_body(&session, 0, "ppo");

    let server = limited(home.path(), 1);
    let refused = server.post("/create_custom_loss", loss.clone()).await;
    drop(server);

    assert_eq!(refused.status, 429);
    let text = refused.detail();
    assert!(text.contains("there is no room for the loss of"), "{text}");
    let server = Harness::open(home.path());
    let id = server.submit("/create_custom_loss", loss).await;
    assert!(server.result(&id).await.json()["loss_id"].is_string());
}
