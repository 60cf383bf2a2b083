//! The official Python SDK 0.38 is told why what it asked for waits.

use std::future::IntoFuture as _;
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Once};
use std::time::Duration;

use tinker_contract::python;
use tinker_contract::target::tiny_model;
use tinker_server::{ApiToken, App, AppOptions, Limits, Loader, router};

/// Opens the gate at the latest when the test is over: the server cannot stop before.
struct Opener(u16);

impl Drop for Opener {
    fn drop(&mut self) {
        // Nobody listens if it is open.
        let _ = TcpStream::connect(("127.0.0.1", self.0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_official_sdk_is_told_why_it_waits() {
    let Some(python) = python::find() else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    let model = tiny_model(&home.path().join("tiny"));
    // The base model is loaded for the first operation; until then the second has to wait.
    let gate = TcpListener::bind("127.0.0.1:0").unwrap();
    let gate_port = gate.local_addr().unwrap().port();
    let key = ApiToken::random();
    let options = AppOptions::new(home.path().to_owned(), key.clone());
    let (load, opened) = (Arc::clone(&options.loader.load), Once::new());
    let app = App::open(AppOptions {
        models: vec![model.clone()],
        threads: 1,
        limits: Limits {
            poll_hold: Duration::from_millis(20),
            ..options.limits
        },
        loader: Loader::new(move |dir, threads| {
            opened.call_once(|| drop(gate.accept()));
            load(dir, threads)
        }),
        ..options
    });
    let app = Arc::new(app.unwrap());
    let _opener = Opener(gate_port);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base_url = format!("http://{}", listener.local_addr().unwrap());
    let serving = tokio::spawn(axum::serve(listener, router(Arc::clone(&app))).into_future());

    let arguments = [base_url, model.display().to_string(), gate_port.to_string()];
    let printed = python::run_script(
        &python,
        "sdk_queueing.py",
        &arguments,
        key.expose(),
        home.path(),
    )
    .await;

    assert_eq!(printed.steps.len(), 2, "{:#?}", printed.steps);
    let reasons = printed.summary["reasons"].as_array().unwrap();
    for reason in reasons {
        assert!(reason.as_str().unwrap().contains("turn"), "{reason}");
    }
    serving.abort();
    tokio::task::spawn_blocking(move || app.stop())
        .await
        .unwrap()
        .unwrap();
}
