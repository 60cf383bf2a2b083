//! Heartbeats: what they must not wait for, and what they share with nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::poll;
use serde_json::json;
use tinker_http::{Client, CredentialSources, ErrorKind, Heartbeats};
use wiremock::MockServer;

use crate::support::*;

const CAPABILITIES: &str = "/api/v1/get_server_capabilities";
const HEARTBEAT: &str = "/api/v1/session_heartbeat";
const TOKEN: &str = "/api/v1/auth/token";

/// {"exp":1030,"iat":1000}: in its last minute from the start.
const SHORT: &str = "eyJh.eyJleHAiOjEwMzAsImlhdCI6MTAwMH0.x";
/// {"exp":1600,"iat":1000}: ten minutes.
const LONG: &str = "eyJh.eyJleHAiOjE2MDAsImlhdCI6MTAwMH0.x";

/// A server that gives out a short token first and long ones later, and a client with the first.
async fn exchanging() -> (MockServer, Client) {
    let server = server_with(json!({"pjwt_auth_enabled": true})).await;
    let tokens = [SHORT, LONG].map(|jwt| ok(json!({"jwt": jwt})));
    script(&server, "POST", TOKEN, tokens).await;
    let client = client(&server);
    client.config().await.unwrap();
    (server, client)
}

/// One heartbeat on a thread and a runtime of its own, while this thread does nothing else.
fn beat_apart(client: &Client) -> tinker_http::Result<()> {
    let heartbeats = Heartbeats::new(client, "S1".parse().unwrap()).unwrap();
    let beat = move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        let bounded = async {
            let limit = Duration::from_secs(60);
            tokio::time::timeout(limit, heartbeats.beat()).await
        };
        // Unless it waits for this thread.
        runtime.block_on(bounded).unwrap()
    };
    std::thread::spawn(beat).join().unwrap()
}

#[tokio::test]
async fn a_heartbeat_does_not_wait_for_an_exchange_of_a_busy_runtime() {
    let (server, client) = exchanging().await;
    script(&server, "POST", HEARTBEAT, [ok(json!({}))]).await;
    // It has begun to replace the short token, and comes to nothing more.
    let mut call = Box::pin(client.get_server_capabilities());
    assert!(poll!(&mut call).is_pending());

    beat_apart(&client).unwrap();

    let sent = requests(&server, HEARTBEAT).await;
    assert_eq!(header(&sent[0], "x-api-key"), Some(LONG));
}

#[tokio::test]
async fn a_heartbeat_replaces_a_refused_token_itself() {
    let (server, client) = exchanging().await;
    let refused = status(401).insert_header("www-authenticate", "Bearer error=\"invalid_token\"");
    script(&server, "POST", HEARTBEAT, [refused, ok(json!({}))]).await;
    let mut call = Box::pin(client.get_server_capabilities());
    assert!(poll!(&mut call).is_pending());

    beat_apart(&client).unwrap();

    let sent = requests(&server, HEARTBEAT).await;
    assert_eq!(sent.len(), 2);
    assert_eq!(header(&sent[1], "x-api-key"), Some(LONG));
}

#[tokio::test]
async fn a_token_that_a_heartbeat_brought_serves_all_calls() {
    let (server, client) = exchanging().await;
    script(&server, "POST", HEARTBEAT, [ok(json!({}))]).await;
    let models = ok(json!({"supported_models": []}));
    script(&server, "GET", CAPABILITIES, [models]).await;

    beat_apart(&client).unwrap();
    client.get_server_capabilities().await.unwrap();

    assert_eq!(requests(&server, TOKEN).await.len(), 2);
    let sent = requests(&server, CAPABILITIES).await;
    assert_eq!(header(&sent[0], "x-api-key"), Some(LONG));
}

/// As [`exchanging`], with a command for the credential, and the file that has a line per run of it.
async fn commanded(folder: &Path) -> (MockServer, Client, PathBuf) {
    let runs = folder.join("runs");
    let sources = CredentialSources {
        command: Some(format!("echo run >> '{}'; echo tml-x", runs.display())),
        ..CredentialSources::default()
    };
    let server = server_with(json!({"pjwt_auth_enabled": true})).await;
    let tokens = [SHORT, LONG].map(|jwt| ok(json!({"jwt": jwt})));
    script(&server, "POST", TOKEN, tokens).await;
    let models = ok(json!({"supported_models": []}));
    script(&server, "GET", CAPABILITIES, [models]).await;
    script(&server, "POST", HEARTBEAT, [ok(json!({}))]).await;
    let client = builder(&server.uri()).credentials(sources.resolve().unwrap());
    let client = client.build().unwrap();
    client.config().await.unwrap();
    (server, client, runs)
}

#[tokio::test]
async fn a_heartbeat_runs_no_credential_command_beside_another() {
    let folder = tempfile::tempdir().unwrap();
    let (server, client, runs) = commanded(folder.path()).await;
    let heartbeats = Heartbeats::new(&client, "S1".parse().unwrap()).unwrap();
    // Each has begun to replace the short token.
    let mut call = Box::pin(client.get_server_capabilities());
    assert!(poll!(&mut call).is_pending());
    let mut beat = Box::pin(heartbeats.beat());
    assert!(poll!(&mut beat).is_pending());

    let (called, kept_alive) = futures_util::join!(call, beat);

    called.unwrap();
    kept_alive.unwrap();
    // For the settings, the short token and the long one.
    let n_runs = std::fs::read_to_string(runs).unwrap().lines().count();
    assert_eq!(n_runs, 3);
    let sent = requests(&server, HEARTBEAT).await;
    assert_eq!(header(&sent[0], "x-api-key"), Some(LONG));
}

#[tokio::test]
async fn a_heartbeat_waits_so_long_for_a_command_of_a_busy_runtime_and_no_longer() {
    let folder = tempfile::tempdir().unwrap();
    let (_server, client, _runs) = commanded(folder.path()).await;
    let heartbeats = Heartbeats::new(&client, "S1".parse().unwrap()).unwrap();
    // It runs the command, and nobody asks what came of it.
    let mut call = Box::pin(client.get_server_capabilities());
    assert!(poll!(&mut call).is_pending());
    tokio::time::pause();
    let begun = client.now();

    let error = heartbeats.beat().await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Timeout);
    let took = client.now() - begun;
    let limit = Duration::from_secs(75);
    assert!(took >= limit && took < limit * 2, "{took:?}");
}

/// What came over each connection: paths, and the sessions of heartbeats.
type Traffic = Arc<Mutex<BTreeMap<usize, BTreeSet<String>>>>;

/// A server that tells its connections apart, and keeps them open.
fn counting_server() -> (String, Traffic) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let traffic = Traffic::default();
    let seen = Arc::clone(&traffic);
    std::thread::spawn(move || {
        for (n, stream) in listener.incoming().enumerate() {
            let seen = Arc::clone(&seen);
            std::thread::spawn(move || serve(n, &stream.unwrap(), &seen));
        }
    });
    (url, traffic)
}

/// Answers every request of a connection with `{}`.
fn serve(n: usize, stream: &TcpStream, seen: &Traffic) {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut path, mut n_bytes) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if path.is_empty() {
                path = line.split(' ').nth(1).unwrap().to_owned();
            }
            if let Some(length) = line.to_lowercase().strip_prefix("content-length: ") {
                n_bytes = length.trim().parse().unwrap();
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; n_bytes];
        reader.read_exact(&mut body).unwrap();
        if path == HEARTBEAT {
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            path = body["session_id"].as_str().unwrap().to_owned();
        }
        seen.lock().unwrap().entry(n).or_default().insert(path);
        let answer =
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
        let mut stream = stream;
        stream.write_all(answer.as_bytes()).unwrap();
    }
}

#[tokio::test]
async fn the_heartbeats_of_a_session_have_a_connection_to_themselves() {
    let (url, traffic) = counting_server();
    let client = builder(&url).build().unwrap();
    client.config().await.unwrap();
    let [one, other] =
        ["S1", "S2"].map(|id| Heartbeats::new(&client, id.parse().unwrap()).unwrap());

    for _ in 0..2 {
        one.beat().await.unwrap();
        other.beat().await.unwrap();
        client.send_telemetry(&report()).await.ok();
    }

    let traffic = traffic.lock().unwrap();
    let with_heartbeats: Vec<_> = traffic
        .values()
        .filter(|paths| paths.contains("S1") || paths.contains("S2"))
        .collect();
    assert_eq!(with_heartbeats.len(), 2, "{traffic:?}");
    assert!(
        with_heartbeats.iter().all(|paths| paths.len() == 1),
        "{traffic:?}"
    );
}

fn report() -> tinker_types::TelemetryRequest {
    tinker_types::TelemetryRequest {
        events: Vec::new(),
        platform: "Linux".into(),
        sdk_version: "0".into(),
        session_id: "S1".into(),
        process_uuid: "1".into(),
    }
}
