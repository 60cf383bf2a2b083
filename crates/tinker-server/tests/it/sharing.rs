//! Checkpoints for others: copies, files by signed links, archives.

use axum::body::Body;
use axum::http::Method;
use serde_json::{Value, json};

use crate::harness::{Answer, Harness};

async fn saved(server: &Harness, endpoint: &str, run: &str, seq: u64, name: &str) -> String {
    let body = json!({"model_id": run, "seq_id": seq, "path": name});
    let id = server.submit(endpoint, body).await;
    let answer = server.result(&id).await.json();
    let path = answer["path"].as_str();
    path.unwrap_or_else(|| panic!("{answer}")).to_owned()
}

async fn trained(server: &Harness) -> String {
    let run = server.run(&server.session().await, 0).await;
    server.forward_backward(&run, 1, &[1, 2, 3]).await;
    server.optim_step(&run, 2).await;
    run
}

fn of_checkpoint(path: &str, action: &str) -> String {
    let rest = path.strip_prefix("tinker://").unwrap();
    let (run, checkpoint) = rest.split_once('/').unwrap();
    format!("/training_runs/{run}/checkpoints/{checkpoint}/{action}")
}

async fn copy(server: &Harness, key: &str, body: Value) -> Answer {
    let request = Harness::request(Method::POST, "/copy_weights")
        .header("content-type", "application/json")
        .header("x-idempotency-key", key)
        .body(Body::from(body.to_string()));
    server.send(request.unwrap()).await
}

fn path_of(answer: &Answer) -> String {
    let text = String::from_utf8_lossy(&answer.body);
    assert_eq!(answer.status, 200, "{text}");
    answer.json()["tinker_path"].as_str().unwrap().to_owned()
}

/// The optimizer's next state after loading a checkpoint, through what it trains to.
async fn weights_after_loading(server: &Harness, path: &str, name: &str) -> Vec<u8> {
    let session = server.session().await;
    let body = json!({"session_id": session, "model_seq_id": 0, "path": path, "optimizer": true});
    let id = server.submit("/load_weights", body).await;
    let loaded = server.result(&id).await.json();
    assert_eq!(loaded["path"], path, "{loaded}");
    let run = format!("{session}:train:0");
    server.forward_backward(&run, 1, &[7, 8]).await;
    server.optim_step(&run, 2).await;
    let path = saved(server, "/save_weights_external", &run, 3, name).await;
    files(server, &path)
        .await
        .remove("adapter_model.safetensors")
        .unwrap()
}

async fn links(server: &Harness, path: &str) -> Value {
    let answer = server
        .get(&of_checkpoint(path, "external_weights_urls"))
        .await;
    assert_eq!(
        answer.status,
        200,
        "{}",
        String::from_utf8_lossy(&answer.body)
    );
    answer.json()
}

async fn files(server: &Harness, path: &str) -> std::collections::BTreeMap<String, Vec<u8>> {
    let links = links(server, path).await;
    let mut files = std::collections::BTreeMap::new();
    for (name, url) in links["urls"].as_object().unwrap() {
        let answer = server.follow(url.as_str().unwrap(), &[]).await;
        assert_eq!(answer.status, 200, "{name}");
        files.insert(name.clone(), answer.body);
    }
    files
}

#[tokio::test]
async fn external_weights_are_the_files_of_peft_without_the_optimizer() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = trained(&server).await;

    let path = saved(&server, "/save_weights_external", &run, 3, "out").await;

    assert_eq!(path, format!("tinker://{run}/external_weights/out"));
    let files = files(&server, &path).await;
    assert_eq!(
        files.keys().collect::<Vec<_>>(),
        ["adapter_config.json", "adapter_model.safetensors"]
    );
    let config: Value = serde_json::from_slice(&files["adapter_config.json"]).unwrap();
    assert_eq!(config["target_modules"], json!(["q_proj"]));
    let listed = server.get("/checkpoints").await.json();
    let row = &listed["checkpoints"][0];
    assert_eq!(
        (&row["tinker_path"], &row["checkpoint_type"]),
        (&json!(path), &json!("external"))
    );
    let n_bytes: usize = files.values().map(Vec::len).sum();
    assert_eq!(row["size_bytes"], n_bytes);
}

#[tokio::test]
async fn encryption_is_refused_by_name_and_uses_its_number_up() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = trained(&server).await;
    let body =
        json!({"model_id": run, "seq_id": 3, "path": "x", "age_encryption_recipients": ["age1x"]});

    let id = server.submit("/save_weights_external", body).await;

    assert!(
        server
            .failure(&id)
            .await
            .contains("age_encryption_recipients")
    );
    saved(&server, "/save_weights_external", &run, 4, "y").await;
}

#[tokio::test]
async fn a_link_gives_ranges_of_its_file_without_a_key() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = trained(&server).await;
    let path = saved(&server, "/save_weights_external", &run, 3, "out").await;
    let whole = files(&server, &path)
        .await
        .remove("adapter_model.safetensors")
        .unwrap();
    let links = links(&server, &path).await;
    let url = links["urls"]["adapter_model.safetensors"].as_str().unwrap();
    assert!(url.starts_with("http://127.0.0.1/signed/"), "{url}");

    let part = server.follow(url, &[("range", "bytes=5-9")]).await;
    let tag = part.header("etag").to_owned();
    let same = server
        .follow(url, &[("range", "bytes=-3"), ("if-range", &tag)])
        .await;
    let changed = server
        .follow(url, &[("range", "bytes=-3"), ("if-range", "\"x\"")])
        .await;
    let beyond = server.follow(url, &[("range", "bytes=999999-")]).await;

    assert_eq!((part.status, &part.body[..]), (206, &whole[5..10]));
    assert_eq!(
        part.header("content-range"),
        format!("bytes 5-9/{}", whole.len())
    );
    assert_eq!(
        (same.status, &same.body[..]),
        (206, &whole[whole.len() - 3..])
    );
    assert_eq!((changed.status, changed.body.len()), (200, whole.len()));
    assert_eq!(beyond.status, 416);
    assert_eq!(
        beyond.header("content-range"),
        format!("bytes */{}", whole.len())
    );
}

#[tokio::test]
async fn links_that_were_changed_and_links_to_what_is_gone_lead_nowhere() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = trained(&server).await;
    let path = saved(&server, "/save_weights_external", &run, 3, "out").await;
    let links = links(&server, &path).await;
    let url = links["urls"]["adapter_config.json"].as_str().unwrap();

    let other = server
        .follow(&url.replace("adapter_config", "manifest"), &[])
        .await;
    let deleted = format!("/training_runs/{run}/checkpoints/external_weights/out");
    assert_eq!(server.delete(&deleted).await.status, 204);
    let gone = server.follow(url, &[]).await;

    assert_eq!(other.status, 403);
    assert_eq!(gone.status, 404);
    assert!(gone.detail().contains(&path));
}

#[tokio::test]
async fn only_external_checkpoints_have_links_to_files() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = trained(&server).await;
    let path = saved(&server, "/save_weights", &run, 3, "a").await;

    let refused = server
        .get(&of_checkpoint(&path, "external_weights_urls"))
        .await;

    assert_eq!(refused.status, 400);
    assert!(refused.detail().contains("save_weights_external"));
}

#[tokio::test]
async fn an_archive_is_a_tar_of_the_files_behind_a_redirect() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = trained(&server).await;
    let path = saved(&server, "/save_weights_for_sampler", &run, 3, "a").await;

    let redirect = server.get(&of_checkpoint(&path, "archive")).await;

    assert_eq!(redirect.status, 302);
    assert!(redirect.header("expires").ends_with(" GMT"));
    let archive = server.follow(redirect.header("location"), &[]).await;
    assert_eq!(
        (archive.status, archive.content_type.as_str()),
        (200, "application/x-tar")
    );
    // The first member is the first name of the alphabet, and its bytes follow its header.
    assert!(archive.body.starts_with(b"adapter_config.json\0"));
    assert_eq!(&archive.body[257..262], b"ustar");
    let dir = home
        .path()
        .join("server/checkpoints")
        .join(run.replace(':', "_"));
    let config = std::fs::read(dir.join("sampler_weights/a/adapter_config.json")).unwrap();
    assert_eq!(archive.body[512..512 + config.len()], config);
    assert_eq!(archive.body.len() % 512, 0);
    // A download that broke off goes on where it was.
    let range = [("range", "bytes=512-599")];
    let part = server.follow(redirect.header("location"), &range).await;
    assert_eq!(
        (part.status, &part.body[..]),
        (206, &archive.body[512..600])
    );
    let missing = of_checkpoint(&path.replace("/a", "/b"), "archive");
    assert_eq!(server.get(&missing).await.status, 404);
}

#[tokio::test]
async fn a_copy_outlives_its_source_and_trains_to_the_same_bits() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = trained(&server).await;
    let source = saved(&server, "/save_weights", &run, 3, "a").await;
    let from_source = weights_after_loading(&server, &source, "x").await;

    let body =
        || json!({"source_path": source, "destination_project_id": "p", "ttl_seconds": 7200});
    let copied = path_of(&copy(&server, "k1", body()).await);
    let deleted = format!("/training_runs/{run}/checkpoints/weights/a");
    assert_eq!(server.delete(&deleted).await.status, 204);
    let repeated = path_of(&copy(&server, "k1", body()).await);

    assert_eq!(copied, repeated, "the answer may have been lost");
    assert!(copied.ends_with(":train:0/weights/a"), "{copied}");
    assert_eq!(
        weights_after_loading(&server, &copied, "y").await,
        from_source
    );
    assert_eq!(copy(&server, "k2", body()).await.status, 404);
    let row = server.get("/training_runs?project_id=p").await.json();
    assert_eq!(row["cursor"]["total_count"], 1);
    assert!(row["training_runs"][0]["last_checkpoint"]["expires_at"].is_string());
}

#[tokio::test]
async fn a_copy_into_a_session_takes_a_number_of_its_own() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = trained(&server).await;
    let session = run.split(':').next().unwrap().to_owned();
    let first = saved(&server, "/save_weights", &run, 3, "a").await;
    let second = saved(&server, "/save_weights", &run, 4, "b").await;
    let body = |source: &str, number: u64| json!({"source_path": source, "session_id": session, "model_seq_id": number});

    let copied = path_of(&copy(&server, "k1", body(&first, 1)).await);
    assert_eq!(copied, format!("tinker://{session}:train:1/weights/a"));
    assert_eq!(path_of(&copy(&server, "k2", body(&first, 1)).await), copied);
    let taken = copy(&server, "k3", body(&second, 0)).await;
    let nowhere = copy(&server, "k4", json!({"source_path": first})).await;
    let step = server
        .post(
            "/optim_step",
            crate::harness::optim(&format!("{session}:train:1"), 1),
        )
        .await;

    assert_eq!((taken.status, nowhere.status, step.status), (422, 400, 400));
    assert!(
        step.detail().contains("cannot be trained"),
        "{}",
        step.detail()
    );
}
