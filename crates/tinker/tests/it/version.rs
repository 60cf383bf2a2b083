//! `tinker version`.

use std::time::{Duration, Instant};

use crate::support::Home;

#[test]
fn version_names_the_commit() {
    let home = Home::new();

    let text = home.run(&["version"]).ok().stdout;
    let json = home.run(&["version", "--json"]).ok().json();

    let commit = json["commit"].as_str().unwrap();
    assert_eq!(
        text,
        format!("tinker {} ({commit})\n", env!("CARGO_PKG_VERSION"))
    );
    assert!(commit == "unknown" || commit.len() == 12, "{commit}");
}

#[test]
fn version_takes_less_than_ten_milliseconds() {
    let home = Home::new();
    let time_once = || {
        let start = Instant::now();
        home.run(&["version"]).ok();
        start.elapsed()
    };

    // The best of many, since other tests run beside this one.
    let best = (0..50).map(|_| time_once()).min().unwrap();

    assert!(best < Duration::from_millis(10), "{best:?}");
}

#[test]
fn version_leaves_the_data_directory_alone() {
    let home = Home::new();

    home.run(&["version"]).ok();

    assert!(!home.path("home").exists());
}
