//! Starting, finding and stopping a server.

use std::sync::Arc;

use serde_json::{Value, json};
use tinker_server::{
    ApiToken, App, AppOptions, Error, ServeOptions, Server, is_running, read_lock,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{Harness, options};

#[tokio::test]
async fn a_bound_server_says_where_it_is_and_withdraws_at_the_end() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::bind(ServeOptions::new(home.path())).await.unwrap();

    let info = read_lock(home.path()).unwrap().unwrap();
    assert_eq!(info.base_url(), server.base_url());
    assert_eq!(info.token, server.token().expose());
    assert!(is_running(home.path()).unwrap());

    server.run(std::future::ready(())).await.unwrap();
    assert_eq!(read_lock(home.path()).unwrap(), None);
    assert!(!is_running(home.path()).unwrap());
}

#[tokio::test]
async fn the_token_survives_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let first = Server::bind(ServeOptions::new(home.path())).await.unwrap();
    let token = first.token().clone();
    drop(first);

    let second = Server::bind(ServeOptions::new(home.path())).await.unwrap();

    assert_eq!(second.token(), &token);
}

/// Serves in the background. Returns the port, and what stops it.
async fn started(options: ServeOptions) -> (u16, impl AsyncFnOnce()) {
    let server = Server::bind(options).await.unwrap();
    let port = server.addr().port();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(server.run(async { stopped.await.unwrap() }));
    let stop = async move || {
        stop.send(()).unwrap();
        running.await.unwrap().unwrap();
    };
    (port, stop)
}

/// What a client with this token is answered over a connection of its own.
async fn asked(port: u16, token: &str, path: &str, body: &Value) -> (u16, Value) {
    let body = body.to_string();
    let request = format!(
        "POST /api/v1{path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nx-api-key: {token}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let mut connection = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap())
}

#[tokio::test]
async fn a_client_with_the_token_it_passed_goes_on_after_restarts() {
    let home = tempfile::tempdir().unwrap();
    let token = "tml-passed-by-the-caller";
    let options = |port| ServeOptions {
        port,
        token: Some(ApiToken::new(token).unwrap()),
        ..ServeOptions::new(home.path())
    };
    let (port, stop) = started(options(0)).await;
    let create = json!({"tags": [], "user_metadata": {}, "sdk_version": "t"});
    let (_, session) = asked(port, token, "/create_session", &create).await;
    let beat = json!({"session_id": session["session_id"]});
    stop().await;

    // On the same port, on any port, and with the data directory's own token.
    for wanted in [port, 0] {
        let (port, stop) = started(options(wanted)).await;
        assert!(wanted == 0 || port == wanted);
        assert_eq!(asked(port, token, "/session_heartbeat", &beat).await.0, 200);
        assert_eq!(
            asked(port, "tml-other", "/session_heartbeat", &beat)
                .await
                .0,
            401
        );
        let sign = read_lock(home.path()).unwrap().unwrap();
        assert_eq!((sign.port, sign.token.as_str()), (port, token));
        stop().await;
    }
    let (port, stop) = started(ServeOptions::new(home.path())).await;
    assert_eq!(asked(port, token, "/session_heartbeat", &beat).await.0, 401);
    stop().await;
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let home = tempfile::tempdir().unwrap();
    let options = ServeOptions {
        port,
        ..ServeOptions::new(home.path())
    };

    let error = Server::bind(options).await.unwrap_err();

    assert!(matches!(error, Error::PortTaken { .. }), "{error}");
    assert!(error.to_string().contains(&port.to_string()), "{error}");
}

#[tokio::test]
async fn two_servers_never_share_a_data_directory() {
    let home = tempfile::tempdir().unwrap();
    let _first = Server::bind(ServeOptions::new(home.path())).await.unwrap();

    let error = Server::bind(ServeOptions::new(home.path()))
        .await
        .unwrap_err();

    let pid = std::process::id().to_string();
    assert!(error.to_string().contains(&pid), "{error}");
}

#[tokio::test]
async fn an_idle_server_leaves_by_itself() {
    let home = tempfile::tempdir().unwrap();
    let options = ServeOptions {
        idle_timeout: Some(std::time::Duration::from_millis(50)),
        ..ServeOptions::new(home.path())
    };
    let server = Server::bind(options).await.unwrap();

    server.run(std::future::pending()).await.unwrap();

    assert!(!is_running(home.path()).unwrap());
}

#[tokio::test]
async fn a_stopping_server_sends_those_who_wait_away() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let run = server.run(&server.session().await, 0).await;
    let held = server.optim_step(&run, 2).await;
    let app = Arc::clone(&server.app);

    let (waited, stopped) = tokio::join!(
        server.poll(&held),
        tokio::task::spawn_blocking(move || app.stop())
    );

    stopped.unwrap().unwrap();
    assert_eq!(waited.status, 408);
}

#[test]
fn a_model_directory_that_is_none_is_refused_at_the_start() {
    let home = tempfile::tempdir().unwrap();
    let options = AppOptions {
        models: vec![home.path().join("nothing")],
        ..options(home.path())
    };

    let error = App::open(options).unwrap_err();

    assert!(error.to_string().contains("nothing"), "{error}");
}
