//! Starting, finding and stopping a server.

use tinker_server::{Error, ServeOptions, Server, is_running, read_lock};

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
