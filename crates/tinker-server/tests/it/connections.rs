//! More clients than connections, each with one of its own that it keeps.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tinker_server::{ServeOptions, Server, TlsFiles};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::harness::{create_body, optim};
use crate::tls::{fixture, trusting};

const MOST: usize = 8;
const N_POLLING: usize = 16;
const N_OTHERS: usize = 24;
/// Polls that others do not shorten take longer than all of a test.
const HOLD: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(300);
/// How often a client asks over another connection when one was closed or not made.
const TRIES: usize = 1000;

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// Where a server is, and how to get there.
struct Target {
    addr: std::net::SocketAddr,
    key: String,
    tls: Option<TlsConnector>,
}

impl Target {
    async fn connect(&self) -> std::io::Result<Box<dyn Io>> {
        let stream = TcpStream::connect(self.addr).await?;
        let Some(tls) = &self.tls else {
            return Ok(Box::new(stream));
        };
        let name = ServerName::try_from("first.example").unwrap();
        Ok(Box::new(tls.connect(name, stream).await?))
    }
}

/// A client that keeps its connection for as long as the server lets it.
struct Client {
    target: Arc<Target>,
    connection: Option<Box<dyn Io>>,
}

impl Client {
    fn of(target: &Arc<Target>) -> Self {
        let target = Arc::clone(target);
        Self {
            target,
            connection: None,
        }
    }

    /// Asks, over a new connection if the server has closed the old one.
    async fn ask(&mut self, method: &str, path: &str, body: &str) -> (u16, String) {
        let key = &self.target.key;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nx-api-key: {key}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        for _ in 0..TRIES {
            let kept = match self.connection.take() {
                Some(kept) => Ok(kept),
                None => self.target.connect().await,
            };
            let Ok(mut connection) = kept else { continue };
            if let Ok((head, body)) = exchange(&mut connection, &request).await {
                if !head.contains("connection: close") {
                    self.connection = Some(connection);
                }
                let status = head.split(' ').nth(1).unwrap().parse().unwrap();
                return (status, body);
            }
        }
        panic!("no answer to {method} {path} in {TRIES} tries");
    }

    async fn post(&mut self, path: &str, body: &Value) -> (u16, Value) {
        let path = format!("/api/v1{path}");
        let (status, text) = self.ask("POST", &path, &body.to_string()).await;
        (status, serde_json::from_str(&text).unwrap())
    }

    /// The server's own count of connections, checked against its bound.
    async fn check_count(&mut self) {
        let (status, page) = self.ask("GET", "/metrics", "").await;
        assert_eq!(status, 200);
        let value = |name: &str| {
            let line = page.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap().trim().parse::<usize>().unwrap()
        };
        assert_eq!(value("tinker_max_connections "), MOST);
        assert!((1..=MOST).contains(&value("tinker_connections ")), "{page}");
    }
}

/// Sends a request and reads its answer: the head, and the body of the announced length.
async fn exchange(io: &mut Box<dyn Io>, request: &str) -> std::io::Result<(String, String)> {
    io.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await?);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.split("content-length: ").nth(1).unwrap();
    let length = length.split("\r\n").next().unwrap().parse().unwrap();
    let mut body = vec![0; length];
    io.read_exact(&mut body).await?;
    Ok((head, String::from_utf8(body).unwrap()))
}

/// A future that is pending until the operation before it arrives, and that operation.
async fn pending(client: &mut Client) -> (String, Value) {
    let create = json!({"tags": [], "user_metadata": {}, "sdk_version": "t"});
    let (_, session) = client.post("/create_session", &create).await;
    let session = session["session_id"].as_str().unwrap();
    let (_, created) = client.post("/create_model", &create_body(session, 0)).await;
    let result = loop {
        let (status, result) = client.post("/retrieve_future", &created).await;
        if status == 200 {
            break result;
        }
    };
    let run = result["model_id"].as_str().unwrap();
    let (_, second) = client.post("/optim_step", &optim(run, 2)).await;
    let id = second["request_id"].as_str().unwrap().to_owned();
    (id, optim(run, 1))
}

type Running = tokio::task::JoinHandle<tinker_server::Result<()>>;

/// A server with few places that holds polls for long; it runs until the sender is dropped.
async fn started(
    home: &Path,
    tls: Option<TlsFiles>,
) -> (Arc<Target>, oneshot::Sender<()>, Running) {
    let options = ServeOptions {
        tls,
        max_connections: Some(MOST),
        poll_hold: Some(HOLD),
        ..ServeOptions::new(home)
    };
    let server = Server::bind(options).await.unwrap();
    let target = Arc::new(Target {
        addr: server.tls_addr().unwrap_or(server.addr()),
        key: server.token().expose().to_owned(),
        tls: server.tls_addr().map(|_| trusting("first")),
    });
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(server.run(async move { drop(stopped.await) }));
    (target, stop, running)
}

async fn serves_a_crowd(home: &Path, tls: Option<TlsFiles>) {
    let (target, stop, running) = started(home, tls).await;
    let mut last = Client::of(&target);
    let (id, missing) = pending(&mut last).await;

    let sent_away = Arc::<Notify>::default();
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..N_POLLING {
        let (mut client, sent_away) = (Client::of(&target), Arc::clone(&sent_away));
        let poll = json!({"request_id": id});
        clients.spawn(async move {
            while client.post("/retrieve_future", &poll).await.0 == 408 {
                sent_away.notify_one();
            }
            client.check_count().await;
            client
        });
    }
    for _ in 0..N_OTHERS {
        let mut client = Client::of(&target);
        clients.spawn(async move {
            for _ in 0..3 {
                assert_eq!(client.ask("GET", "/api/v1/healthz", "").await.0, 200);
                client.check_count().await;
            }
            client
        });
    }
    // Polls end before their time since others wait, and only so does this one get in.
    let sent_away = tokio::time::timeout(PATIENCE, sent_away.notified());
    assert!(sent_away.await.is_ok(), "polls are held to their end");
    assert_eq!(last.post("/optim_step", &missing).await.0, 200);

    // Each keeps its connection until all are done.
    let clients = clients.join_all().await;
    assert_eq!(clients.len(), N_POLLING + N_OTHERS);
    drop((clients, last, stop));
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_crowd_takes_turns_at_the_connections_that_there_are() {
    let home = tempfile::tempdir().unwrap();

    serves_a_crowd(home.path(), None).await;
}

#[tokio::test]
async fn a_crowd_takes_turns_by_tls_too() {
    let home = tempfile::tempdir().unwrap();
    let files = TlsFiles {
        cert: fixture("first.cert.pem"),
        key: fixture("first.key.pem"),
    };

    serves_a_crowd(home.path(), Some(files)).await;
}

#[tokio::test]
async fn polls_for_all_samples_make_room_for_others_too() {
    let home = tempfile::tempdir().unwrap();
    let (target, stop, running) = started(home.path(), None).await;
    let mut first = Client::of(&target);
    let create = json!({"tags": [], "user_metadata": {}, "sdk_version": "t"});
    let (_, session) = first.post("/create_session", &create).await;
    let create = json!({"session_id": session["session_id"], "sampling_session_seq_id": 0,
        "base_model": "tinker/nano"});
    let (_, sampler) = first.post("/create_sampling_session", &create).await;
    let target_of = json!({"type": "sampling_session",
        "sampling_session_id": sampler["sampling_session_id"], "cloned_sampler_id": 1});
    let poll = json!({"prev_cursor": 0, "target": target_of});

    let mut polls = tokio::task::JoinSet::new();
    for _ in 0..N_POLLING {
        let (mut client, poll) = (Client::of(&target), poll.clone());
        polls.spawn(async move { client.post("/retrieve_futures", &poll).await });
    }
    // Nobody waits behind the last ones.
    for _ in MOST..N_POLLING {
        let ended = tokio::time::timeout(PATIENCE, polls.join_next()).await;
        let Ok(Some(ended)) = ended else {
            panic!("polls are held to their end");
        };
        let (status, answer) = ended.unwrap();
        assert_eq!((status, &answer["completions"]), (200, &json!([])));
    }

    drop((polls, first, stop));
    running.await.unwrap().unwrap();
}
