//! The types against what the official Python SDK 0.38.0 sent and accepted, and against themselves.
//!
//! `fixtures/wire` holds the recording and the schema; its README says how they were made.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail by panicking"
)]

mod hostile;
mod properties;
mod recorded;
mod samples;
mod schema;
mod strategies;
mod support;
mod wire;

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
