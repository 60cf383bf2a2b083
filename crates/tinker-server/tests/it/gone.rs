//! What goes away while something still needs it.

use serde_json::{Value, json};

use crate::harness::{Harness, optim};

async fn save(server: &Harness, run: &str, seq: u64, endpoint: &str, name: &str) -> String {
    let body = json!({"model_id": run, "seq_id": seq, "path": name});
    let id = server.submit(endpoint, body).await;
    let saved = server.result(&id).await.json();
    saved["path"].as_str().unwrap().to_owned()
}

async fn delete(server: &Harness, path: &str) {
    let (run, checkpoint) = path
        .strip_prefix("tinker://")
        .and_then(|rest| rest.split_once('/'))
        .unwrap();
    let url = format!("/training_runs/{run}/checkpoints/{checkpoint}");
    assert_eq!(server.delete(&url).await.status, 204);
}

async fn metrics(server: &Harness, id: &str) -> Value {
    let answer = server.result(id).await.json();
    assert!(answer["metrics"].is_object(), "{answer}");
    answer["metrics"].clone()
}

/// Trains on two batches, the second of which waits for the first; what the steps say.
async fn trained(server: &Harness, run: &str, unload: bool) -> Vec<Value> {
    server.forward_backward(run, 2, &[4, 5]).await;
    let steps = [
        server.optim_step(run, 3).await,
        server.optim_step(run, 5).await,
    ];
    let unloading = || server.submit("/unload_model", json!({ "model_id": run }));
    let mut unloaded = Vec::new();
    if unload {
        unloaded.push(unloading().await);
    }
    server.forward_backward(run, 1, &[1, 2, 3]).await;
    if unload {
        unloaded.push(unloading().await);
    }
    server.forward_backward(run, 4, &[6]).await;
    for id in unloaded {
        assert_eq!(server.result(&id).await.json()["model_id"], run);
    }
    let mut said = Vec::new();
    for id in &steps {
        said.push(metrics(server, id).await);
    }
    said
}

#[tokio::test]
async fn a_run_that_is_unloaded_while_operations_wait_goes_on_with_them() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let (run, undisturbed) = (server.run(&session, 0).await, server.run(&session, 1).await);

    let said = trained(&server, &run, true).await;

    assert_eq!(said, trained(&server, &undisturbed, false).await);
    assert_eq!(said[1]["step"], 2.0);
}

#[tokio::test]
async fn a_checkpoint_that_is_deleted_before_its_turn_fails_its_load_alone() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let (run, undisturbed) = (server.run(&session, 0).await, server.run(&session, 1).await);
    let path = save(&server, &run, 1, "/save_weights", "x").await;
    let body = json!({"model_id": run, "seq_id": 4, "path": path, "optimizer": true});
    let load = server.submit("/load_weights", body).await;
    let step = server.optim_step(&run, 5).await;

    delete(&server, &path).await;
    server.forward_backward(&run, 2, &[1, 2, 3]).await;
    server.optim_step(&run, 3).await;

    let why = server.failure(&load).await;
    let expected =
        format!("checkpoint {path} does not exist: training run {run} has no checkpoints");
    assert_eq!(why, expected);
    server.forward_backward(&undisturbed, 1, &[1, 2, 3]).await;
    server.optim_step(&undisturbed, 2).await;
    let of_undisturbed = server.optim_step(&undisturbed, 3).await;
    assert_eq!(
        metrics(&server, &step).await,
        metrics(&server, &of_undisturbed).await
    );
}

#[tokio::test]
async fn a_run_whose_checkpoint_is_gone_says_so_and_its_creation_stays_answered() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let path = save(&server, &run, 1, "/save_weights", "x").await;
    let create = |number: u64| json!({"session_id": session, "model_seq_id": number, "path": path, "optimizer": true});
    let id = server.submit("/load_weights", create(1)).await;
    server.result(&id).await;

    delete(&server, &path).await;

    let refused = server.post("/load_weights", create(2)).await;
    assert_eq!(refused.status, 404);
    assert!(refused.detail().contains(&path), "{}", refused.detail());
    assert_eq!(server.submit("/load_weights", create(1)).await, id);
    let step = server.optim_step(&format!("{session}:train:1"), 1).await;
    assert_eq!(metrics(&server, &step).await["step"], 1.0);
}

#[tokio::test]
async fn a_sampler_of_a_deleted_checkpoint_answers_what_it_began_and_refuses_the_rest() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let path = save(&server, &run, 1, "/save_weights_for_sampler", "x").await;
    let body = json!({"session_id": session, "sampling_session_seq_id": 0, "model_path": path});
    assert_eq!(
        server.post("/create_sampling_session", body).await.status,
        200
    );
    let sampler = format!("{session}:sample:0");
    let sample = |seq: u64| {
        json!({"sampling_session_id": sampler, "seq_id": seq, "num_samples": 20,
            "sampling_params": {"max_tokens": 40, "stop": []},
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}})
    };
    let begun = server.submit("/asample", sample(0)).await;

    delete(&server, &path).await;

    // It was under way, or its turn came too late: either is an answer, and it is final.
    let answer = server.result(&begun).await;
    if answer.content_type == "application/json" {
        assert_eq!(answer.json()["category"], "user", "{}", answer.json());
        assert!(answer.json()["error"].as_str().unwrap().contains(&path));
    }
    let refused = server.post("/asample", sample(1)).await;
    assert_eq!(refused.status, 404);
    assert!(refused.detail().contains(&path), "{}", refused.detail());
    let body = json!({"session_id": session, "sampling_session_seq_id": 1, "model_path": path});
    assert_eq!(
        server.post("/create_sampling_session", body).await.status,
        404
    );
    let step = server.optim_step(&run, 2).await;
    assert_eq!(metrics(&server, &step).await["step"], 1.0);
}

#[tokio::test]
async fn operations_of_a_run_that_nobody_knows_are_refused_as_such() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = format!("{session}:train:7");

    for (path, body) in [
        ("/optim_step", optim(&run, 1)),
        (
            "/save_weights",
            json!({"model_id": run, "seq_id": 1, "path": "x"}),
        ),
        ("/unload_model", json!({"model_id": run})),
        ("/get_info", json!({"model_id": run})),
    ] {
        let answer = server.post(path, body).await;

        assert_eq!(answer.status, 404, "{path}");
        assert!(
            answer.detail().contains(&run),
            "{path}: {}",
            answer.detail()
        );
    }
}
