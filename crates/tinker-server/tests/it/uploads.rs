//! Weights that are brought in from outside, over the real engine and a tiny model.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::UNIX_EPOCH;

use axum::body::Body;
use axum::http::{Method, Request};
use serde_json::{Value, json};
use tinker_server::{
    ApiToken, AppOptions, Disk, KeyLimits, KeyName, Limits, Memory, OsDisk, Scope, add_key,
};

use crate::harness::{Answer, Harness, TOKEN};

type Files = BTreeMap<String, Vec<u8>>;

const WEIGHTS: &str = "adapter_model.safetensors";
const TOKENS: [u32; 5] = [1, 2, 3, 4, 5];

fn model() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/numerics/qwen3");
    root.canonicalize().unwrap()
}

fn open(home: &Path) -> Harness {
    Harness::with(AppOptions {
        threads: 1,
        ..AppOptions::new(home.to_owned(), ApiToken::new(TOKEN).unwrap())
    })
}

/// A run of rank 4 that took a step.
async fn trained(server: &Harness, session: &str) -> String {
    let body = json!({"session_id": session, "model_seq_id": 0, "base_model": model(),
        "lora_config": {"rank": 4, "seed": 3}});
    let id = server.submit("/create_model", body).await;
    let run = server.result(&id).await.json()["model_id"].clone();
    let run = run.as_str().unwrap().to_owned();
    server.forward_backward(&run, 1, &TOKENS).await;
    let step = server.optim_step(&run, 2).await;
    server.result(&step).await;
    run
}

/// What a run computes now.
async fn outputs(server: &Harness, run: &str, seq: u64) -> String {
    let id = server.forward_backward(run, seq, &TOKENS).await;
    format!("{:?}", server.output(&id).await.loss_fn_outputs)
}

/// The files of a run, as they leave the server.
async fn exported(server: &Harness, run: &str, seq: u64) -> Files {
    let body = json!({"model_id": run, "seq_id": seq, "path": "out"});
    let id = server.submit("/save_weights_external", body).await;
    server.result(&id).await;
    let links =
        format!("/training_runs/{run}/checkpoints/external_weights/out/external_weights_urls");
    let mut files = Files::new();
    for (name, url) in server.get(&links).await.json()["urls"].as_object().unwrap() {
        let answer = server.follow(url.as_str().unwrap(), &[]).await;
        files.insert(name.clone(), answer.body);
    }
    files
}

async fn start(server: &Harness, rank: u32) -> Value {
    let body = json!({"base_model": model(), "lora_config": {"rank": rank}});
    let answer = server.post("/external_weights_upload_start", body).await;
    assert_eq!(answer.status, 200);
    answer.json()
}

async fn put(server: &Harness, url: &str, bytes: &[u8]) -> Answer {
    let request = Request::builder().method(Method::PUT).uri(url);
    let request = request.header("host", "127.0.0.1");
    server
        .send(request.body(Body::from(bytes.to_vec())).unwrap())
        .await
}

async fn send(server: &Harness, upload: &Value, files: &Files) {
    for (name, bytes) in files {
        let url = upload["urls"][name].as_str().unwrap();
        assert_eq!(put(server, url, bytes).await.status, 200, "{name}");
    }
}

async fn finish(server: &Harness, upload: &Value) -> Answer {
    let body = json!({"upload_id": upload["upload_id"]});
    server.post("/external_weights_upload_finish", body).await
}

/// A run that begins with the weights of a checkpoint.
async fn begun(server: &Harness, session: &str, number: u64, path: &Value) -> String {
    let body = json!({"session_id": session, "model_seq_id": number, "path": path,
        "optimizer": false});
    let id = server.submit("/load_weights", body).await;
    let answer = server.result(&id).await.json();
    answer["model_id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn what_was_taken_out_can_be_brought_in_trained_and_sampled() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let run = trained(&server, &session).await;
    let files = exported(&server, &run, 3).await;
    let expected = outputs(&server, &run, 4).await;
    let upload = start(&server, 4).await;
    send(&server, &upload, &files).await;

    let path = finish(&server, &upload).await.json()["tinker_path"].clone();

    let again = finish(&server, &upload).await.json();
    assert_eq!(again["tinker_path"], path, "the first answer may be lost");
    let copy = begun(&server, &session, 1, &path).await;
    assert_eq!(outputs(&server, &copy, 1).await, expected);
    let body = json!({"session_id": session, "sampling_session_seq_id": 0, "model_path": path});
    let sampler = server.post("/create_sampling_session", body).await;
    assert_eq!(sampler.status, 200, "{:?}", sampler.json());
    let left = std::fs::read_dir(home.path().join("server/uploads")).unwrap();
    assert_eq!(left.count(), 0, "files of a finished upload");
    drop(server);

    let server = open(home.path());
    let copy = begun(&server, &session, 2, &path).await;
    assert_eq!(outputs(&server, &copy, 1).await, expected);
}

#[tokio::test]
async fn an_upload_is_read_only_when_there_is_memory_for_it() {
    let home = tempfile::tempdir().unwrap();
    let free = Arc::new(AtomicU64::new(u64::MAX));
    let left = Arc::clone(&free);
    let server = Harness::with(AppOptions {
        threads: 1,
        memory: Memory::told_by(move || Some(left.load(Ordering::SeqCst))),
        ..AppOptions::new(home.path().to_owned(), ApiToken::new(TOKEN).unwrap())
    });
    let run = trained(&server, &server.session().await).await;
    let files = exported(&server, &run, 3).await;
    let upload = start(&server, 4).await;
    send(&server, &upload, &files).await;

    free.store(1000, Ordering::SeqCst);
    let refused = finish(&server, &upload).await;
    free.store(u64::MAX, Ordering::SeqCst);
    let finished = finish(&server, &upload).await;

    assert_eq!(refused.status, 400);
    let why = refused.detail();
    assert!(
        why.starts_with("an uploaded adapter of rank 4 would take about"),
        "{why}"
    );
    assert_eq!(finished.status, 200);
}

#[tokio::test]
async fn a_half_sent_upload_survives_a_restart_and_says_what_is_missing() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let run = trained(&server, &session).await;
    let mut files = exported(&server, &run, 3).await;
    let upload = start(&server, 4).await;
    let weights = files.remove(WEIGHTS).unwrap();
    send(&server, &upload, &files).await;
    drop(server);

    let server = open(home.path());
    let early = finish(&server, &upload).await;
    send(&server, &upload, &[(WEIGHTS.to_owned(), weights)].into()).await;
    let whole = finish(&server, &upload).await;

    assert_eq!(early.status, 400);
    assert!(early.detail().contains(WEIGHTS), "{}", early.detail());
    assert_eq!(whole.status, 200);
}

#[tokio::test]
async fn an_adapter_that_does_not_fit_is_refused_and_can_be_sent_again() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let run = trained(&server, &session).await;
    let files = exported(&server, &run, 3).await;
    let mut spoilt = files.clone();
    let weights = spoilt.get_mut(WEIGHTS).unwrap();
    let end = weights.len();
    weights[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    let mut cut = files.clone();
    cut.get_mut(WEIGHTS).unwrap().truncate(end / 2);
    let (other_rank, upload) = (start(&server, 8).await, start(&server, 4).await);
    let refused = async |upload: &Value, files: &Files, reason: &str| {
        send(&server, upload, files).await;
        let answer = finish(&server, upload).await;
        assert_eq!(answer.status, 400);
        assert!(answer.detail().contains(reason), "{}", answer.detail());
    };

    refused(&other_rank, &files, "rank 4").await;
    refused(&upload, &spoilt, "NaN").await;
    refused(&upload, &cut, WEIGHTS).await;

    send(&server, &upload, &files).await;
    assert_eq!(finish(&server, &upload).await.status, 200);
}

#[tokio::test]
async fn uploads_that_make_no_sense_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let session = server.session().await;
    let upload = start(&server, 4).await;
    let url = upload["urls"][WEIGHTS].as_str().unwrap();

    let begin = |base: Value, rank: u32| {
        let body = json!({"base_model": base, "lora_config": {"rank": rank}});
        server.post("/external_weights_upload_start", body)
    };
    let no_upload = finish(&server, &json!({"upload_id": session})).await;
    let elsewhere = put(&server, &url.replace(WEIGHTS, "x"), b"x").await;

    assert_eq!(begin(json!("no/model"), 4).await.status, 404);
    assert_eq!(begin(json!(model()), 0).await.status, 400);
    let too_large = begin(json!(model()), 65).await;
    assert_eq!(too_large.status, 400);
    let reason = "lora_config.rank 65 must be between 1 and 64";
    assert!(
        too_large.detail().contains(reason),
        "{}",
        too_large.detail()
    );
    assert_eq!(no_upload.status, 404);
    assert!(no_upload.detail().contains(&session));
    assert_eq!(elsewhere.status, 403);
}

/// A server that may keep so much.
fn limited(home: &Path, max_disk_bytes: u64) -> Harness {
    Harness::with(AppOptions {
        threads: 1,
        limits: Limits {
            max_disk_bytes: Some(max_disk_bytes),
            ..Limits::default()
        },
        ..AppOptions::new(home.to_owned(), ApiToken::new(TOKEN).unwrap())
    })
}

#[tokio::test]
async fn uploads_without_room_are_refused_and_go_on_once_there_is_room() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let run = trained(&server, &server.session().await).await;
    let files = exported(&server, &run, 3).await;
    let upload = start(&server, 4).await;
    send(&server, &upload, &files).await;
    drop(server);

    let server = limited(home.path(), 1);
    let body = json!({"base_model": model(), "lora_config": {"rank": 4}});
    let begun = server.post("/external_weights_upload_start", body).await;
    let url = upload["urls"][WEIGHTS].as_str().unwrap();
    let sent = put(&server, url, &files[WEIGHTS]).await;
    let finished = finish(&server, &upload).await;
    drop(server);

    for (answer, what) in [
        (begun, "an upload of"),
        (sent, "the upload's adapter_model.safetensors of"),
        (finished, "the uploaded weights of"),
    ] {
        assert_eq!(answer.status, 400);
        let (text, expected) = (answer.detail(), format!("there is no room for {what}"));
        assert!(text.contains(&expected), "{text}");
    }
    let server = limited(home.path(), 1 << 30);
    assert_eq!(finish(&server, &upload).await.status, 200);
}

#[tokio::test]
async fn a_file_may_be_longer_than_a_request_and_not_than_an_adapter() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let run = trained(&server, &server.session().await).await;
    let files = exported(&server, &run, 3).await;
    drop(server);
    let defaults = AppOptions::new(home.path().to_owned(), ApiToken::new(TOKEN).unwrap());
    let max_body_bytes = files[WEIGHTS].len() / 2;
    let server = Harness::with(AppOptions {
        limits: Limits {
            max_body_bytes,
            ..Limits::default()
        },
        ..defaults
    });
    let upload = start(&server, 4).await;

    // It says how long it is, or does not.
    for is_told in [true, false] {
        send(&server, &upload, &files).await;
        if !is_told {
            let url = upload["urls"][WEIGHTS].as_str().unwrap();
            let pieces = files[WEIGHTS]
                .chunks(1000)
                .map(|c| io::Result::Ok(c.to_vec()));
            let pieces = futures_util::stream::iter(pieces.collect::<Vec<_>>());
            let request = Request::builder().method(Method::PUT).uri(url);
            let request = request.header("host", "127.0.0.1");
            let body = Body::from_stream(pieces);
            assert_eq!(server.send(request.body(body).unwrap()).await.status, 200);
        }
    }
    assert_eq!(finish(&server, &upload).await.status, 200);

    let upload = start(&server, 4).await;
    let url = upload["urls"][WEIGHTS].as_str().unwrap();
    let long = put(&server, url, &vec![0; 20 << 20]).await;
    assert_eq!(long.status, 413);
    let text = long.detail();
    assert!(text.contains("has 20971520 bytes or more"), "{text}");
    let dir = home.path().join("server/uploads");
    let of_upload = dir.join(upload["upload_id"].as_str().unwrap());
    let left: Vec<_> = std::fs::read_dir(of_upload).unwrap().collect();
    assert_eq!(left.len(), 1, "only what was asked for: {left:?}");
}

#[tokio::test]
async fn a_file_whose_sender_goes_away_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let upload = start(&server, 4).await;
    let url = upload["urls"][WEIGHTS].as_str().unwrap();
    let broken = vec![
        Ok(vec![0; 2 << 20]),
        Err(io::Error::from(io::ErrorKind::ConnectionReset)),
    ];
    let request = Request::builder().method(Method::PUT).uri(url);
    let request = request.header("host", "127.0.0.1");
    let body = Body::from_stream(futures_util::stream::iter(broken));

    let answer = server.send(request.body(body).unwrap()).await;

    assert_eq!(answer.status, 400);
    assert!(
        answer.detail().contains("ended early"),
        "{}",
        answer.detail()
    );
    let dir = home.path().join("server/uploads");
    let of_upload = dir.join(upload["upload_id"].as_str().unwrap());
    assert_eq!(std::fs::read_dir(of_upload).unwrap().count(), 1);
    // The file is free for another attempt.
    assert_eq!(put(&server, url, &[0; 10]).await.status, 200);
}

#[tokio::test]
async fn only_so_many_uploads_are_unfinished() {
    let home = tempfile::tempdir().unwrap();
    let server = open(home.path());
    let run = trained(&server, &server.session().await).await;
    let files = exported(&server, &run, 3).await;
    let first = start(&server, 4).await;
    for _ in 1..16 {
        start(&server, 4).await;
    }

    let body = json!({"base_model": model(), "lora_config": {"rank": 4}});
    let refused = server.post("/external_weights_upload_start", body).await;

    assert_eq!(refused.status, 429);
    let text = refused.detail();
    assert!(text.contains("16 uploads are not finished"), "{text}");
    send(&server, &first, &files).await;
    assert_eq!(finish(&server, &first).await.status, 200);
    start(&server, 4).await;
}

#[tokio::test]
async fn an_upload_is_a_session_of_its_key() {
    let home = tempfile::tempdir().unwrap();
    let limits = KeyLimits {
        sessions: 1,
        ..KeyLimits::default()
    };
    let name: KeyName = "ann".parse().unwrap();
    let token = add_key(home.path(), name, [Scope::Train].into(), limits).unwrap();
    let server = open(home.path());
    let begin = async || {
        let body = json!({"base_model": model(), "lora_config": {"rank": 4}}).to_string();
        let request = Request::post("/api/v1/external_weights_upload_start")
            .header("host", "127.0.0.1")
            .header("x-api-key", token.expose())
            .header("content-type", "application/json");
        server.send(request.body(Body::from(body)).unwrap()).await
    };

    assert_eq!(begin().await.status, 200);
    let refused = begin().await;

    assert_eq!(refused.status, 429);
    let text = refused.detail();
    assert!(text.contains("has 1 open sessions"), "{text}");
}

/// A disk that stops at the next file of weights until it is let go.
#[derive(Debug)]
struct Gate {
    is_armed: AtomicBool,
    reached: Sender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl Disk for Gate {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        OsDisk.create_dir_all(path)
    }
    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if path.ends_with(WEIGHTS) && self.is_armed.swap(false, Ordering::SeqCst) {
            self.reached.send(()).unwrap();
            self.go_on.lock().unwrap().recv().unwrap();
        }
        OsDisk.write_new(path, bytes)
    }
    fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()> {
        OsDisk.append(file, path, bytes)
    }
    fn truncate(&self, file: &File, len: u64) -> io::Result<()> {
        OsDisk.truncate(file, len)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        OsDisk.rename(from, to)
    }
}

#[tokio::test]
async fn saves_and_other_uploads_go_on_while_the_weights_of_one_are_written() {
    let home = tempfile::tempdir().unwrap();
    let (reached, at_gate) = channel();
    let (let_go, go_on) = channel();
    let gate = Arc::new(Gate {
        is_armed: AtomicBool::new(false),
        reached,
        go_on: Mutex::new(go_on),
    });
    let server = Arc::new(Harness::with(AppOptions {
        threads: 1,
        disk: gate.clone(),
        ..AppOptions::new(home.path().to_owned(), ApiToken::new(TOKEN).unwrap())
    }));
    let run = trained(&server, &server.session().await).await;
    let files = exported(&server, &run, 3).await;
    let (slow, other) = (start(&server, 4).await, start(&server, 4).await);
    send(&server, &slow, &files).await;
    send(&server, &other, &files).await;
    gate.is_armed.store(true, Ordering::SeqCst);
    let finishing = {
        let (server, slow) = (Arc::clone(&server), slow.clone());
        tokio::spawn(async move { finish(&server, &slow).await })
    };
    let reached = tokio::task::spawn_blocking(move || at_gate.recv());
    reached.await.unwrap().unwrap();

    let busy = finish(&server, &slow).await;
    let url = slow["urls"][WEIGHTS].as_str().unwrap();
    let exchanged = put(&server, url, &files[WEIGHTS]).await;
    let uploads = home.path().join("server/uploads");
    let dir = uploads.join(slow["upload_id"].as_str().unwrap());
    File::open(&dir).unwrap().set_modified(UNIX_EPOCH).unwrap();
    server.app.tidy_up();
    let kept = dir.is_dir();
    let saved = json!({"model_id": run, "seq_id": 4, "path": "meanwhile"});
    let saved = server.submit("/save_weights", saved).await;
    let saved = server.result(&saved).await.json();
    let finished = finish(&server, &other).await;
    let_go.send(()).unwrap();

    assert_eq!(busy.status, 429, "it may be sent again");
    assert_eq!(exchanged.status, 429, "it is being read");
    assert!(kept, "its files were removed under it");
    assert!(saved["path"].is_string());
    assert_eq!(finished.status, 200);
    assert_eq!(finishing.await.unwrap().status, 200);
    assert_eq!(finish(&server, &slow).await.status, 200);
}
