//! Backups that are taken while the server works, and servers that start from them.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
#[cfg(unix)]
use std::time::{Duration, SystemTime};

use serde_json::json;
use tinker_server::{Backup, back_up as back_up_offline, check_free, place_backup};

use crate::durability::{finals, play};
use crate::harness::{Harness, create_body, datum, fb};

/// Takes an image as the command does, over the wire.
async fn image(server: &Harness) -> PathBuf {
    let answer = server.post("/backup", json!({})).await;
    assert_eq!(
        answer.status,
        200,
        "{}",
        String::from_utf8_lossy(&answer.body)
    );
    answer.json()["dir"].as_str().unwrap().into()
}

async fn back_up(server: &Harness, target: &Path) -> Backup {
    place_backup(&image(server).await, target).unwrap()
}

/// Saves a checkpoint of a new run.
async fn save(server: &Harness, name: &str) -> String {
    let run = server.run(&server.session().await, 0).await;
    let body = json!({"model_id": run, "seq_id": 1, "path": name});
    let id = server.submit("/save_weights", body).await;
    server.result(&id).await.json()["path"]
        .as_str()
        .unwrap()
        .to_owned()
}

fn weights_file(home: &Path, path: &str) -> PathBuf {
    let path = path.strip_prefix("tinker://").unwrap().replace(':', "_");
    let dir = home.join("server/checkpoints").join(path);
    dir.join("adapter_model.safetensors")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_go_on_from_backups_taken_at_any_moment_of_a_run() {
    let home = tempfile::tempdir().unwrap();
    let server = Arc::new(Harness::open(home.path()));
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let backups = tempfile::tempdir().unwrap();
    let played = {
        let (server, session, run) = (Arc::clone(&server), session.clone(), run.clone());
        tokio::spawn(async move {
            let mut delivered = HashSet::new();
            play(&server, &session, &run, &mut delivered).await.unwrap();
            delivered
        })
    };
    let mut n_backups = 0;
    loop {
        let is_last = played.is_finished();
        back_up(&server, &backups.path().join(n_backups.to_string())).await;
        n_backups += 1;
        if is_last {
            break;
        }
    }
    let delivered = played.await.unwrap();
    let expected = finals(home.path(), &session, &run);

    for i in 0..n_backups {
        let home = backups.path().join(i.to_string());
        let server = Harness::open(&home);
        let created = server.post("/create_model", create_body(&session, 0)).await;
        assert_eq!(created.status, 200, "backup {i} of {n_backups}");
        let mut delivered = delivered.clone();
        let played = play(&server, &session, &run, &mut delivered).await;
        played.unwrap_or_else(|refusal| panic!("backup {i} of {n_backups}: {refusal}"));
        let actual = finals(&home, &session, &run);
        assert!(actual == expected, "backup {i} of {n_backups}");
    }
    assert!(n_backups > 1, "none was taken while it ran");
}

#[tokio::test]
async fn a_backup_stays_what_it_was() {
    let (home, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Harness::open(home.path());
    let path = save(&server, "kept").await;
    let target = place.path().join("backup");
    let image = image(&server).await;
    let (run, checkpoint) = path
        .strip_prefix("tinker://")
        .unwrap()
        .split_once('/')
        .unwrap();
    let expected = std::fs::read(weights_file(home.path(), &path)).unwrap();

    // Between the image and its copy the server goes on.
    let waiting = server.optim_step(run, 2).await;
    server.result(&waiting).await;
    let deleted = server
        .delete(&format!("/training_runs/{run}/checkpoints/{checkpoint}"))
        .await;
    assert_eq!(deleted.status, 204);
    let backup = place_backup(&image, &target).unwrap();
    drop(server);

    assert!(!image.exists(), "the image is left behind");
    assert_eq!(backup.damaged, [""; 0]);
    assert!(
        backup.n_files > 4 && backup.n_bytes > expected.len() as u64,
        "{backup:?}"
    );
    assert_eq!(
        std::fs::read(weights_file(&target, &path)).unwrap(),
        expected
    );
    let again = Harness::open(&target);
    let listed = again.get("/checkpoints").await.json();
    assert_eq!(listed["checkpoints"][0]["tinker_path"], path);
    let step = again.optim_step(run, 2).await;
    assert_eq!(again.result(&step).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn what_was_accepted_and_not_done_is_in_the_backup() {
    let (home, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    // It waits for the first, which never comes here.
    let waiting = server.optim_step(&run, 2).await;
    let target = place.path().join("backup");
    back_up(&server, &target).await;
    drop(server);

    let again = Harness::open(&target);
    let first = fb(&run, 1, vec![datum(&[1, 2, 3])]);
    assert_eq!(again.post_proto(&first).await.status, 200);

    assert_eq!(again.result(&waiting).await.json()["metrics"]["step"], 1.0);
}

#[tokio::test]
async fn a_directory_that_no_server_holds_is_backed_up_as_well() {
    let (home, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let nothing = back_up_offline(home.path(), &place.path().join("none"))
        .unwrap_err()
        .to_string();
    assert!(
        nothing.contains("no server ever kept anything"),
        "{nothing}"
    );
    let server = Harness::open(home.path());
    let path = save(&server, "kept").await;
    drop(server);
    let target = place.path().join("backup");

    back_up_offline(home.path(), &target).unwrap();

    let listed = Harness::open(&target).get("/checkpoints").await.json();
    assert_eq!(listed["checkpoints"][0]["tinker_path"], path);
}

#[tokio::test]
async fn a_backup_is_not_written_over_anything() {
    let (home, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Harness::open(home.path());
    save(&server, "kept").await;
    std::fs::write(place.path().join("mine"), "text").unwrap();

    let refused = place_backup(&image(&server).await, place.path());

    let text = refused.unwrap_err().to_string();
    assert!(text.contains("is there already"), "{text}");
    assert_eq!(std::fs::read(place.path().join("mine")).unwrap(), b"text");
    let empty = place.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    check_free(&empty).unwrap();
    back_up(&server, &empty).await;
    assert!(empty.join("server/tinker.db").is_file());
}

#[tokio::test]
async fn a_target_may_end_with_a_slash_and_what_is_beside_it_stays() {
    let (home, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Harness::open(home.path());
    save(&server, "kept").await;
    let mine = place.path().join("backup.partial");
    std::fs::create_dir(&mine).unwrap();
    std::fs::write(mine.join("text"), "mine").unwrap();

    back_up(&server, &place.path().join("backup/")).await;

    assert!(place.path().join("backup/server/tinker.db").is_file());
    assert_eq!(std::fs::read(mine.join("text")).unwrap(), b"mine");
    let names = std::fs::read_dir(place.path()).unwrap();
    assert_eq!(names.count(), 2, "something is left");
}

#[cfg(unix)]
fn make_old(image: &Path) {
    let yesterday = SystemTime::now() - Duration::from_secs(24 * 60 * 60);
    let dir = std::fs::File::open(image).unwrap();
    dir.set_modified(yesterday).unwrap();
}

#[cfg(unix)]
#[tokio::test]
async fn an_image_that_nobody_copies_goes_when_the_next_is_taken() {
    let (home, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Harness::open(home.path());
    save(&server, "kept").await;
    let (left, copied, new) = (
        image(&server).await,
        image(&server).await,
        image(&server).await,
    );
    make_old(&left);
    make_old(&copied);
    let held = std::fs::File::open(copied.join("held")).unwrap();
    held.lock_shared().unwrap();

    let next = image(&server).await;

    assert!(!left.exists(), "it keeps what is deleted");
    assert!(copied.exists() && new.exists() && next.exists());
    let target = place.path().join("backup");
    place_backup(&copied, &target).unwrap();
    let names = std::fs::read_dir(&target).unwrap();
    assert_eq!(names.count(), 1, "more than the server's files");
}

#[tokio::test]
async fn a_checkpoint_that_was_damaged_before_is_named_and_copied_as_it_is() {
    let (home, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Harness::open(home.path());
    let path = save(&server, "kept").await;
    std::fs::write(weights_file(home.path(), &path), b"damage").unwrap();
    let target = place.path().join("backup");

    let backup = back_up(&server, &target).await;

    assert_eq!(backup.damaged.len(), 1, "{:?}", backup.damaged);
    assert!(backup.damaged[0].contains("adapter_model.safetensors is damaged"));
    assert_eq!(
        std::fs::read(weights_file(&target, &path)).unwrap(),
        b"damage"
    );
}
