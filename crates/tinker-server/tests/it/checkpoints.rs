//! Saving, loading, listing and deleting checkpoints.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tinker_server::{AppOptions, Clock};

use crate::harness::{Harness, options};

fn save(run: &str, seq: u64, name: &str) -> Value {
    json!({"model_id": run, "seq_id": seq, "path": name})
}

async fn saved(server: &Harness, run: &str, seq: u64, name: &str) -> String {
    let id = server.submit("/save_weights", save(run, seq, name)).await;
    server.result(&id).await.json()["path"]
        .as_str()
        .unwrap()
        .to_owned()
}

async fn trained(server: &Harness, run: &str, from: u64) -> u64 {
    server.forward_backward(run, from, &[1, 2, 3]).await;
    let step = server.optim_step(run, from + 1).await;
    server.result(&step).await;
    from + 2
}

fn dir_of(home: &Path, run: &str, rest: &str) -> PathBuf {
    home.join("server/checkpoints")
        .join(run.replace(':', "_"))
        .join(rest)
}

#[tokio::test]
async fn a_checkpoint_is_a_peft_directory_with_a_manifest() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let seq = trained(&server, &run, 1).await;

    let path = saved(&server, &run, seq, "first").await;

    assert_eq!(path, format!("tinker://{run}/weights/first"));
    let dir = dir_of(home.path(), &run, "weights/first");
    let read = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap()
    };
    let config = read("adapter_config.json");
    assert_eq!(config["target_modules"], json!(["q_proj"]));
    assert_eq!(
        (&config["r"], &config["lora_alpha"]),
        (&json!(2), &json!(32.0))
    );
    assert_eq!(config["base_model_name_or_path"], "tinker/nano");
    let manifest = read("manifest.json");
    assert_eq!(manifest["format_version"], 1);
    assert_eq!(manifest["path"], path);
    let files: Vec<&String> = manifest["files"].as_object().unwrap().keys().collect();
    assert_eq!(
        files,
        [
            "adapter_config.json",
            "adapter_model.safetensors",
            "optimizer.safetensors"
        ]
    );
}

#[tokio::test]
async fn loading_with_the_optimizer_continues_bit_for_bit() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let seq = trained(&server, &run, 1).await;
    // Saved between forward-backward and step: the gradient is part of the state.
    server.forward_backward(&run, seq, &[4, 5]).await;
    let path = saved(&server, &run, seq + 1, "mid").await;

    let body = json!({"session_id": session, "model_seq_id": 1, "path": path, "optimizer": true});
    let id = server.submit("/load_weights", body).await;
    let other = server.result(&id).await.json()["model_id"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(other, format!("{session}:train:1"));

    let a = server.optim_step(&run, seq + 2).await;
    let b = server.optim_step(&other, 1).await;
    assert_eq!(server.result(&a).await, server.result(&b).await);
    saved(&server, &run, seq + 3, "end").await;
    saved(&server, &other, 2, "end").await;
    for file in ["adapter_model.safetensors", "optimizer.safetensors"] {
        let bytes =
            |run: &str| std::fs::read(dir_of(home.path(), run, "weights/end").join(file)).unwrap();
        assert_eq!(bytes(&run), bytes(&other), "{file}");
    }
}

#[tokio::test]
async fn loading_weights_alone_starts_the_optimizer_afresh() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let seq = trained(&server, &run, 1).await;
    let path = saved(&server, &run, seq, "w").await;

    let body = json!({"session_id": session, "model_seq_id": 1, "path": path, "optimizer": false});
    let id = server.submit("/load_weights", body).await;
    server.result(&id).await;

    let step = server.optim_step(&format!("{session}:train:1"), 1).await;
    assert_eq!(server.result(&step).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn a_run_can_go_back_to_its_checkpoint() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let seq = trained(&server, &run, 1).await;
    let path = saved(&server, &run, seq, "a").await;
    let seq = trained(&server, &run, seq + 1).await;

    let body = json!({"model_id": run, "seq_id": seq, "path": path, "optimizer": true});
    let id = server.submit("/load_weights", body).await;
    assert_eq!(server.result(&id).await.json()["path"], path);
    saved(&server, &run, seq + 1, "b").await;

    let weights = |name: &str| {
        let dir = dir_of(home.path(), &run, "weights").join(name);
        std::fs::read(dir.join("adapter_model.safetensors")).unwrap()
    };
    assert_eq!(weights("a"), weights("b"));
}

#[tokio::test]
async fn a_name_is_used_once_unless_overwriting_is_asked_for() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    saved(&server, &run, 1, "x").await;

    let id = server.submit("/save_weights", save(&run, 2, "x")).await;
    let failure = server.failure(&id).await;
    assert!(failure.contains("/weights/x already exists"), "{failure}");

    let mut body = save(&run, 3, "x");
    body["overwrite"] = json!(true);
    let id = server.submit("/save_weights", body).await;
    assert_eq!(server.result(&id).await.json()["type"], "save_weights");
}

#[tokio::test]
async fn bad_names_and_lifetimes_are_refused_by_value() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;

    let id = server.submit("/save_weights", save(&run, 1, "../x")).await;
    assert!(
        server
            .failure(&id)
            .await
            .contains("checkpoint name \"../x\"")
    );
    let mut body = save(&run, 2, "ok");
    body["ttl_seconds"] = json!(60);
    let id = server.submit("/save_weights", body).await;
    assert!(
        server
            .failure(&id)
            .await
            .contains("ttl_seconds 60 must be between 3600")
    );
}

#[tokio::test]
async fn a_name_too_long_for_a_file_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;

    let plain = "x".repeat(250);
    assert!(saved(&server, &run, 1, &plain).await.ends_with(&plain));
    let mut body = save(&run, 2, &plain);
    body["overwrite"] = json!(true);
    let id = server.submit("/save_weights", body).await;
    assert_eq!(server.result(&id).await.json()["type"], "save_weights");
    let id = server
        .submit("/save_weights", save(&run, 3, &"é".repeat(100)))
        .await;
    let failure = server.failure(&id).await;
    assert!(
        failure.contains("takes 600 bytes as a file name, more than 250"),
        "{failure}"
    );
}

#[tokio::test]
async fn an_unreadable_manifest_is_named_and_overwriting_mends_it() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    saved(&server, &run, 1, "x").await;
    let manifest = dir_of(home.path(), &run, "weights/x").join("manifest.json");
    std::fs::write(&manifest, "{").unwrap();

    let id = server.submit("/save_weights", save(&run, 2, "x")).await;
    let failure = server.failure(&id).await;
    assert!(failure.contains("manifest.json is damaged"), "{failure}");

    let mut body = save(&run, 3, "x");
    body["overwrite"] = json!(true);
    let id = server.submit("/save_weights", body).await;
    assert_eq!(server.result(&id).await.json()["type"], "save_weights");
}

#[tokio::test]
async fn deleting_while_saving_leaves_directory_and_row_together() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let url = format!("/training_runs/{run}/checkpoints/weights/x");

    for seq in 1..40 {
        let mut body = save(&run, seq, "x");
        body["overwrite"] = json!(true);
        let id = server.submit("/save_weights", body).await;
        let (_, saved) = tokio::join!(server.delete(&url), server.result(&id));
        assert_eq!(saved.json()["type"], "save_weights");
        let listed = server.get("/checkpoints").await.json();
        let is_listed = listed["checkpoints"] != json!([]);
        let is_there = dir_of(home.path(), &run, "weights/x").exists();
        assert_eq!(is_listed, is_there, "after operation {seq}");
    }
}

#[tokio::test]
async fn lists_are_newest_first_and_in_pages() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    for (seq, name) in [(1, "a"), (2, "b"), (3, "c")] {
        saved(&server, &run, seq, name).await;
    }

    let page = server.get("/checkpoints?limit=2&offset=1").await.json();
    assert_eq!(
        page["cursor"],
        json!({"offset": 1, "limit": 2, "total_count": 3})
    );
    let ids: Vec<&str> = page["checkpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["checkpoint_id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["weights/b", "weights/a"]);
    let of_run = server
        .get(&format!("/training_runs/{run}/checkpoints"))
        .await
        .json();
    assert_eq!(of_run["checkpoints"][0]["checkpoint_type"], "training");
    let listed = server.get("/training_runs").await.json();
    assert_eq!(listed["training_runs"][0]["training_run_id"], run);
    assert_eq!(
        listed["training_runs"][0]["last_checkpoint"]["checkpoint_id"],
        "weights/c"
    );
    let one = server.get(&format!("/training_runs/{run}")).await.json();
    assert_eq!(one, listed["training_runs"][0]);
}

#[tokio::test]
async fn a_deletion_cut_short_by_a_kill_is_finished_at_the_next_start() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    for (seq, name) in [(1, "gone"), (2, "kept"), (3, "again")] {
        saved(&server, &run, seq, name).await;
    }
    drop(server);
    // As the kill leaves it: out of sight, and its row still there. A later save took the place of
    // the other one.
    let tmp = home.path().join("server/tmp");
    let gone = dir_of(home.path(), &run, "weights/gone");
    std::fs::rename(gone, tmp.join("deleted-1")).unwrap();
    let again = dir_of(home.path(), &run, "weights/again");
    std::fs::create_dir(tmp.join("deleted-2")).unwrap();
    let manifest = again.join("manifest.json");
    std::fs::copy(manifest, tmp.join("deleted-2/manifest.json")).unwrap();

    let server = Harness::open(home.path());

    let listed = server.get("/checkpoints").await.json()["checkpoints"].to_string();
    assert!(!listed.contains("weights/gone"), "{listed}");
    assert!(listed.contains("weights/kept"), "{listed}");
    assert!(listed.contains("weights/again"), "{listed}");
    saved(&server, &run, 4, "gone").await;
}

#[tokio::test]
async fn a_deleted_checkpoint_is_gone_and_the_refusal_lists_the_rest() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let path = saved(&server, &run, 1, "gone").await;
    saved(&server, &run, 2, "kept").await;
    let url = format!("/training_runs/{run}/checkpoints/weights/gone");

    assert_eq!(server.delete(&url).await.status, 204);
    assert!(!dir_of(home.path(), &run, "weights/gone").exists());
    let again = server.delete(&url).await;
    assert_eq!(again.status, 404);
    assert!(
        again.detail().contains("has weights/kept"),
        "{}",
        again.detail()
    );
    let body = json!({"session_id": session, "model_seq_id": 1, "path": path, "optimizer": true});
    let load = server.post("/load_weights", body).await;
    assert_eq!(load.status, 404);
    assert!(
        load.detail().contains("has weights/kept"),
        "{}",
        load.detail()
    );
}

#[tokio::test]
async fn weights_info_publication_and_lifetime() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let path = saved(&server, &run, 1, "x").await;
    let url = format!("/training_runs/{run}/checkpoints/weights/x");

    let info = server
        .post("/weights_info", json!({"tinker_path": path}))
        .await
        .json();
    assert_eq!(
        (&info["base_model"], &info["lora_rank"]),
        (&json!("tinker/nano"), &json!(2))
    );
    assert_eq!(
        server
            .post(&format!("{url}/publish"), json!(null))
            .await
            .status,
        204
    );
    let request = Harness::request(axum::http::Method::PUT, &format!("{url}/ttl"))
        .body(json!({"ttl_seconds": 7200}).to_string().into());
    assert_eq!(server.send(request.unwrap()).await.status, 204);

    let listed = server.get("/checkpoints").await.json()["checkpoints"][0].clone();
    assert_eq!(listed["public"], true);
    assert!(listed["expires_at"].is_string());
}

#[tokio::test]
async fn a_damaged_checkpoint_is_named_when_it_is_loaded() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let path = saved(&server, &run, 1, "x").await;
    let file = dir_of(home.path(), &run, "weights/x").join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();

    let body = json!({"session_id": session, "model_seq_id": 1, "path": path, "optimizer": true});
    let id = server.submit("/load_weights", body).await;

    let failure = server.failure(&id).await;
    assert!(
        failure.contains("adapter_model.safetensors is damaged"),
        "{failure}"
    );
}

#[tokio::test]
async fn a_checkpoint_whose_time_is_up_is_gone_at_once_and_then_removed() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let server = Harness::with(AppOptions {
        clock: clock.clone(),
        ..options(home.path())
    });
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let path = saved(&server, &run, 1, "kept").await;
    let body = json!({"model_id": run, "seq_id": 2, "path": "short", "ttl_seconds": 3600});
    let id = server.submit("/save_weights", body).await;
    let short = server.result(&id).await.json()["path"].clone();
    let names = async || {
        let listed = server.get("/checkpoints").await.json();
        let rows = listed["checkpoints"].as_array().unwrap().clone();
        rows.into_iter()
            .map(|row| row["tinker_path"].clone())
            .collect::<Vec<_>>()
    };
    clock.put_forward(Duration::from_secs(3590));
    server.app.tidy_up();
    assert_eq!(names().await, [short.clone(), json!(path)]);

    clock.put_forward(Duration::from_secs(20));
    assert_eq!(names().await, [json!(path)]);
    let load = |number: u64, path: &Value| {
        let body =
            json!({"session_id": session, "model_seq_id": number, "path": path, "optimizer": true});
        server.post("/load_weights", body)
    };
    assert_eq!(load(1, &short).await.status, 404);
    assert!(dir_of(home.path(), &run, "weights/short").exists());
    server.app.tidy_up();

    assert!(!dir_of(home.path(), &run, "weights/short").exists());
    assert!(dir_of(home.path(), &run, "weights/kept").exists());
    let log = server.get("/audit?event_type=checkpoints").await.json();
    let entries = log["entries"].as_array().unwrap();
    let expired = entries.iter().find(|e| e["event"] == "checkpoint_expired");
    assert_eq!(expired.unwrap()["event_details"]["tinker_path"], short);
    assert_eq!(load(2, &json!(path)).await.status, 200);
}
