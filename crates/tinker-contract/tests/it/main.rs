//! Our client against a scripted double and against our server; the official SDK against our server.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail by panicking"
)]
#![expect(clippy::print_stdout, reason = "a failed test shows what it drew")]

mod bad_input;
mod chaos;
mod chat_templates;
mod client_faults;
mod client_futures;
mod client_gaps;
mod client_http;
mod client_lists;
mod client_sampling;
mod client_sessions;
mod client_skyrl;
mod client_training;
mod client_weights;
mod cookbook;
mod crowd;
mod custom_losses;
mod durability;
mod fuzz;
mod kills;
mod parity_page;
mod plain_http;
mod promises;
mod python_losses;
mod python_metrics;
mod python_old_sdks;
mod python_queueing;
mod python_sdk;
mod python_sharing;
mod recording;
mod resuming;
mod sharing;
mod soak;
mod suite_vs_server;
mod suite_vs_url;
mod support;
mod tables;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

#[test]
fn every_test_file_has_its_mod_line() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it");
    let named: BTreeSet<String> = include_str!("main.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'))
        .map(|name| format!("{name}.rs"))
        .collect();

    let found: BTreeSet<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "main.rs")
        .collect();

    assert_eq!(named, found);
}
