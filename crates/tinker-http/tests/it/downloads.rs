//! Downloads from a storage that may fail, hang up, or mean harm.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use serde_json::json;
use tempfile::TempDir;
use tinker_http::{
    Client, Download, DownloadEvent, DownloadLimits, DownloadOptions, ErrorKind, MANIFEST,
    Manifest, RemoteFile, RetryPolicy, SignedFiles, Source,
};
use tinker_types::{SignedUrl, TinkerPath};
use wiremock::ResponseTemplate;

use crate::storage::{Fault, Storage};
use crate::support::*;

const PART: u64 = 100;

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 31 % 251) as u8).collect()
}

fn options() -> DownloadOptions {
    DownloadOptions {
        n_connections: 4,
        part_bytes: PART,
        retry: RetryPolicy {
            backoff: quick(),
            max_attempts: 4,
            reconnect_timeout: Duration::from_millis(20),
            ..RetryPolicy::default()
        },
        ..DownloadOptions::default()
    }
}

/// A client with secrets that a storage must not see.
fn client(base_url: &str) -> Client {
    builder(base_url)
        .header("cf-access-client-secret", "gateway-secret")
        .build()
        .unwrap()
}

fn download(options: DownloadOptions) -> (Download, Arc<Mutex<Vec<DownloadEvent>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&events);
    let download = client("http://127.0.0.1:9").download().options(options);
    let download = download.observer(move |event| heard.lock().unwrap().push(event.clone()));
    (download, events)
}

#[expect(clippy::disallowed_methods, reason = "addresses expire by the clock")]
fn now() -> SystemTime {
    SystemTime::now()
}

fn remote(url: String) -> RemoteFile {
    SignedUrl::new(url).into()
}

/// The same addresses each time, good for an hour, signed with the number of the signing.
fn source(storage: &Storage, names: &[&str]) -> (Source, Arc<AtomicUsize>) {
    source_until(storage, names, |_| Duration::from_secs(3600))
}

fn source_until(
    storage: &Storage,
    names: &[&str],
    lifetime: impl Fn(usize) -> Duration + Send + Sync + 'static,
) -> (Source, Arc<AtomicUsize>) {
    let n_signed = Arc::new(AtomicUsize::new(0));
    let (count, url) = (Arc::clone(&n_signed), storage.url.clone());
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let source = Source::new(move || {
        let n = count.fetch_add(1, Ordering::SeqCst);
        let files = names
            .iter()
            .map(|name| (name.clone(), remote(format!("{url}/{name}?sig={n}"))));
        let signed = SignedFiles {
            files: files.collect(),
            expires_at: now() + lifetime(n),
        };
        async move { Ok(signed) }
    });
    (source, n_signed)
}

struct Place {
    dir: TempDir,
    folder: PathBuf,
}

fn place() -> Place {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("weights");
    Place { dir, folder }
}

impl Place {
    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.folder.join(name)).unwrap()
    }

    /// What stands beside the folder.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

#[tokio::test]
async fn files_come_in_parts_and_leave_a_manifest() {
    let storage = Storage::start(&[
        ("/a.bin", bytes(1050)),
        ("/sub/b.bin", bytes(99)),
        ("/e", vec![]),
    ]);
    let (source, n_signed) = source(&storage, &["a.bin", "sub/b.bin", "e"]);
    let (download, events) = download(options());
    let place = place();

    let manifest = download.files("set", source, &place.folder).await.unwrap();

    assert_eq!(place.read("a.bin"), bytes(1050));
    assert_eq!(place.read("sub/b.bin"), bytes(99));
    assert_eq!(place.read("e"), b"");
    assert_eq!(place.names(), ["weights"]);
    let names: Vec<_> = manifest
        .files
        .iter()
        .map(|file| file.name.as_str())
        .collect();
    assert_eq!(names, ["a.bin", "e", "sub/b.bin"]);
    assert_eq!(Manifest::read(&place.folder).unwrap(), manifest);
    manifest.verify(&place.folder).unwrap();
    let mut starts: Vec<_> = storage
        .asked()
        .iter()
        .filter(|asked| asked.target.starts_with("/a.bin"))
        .map(|asked| asked.range.clone())
        .collect();
    starts.sort_by_key(|range| range.start);
    assert_eq!(starts.len(), 11);
    assert_eq!(
        (starts[0].clone(), starts[10].clone()),
        (0..100, 1000..1050)
    );
    let events = events.lock().unwrap();
    let last = events
        .iter()
        .rfind(|event| matches!(event, DownloadEvent::Progress { .. }));
    let all = DownloadEvent::Progress {
        done_bytes: 1149,
        known_bytes: 1149,
    };
    assert_eq!(last, Some(&all));
    assert_eq!(n_signed.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_storage_never_sees_a_secret_nor_where_one_came_from() {
    let (first, second) = (
        Storage::start(&[]),
        Storage::start(&[("/moved", bytes(150))]),
    );
    let place_to = format!("{}/moved?sig=other", second.url);
    first.fail(move |_, _| Fault::Redirect(place_to.clone()));
    let (source, _) = source(&first, &["a.bin"]);
    let (download, _) = download(options());
    let place = place();

    download.files("set", source, &place.folder).await.unwrap();

    assert_eq!(place.read("a.bin"), bytes(150));
    for asked in first.asked().iter().chain(&second.asked()) {
        for secret in [
            "x-api-key",
            "tml-",
            "gateway-secret",
            "referer",
            "authorization",
            "cookie",
        ] {
            assert!(!asked.head.contains(secret), "{secret} in {}", asked.head);
        }
    }
    assert!(!second.asked()[0].head.contains("sig=0"));
}

#[tokio::test]
async fn a_part_that_breaks_off_goes_on_where_it_stopped() {
    let storage = Storage::start(&[("/a.bin", bytes(250))]);
    let (source, _) = source(&storage, &["a.bin"]);
    let refused_once = AtomicUsize::new(0);
    let (download, events) = download(options());
    let place = place();
    // The 503 passes after the first time.
    storage.fail(move |_, asked| match asked.range.start {
        0 => Fault::Cut(40),
        40 => Fault::Cut(1),
        100 if refused_once.fetch_add(1, Ordering::SeqCst) == 0 => Fault::Status(503),
        _ => Fault::Good,
    });

    download.files("set", source, &place.folder).await.unwrap();

    assert_eq!(place.read("a.bin"), bytes(250));
    let asked = storage.asked();
    assert!(asked.iter().any(|asked| asked.range == (40..100)));
    assert!(asked.iter().any(|asked| asked.range == (41..100)));
    let events = events.lock().unwrap();
    let n_retries = events
        .iter()
        .filter(|event| matches!(event, DownloadEvent::Retrying { .. }))
        .count();
    assert_eq!(n_retries, 3, "{events:?}");
}

#[tokio::test]
async fn another_attempt_fetches_only_what_is_missing() {
    let storage = Storage::start(&[("/a.bin", bytes(1000)), ("/b.bin", bytes(50))]);
    storage.fail(|_, asked| match asked.range.start {
        700 => Fault::Status(404),
        _ => Fault::Good,
    });
    let place = place();
    let names = ["a.bin", "b.bin"];
    let one_at_a_time = DownloadOptions {
        n_connections: 1,
        ..options()
    };
    let (first, _) = download(one_at_a_time);
    let error = first
        .files("set", source(&storage, &names).0, &place.folder)
        .await
        .unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::NotFound);
    assert_eq!(place.names(), [".weights.partial"]);

    storage.fail(|_, _| Fault::Good);
    let (second, events) = download(options());
    let source = source(&storage, &names).0;
    second.files("set", source, &place.folder).await.unwrap();

    assert_eq!(place.read("a.bin"), bytes(1000));
    assert_eq!(place.read("b.bin"), bytes(50));
    let mut asked: Vec<_> = storage.asked().iter().map(|a| a.range.start).collect();
    asked.sort_unstable();
    // Three parts of the one file, and the other from its start.
    assert_eq!(asked, [0, 700, 800, 900]);
    let resumed = events.lock().unwrap().iter().any(|event| {
        matches!(
            event,
            DownloadEvent::FileStarted {
                resumed_bytes: 700,
                ..
            }
        )
    });
    assert!(resumed);
}

#[tokio::test]
async fn what_is_left_of_something_else_is_not_used() {
    let storage = Storage::start(&[("/a.bin", bytes(300))]);
    storage.fail(|_, asked| match asked.range.start {
        200 => Fault::Status(404),
        _ => Fault::Changed,
    });
    let place = place();
    // One at a time, so that no request of the first attempt comes late.
    let one_at_a_time = DownloadOptions {
        n_connections: 1,
        ..options()
    };
    let fetch = |label: &'static str| {
        let (download, _) = download(one_at_a_time.clone());
        let (source, _) = source(&storage, &["a.bin"]);
        let folder = place.folder.clone();
        async move { download.files(label, source, &folder).await }
    };
    fetch("one").await.unwrap_err();

    storage.fail(|_, _| Fault::Good);
    fetch("two").await.unwrap();

    assert_eq!(place.read("a.bin"), bytes(300));
    assert_eq!(storage.asked().len(), 3);
}

#[tokio::test]
async fn a_file_that_changes_meanwhile_is_fetched_anew() {
    let storage = Storage::start(&[("/a.bin", bytes(300))]);
    storage.fail(|n, _| match n {
        0 => Fault::Changed,
        _ => Fault::Good,
    });
    let place = place();

    let (download, _) = download(options());
    let source = source(&storage, &["a.bin"]).0;
    download.files("set", source, &place.folder).await.unwrap();

    assert_eq!(place.read("a.bin"), bytes(300));
}

#[tokio::test]
async fn a_file_that_never_stays_the_same_is_given_up() {
    let storage = Storage::start(&[("/a.bin", bytes(300))]);
    storage.fail(|n, _| {
        if n % 2 == 0 {
            Fault::Changed
        } else {
            Fault::Good
        }
    });
    let place = place();

    let one_at_a_time = DownloadOptions {
        n_connections: 1,
        ..options()
    };
    let source = source(&storage, &["a.bin"]).0;
    let (download, _) = download(one_at_a_time);
    let error = download.files("set", source, &place.folder).await;

    let error = error.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Conflict);
    assert_eq!(error.message(), "a.bin changes while it is fetched");
}

#[tokio::test]
async fn addresses_are_signed_anew_before_they_expire() {
    let storage = Storage::start(&[("/a.bin", bytes(250))]);
    let lifetime = |n| Duration::from_secs(if n == 0 { 30 } else { 3600 });
    let (source, n_signed) = source_until(&storage, &["a.bin"], lifetime);
    let (download, events) = download(options());
    let place = place();

    download.files("set", source, &place.folder).await.unwrap();

    assert_eq!(n_signed.load(Ordering::SeqCst), 2);
    assert!(
        storage
            .asked()
            .iter()
            .all(|asked| asked.target == "/a.bin?sig=1")
    );
    let signed = DownloadEvent::Signed { was_refused: false };
    assert_eq!(
        events
            .lock()
            .unwrap()
            .iter()
            .filter(|e| **e == signed)
            .count(),
        1
    );
}

#[tokio::test]
async fn addresses_that_are_refused_are_signed_anew_once_for_all_parts() {
    let storage = Storage::start(&[("/a.bin", bytes(1000))]);
    storage.fail(|n, asked| match asked.target.as_str() {
        "/a.bin?sig=0" if n > 0 => Fault::Status(403),
        _ => Fault::Good,
    });
    let (source, n_signed) = source(&storage, &["a.bin"]);
    let (download, events) = download(options());
    let place = place();

    download.files("set", source, &place.folder).await.unwrap();

    assert_eq!(place.read("a.bin"), bytes(1000));
    assert_eq!(n_signed.load(Ordering::SeqCst), 2);
    let signed = DownloadEvent::Signed { was_refused: true };
    assert!(events.lock().unwrap().contains(&signed));
}

#[tokio::test]
async fn a_storage_that_refuses_every_address_ends_the_download() {
    let storage = Storage::start(&[("/a.bin", bytes(10))]);
    storage.fail(|_, _| Fault::Status(403));
    let (source, n_signed) = source(&storage, &["a.bin"]);
    let place = place();

    let (download, _) = download(options());
    let error = download.files("set", source, &place.folder).await;

    let error = error.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::PermissionDenied);
    assert!(!format!("{error} {error:?}").contains("sig="), "{error:?}");
    assert_eq!(n_signed.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn a_storage_without_ranges_sends_files_whole() {
    for fault in [Fault::NoRange, Fault::NoLength(1000)] {
        let storage = Storage::start(&[("/a.bin", bytes(250))]);
        let later = fault.clone();
        storage.fail(move |n, _| match n {
            0 => Fault::NoLength(99),
            _ => later.clone(),
        });
        let place = place();

        let (download, _) = download(options());
        let source = source(&storage, &["a.bin"]).0;
        download.files("set", source, &place.folder).await.unwrap();

        assert_eq!(place.read("a.bin"), bytes(250), "{fault:?}");
    }
}

#[tokio::test]
async fn names_that_lead_out_of_the_folder_are_refused() {
    for name in ["../evil", "/evil", "a/../../evil", MANIFEST] {
        let storage = Storage::start(&[(&format!("/{name}"), bytes(10))]);
        let place = place();

        let (download, _) = download(options());
        let source = source(&storage, &[name]).0;
        let error = download
            .files("set", source, &place.folder)
            .await
            .unwrap_err();

        assert_eq!(*error.kind(), ErrorKind::Untrusted, "{name}");
        assert_eq!(place.names(), [".weights.partial"], "{name}");
    }
}

#[tokio::test]
async fn names_of_one_file_are_refused_before_any_is_fetched() {
    let storage = Storage::start(&[]);
    for (names, said) in [
        (["a/x.bin", "a//x.bin"], "\"a//x.bin\" and \"a/x.bin\""),
        (["A.bin", "a.bin"], "\"A.bin\" and \"a.bin\""),
        (["a", "a/b"], "\"a/b\" below \"a\", which is a file"),
        (["a", "./sha256sums"], "SHA256SUMS is where the sums"),
    ] {
        let place = place();
        let (download, _) = download(options());
        let source = source(&storage, &names).0;

        let files = download.files("set", source, &place.folder);
        let error = files.await.unwrap_err();

        assert_eq!(*error.kind(), ErrorKind::Untrusted, "{error}");
        assert!(error.message().contains(said), "{error}");
        assert!(error.message().starts_with("the server offers"), "{error}");
    }
    assert!(storage.asked().is_empty());
}

#[tokio::test]
async fn files_that_are_no_longer_offered_are_not_kept() {
    let storage = Storage::start(&[("/a.bin", bytes(300)), ("/b.bin", bytes(50))]);
    storage.fail(|_, asked| match asked.range.start {
        200 => Fault::Status(404),
        _ => Fault::Good,
    });
    let place = place();
    let fetch = async |names: &[&str]| {
        let (download, _) = download(options());
        let source = source(&storage, names).0;
        download.files("set", source, &place.folder).await
    };
    fetch(&["a.bin", "b.bin"]).await.unwrap_err();

    fetch(&["b.bin"]).await.unwrap();

    assert_eq!(place.read("b.bin"), bytes(50));
    assert!(!place.folder.join("a.bin").exists());
}

#[tokio::test]
async fn floods_are_refused_before_they_come() {
    let storage = Storage::start(&[("/a.bin", bytes(300)), ("/b.bin", bytes(300))]);
    let limit = |max_entries, max_file_bytes, max_total_bytes| DownloadOptions {
        limits: DownloadLimits {
            max_entries,
            max_file_bytes,
            max_total_bytes,
        },
        ..options()
    };
    for options in [limit(1, 999, 999), limit(9, 299, 999), limit(9, 999, 599)] {
        let place = place();
        let (download, _) = download(options);
        let source = source(&storage, &["a.bin", "b.bin"]).0;
        let error = download
            .files("set", source, &place.folder)
            .await
            .unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Untrusted, "{error}");
    }
    // A storage that does not say how much it sends is stopped as well.
    storage.fail(|_, _| Fault::NoLength(1000));
    let (download, _) = download(limit(9, 299, 999));
    let source = source(&storage, &["a.bin"]).0;
    let error = download
        .files("set", source, &place().folder)
        .await
        .unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Untrusted, "{error}");
}

#[tokio::test]
async fn a_file_with_another_sum_is_refused_and_fetched_anew() {
    let storage = Storage::start(&[("/a.bin", b"abc".to_vec())]);
    let url = format!("{}/a.bin", storage.url);
    let sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let source = Source::new(move || {
        let mut file = remote(url.clone());
        file.sha256 = Some(sum.to_owned());
        let signed = SignedFiles {
            files: [("a.bin".to_owned(), file)].into(),
            expires_at: now() + Duration::from_secs(3600),
        };
        async move { Ok(signed) }
    });
    storage.fail(|_, _| Fault::Changed);
    let place = place();
    let (download, _) = download(options());

    let error = download.files("set", source.clone(), &place.folder).await;
    assert!(
        error
            .unwrap_err()
            .message()
            .starts_with("a.bin has SHA-256 ")
    );

    storage.fail(|_, _| Fault::Good);
    download.files("set", source, &place.folder).await.unwrap();
    assert_eq!(place.read("a.bin"), b"abc");
}

#[tokio::test]
async fn a_folder_is_replaced_only_when_asked_for() {
    let storage = Storage::start(&[("/a.bin", bytes(10))]);
    let place = place();
    std::fs::create_dir(&place.folder).unwrap();
    std::fs::write(place.folder.join("mine"), "x").unwrap();

    let (download_new, _) = download(options());
    let kept = download_new.files("set", source(&storage, &["a.bin"]).0, &place.folder);
    let error = kept.await.unwrap_err();
    assert!(
        error.message().ends_with("weights exists already"),
        "{error}"
    );
    assert_eq!(storage.asked().len(), 0);

    let (replace, _) = download(DownloadOptions {
        overwrite: true,
        ..options()
    });
    let source = source(&storage, &["a.bin"]).0;
    replace.files("set", source, &place.folder).await.unwrap();
    assert_eq!(place.read("a.bin"), bytes(10));
    assert!(!place.folder.join("mine").exists());
    assert_eq!(place.names(), ["weights"]);
}

#[tokio::test]
async fn two_downloads_of_one_folder_do_not_meet() {
    let storage = Storage::start(&[("/a.bin", bytes(10))]);
    let place = place();
    let work = place.dir.path().join(".weights.partial");
    std::fs::create_dir(&work).unwrap();
    let lock = std::fs::File::create(work.join("lock")).unwrap();
    lock.lock().unwrap();

    let (download, _) = download(options());
    let second = download.files("set", source(&storage, &["a.bin"]).0, &place.folder);
    let error = second.await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Conflict);
    assert!(
        error
            .message()
            .ends_with("weights is being downloaded by another")
    );
}

fn archive(name: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    let content = bytes(700);
    header.set_size(content.len() as u64);
    let field = &mut header.as_mut_bytes()[..name.len()];
    field.copy_from_slice(name.as_bytes());
    header.set_cksum();
    tar.append(&header, content.as_slice()).unwrap();
    tar.into_inner().unwrap()
}

#[tokio::test]
async fn an_archive_that_the_server_points_to_is_unpacked() {
    let storage = Storage::start(&[("/archive", archive("adapter.bin"))]);
    let server = server().await;
    let route = "/api/v1/training_runs/S1:train:0/checkpoints/weights/0001/archive";
    let place_to = format!("{}/archive?sig=1", storage.url);
    let found = ResponseTemplate::new(302).insert_header("location", place_to.as_str());
    script(&server, "GET", route, [status(503), found]).await;
    let place = place();

    let download = client(&server.uri()).download().options(options());
    let path: TinkerPath = "tinker://S1:train:0/weights/0001".parse().unwrap();
    let manifest = download.checkpoint_archive(&path, &place.folder);
    let manifest = manifest.await.unwrap();

    assert_eq!(place.read("adapter.bin"), bytes(700));
    assert_eq!(manifest.files[0].name, "adapter.bin");
    assert_eq!(place.names(), ["weights"]);
    let seen: String = storage
        .asked()
        .into_iter()
        .map(|asked| asked.head)
        .collect();
    assert!(
        !seen.contains("tml-") && !seen.contains("gateway-secret"),
        "{seen}"
    );
}

#[tokio::test]
async fn an_archive_that_means_harm_leaves_nothing() {
    let storage = Storage::start(&[("/archive", archive("../evil"))]);
    let (source, _) = source(&storage, &["archive"]);
    let place = place();

    let (download, _) = download(options());
    let error = download
        .archive("set", source, &place.folder)
        .await
        .unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Untrusted);
    assert_eq!(place.names(), [".weights.partial"]);
    assert!(!place.dir.path().join(".weights.partial/files").exists());
}

#[tokio::test]
async fn external_weights_come_by_the_servers_addresses() {
    let storage = Storage::start(&[("/w/adapter.bin", bytes(321))]);
    let server = server().await;
    let route =
        "/api/v1/training_runs/S1:train:0/checkpoints/external_weights/0001/external_weights_urls";
    let urls = json!({
        "urls": {"adapter.bin": format!("{}/w/adapter.bin?sig=1", storage.url)},
        "expires": "2999-01-01T00:00:00Z",
    });
    script(&server, "GET", route, [ok(urls)]).await;
    let path: TinkerPath = "tinker://S1:train:0/external_weights/0001".parse().unwrap();
    let place = place();

    let download = client(&server.uri()).download().options(options());
    download
        .external_weights(&path, &place.folder)
        .await
        .unwrap();

    assert_eq!(place.read("adapter.bin"), bytes(321));
    assert_eq!(requests(&server, route).await.len(), 1);
}

/// A repeatable stream of numbers.
fn draw(state: &mut u64) -> usize {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize
}

#[tokio::test]
async fn whatever_fails_the_bytes_are_right() {
    for seed in 0..20 {
        let storage = Storage::start(&[("/a.bin", bytes(1500)), ("/b.bin", bytes(333))]);
        let state = Mutex::new(seed);
        storage.fail(move |_, _| {
            let mut state = state.lock().unwrap();
            match draw(&mut state) % 8 {
                0 => Fault::Status([403, 429, 500, 503][draw(&mut state) % 4]),
                1 | 2 => Fault::Cut(draw(&mut state) % 100),
                _ => Fault::Good,
            }
        });
        let place = place();

        fetch_until_done(&storage, &place.folder).await;

        assert_eq!(place.read("a.bin"), bytes(1500), "seed {seed}");
        assert_eq!(place.read("b.bin"), bytes(333), "seed {seed}");
    }
}

async fn fetch_until_done(storage: &Storage, folder: &Path) {
    for _ in 0..50 {
        let source = source(storage, &["a.bin", "b.bin"]).0;
        if download(options())
            .0
            .files("set", source, folder)
            .await
            .is_ok()
        {
            return;
        }
    }
    unreachable!("no attempt succeeded");
}
