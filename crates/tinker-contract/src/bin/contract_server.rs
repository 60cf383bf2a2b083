//! The server as a process of its own, for tests that kill it.
//!
//! Arguments: data directory, model directory, port, threads. Prints its address and key in one line
//! once it listens, and serves until it is killed or its standard input ends.

#![expect(clippy::expect_used, reason = "a test program fails by panicking")]

use std::io::Write as _;
use std::path::PathBuf;

use tinker_contract::target::{end_with_parent, options};
use tinker_server::{ServeOptions, Server};

#[tokio::main]
async fn main() {
    end_with_parent();
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &str| arguments.next().expect(what);
    let (home, model) = (
        PathBuf::from(next("a data directory")),
        PathBuf::from(next("a model")),
    );
    let port = next("a port").parse().expect("a port number");
    let threads = next("a number of threads")
        .parse()
        .expect("a number of threads");
    let options = ServeOptions {
        port,
        threads,
        ..options(&home, &model)
    };
    let server = Server::bind(options).await.expect("a server");
    let line = format!("{} {}\n", server.base_url(), server.token().expose());
    std::io::stdout()
        .write_all(line.as_bytes())
        .expect("standard output");
    server
        .run(std::future::pending())
        .await
        .expect("an orderly end");
}
