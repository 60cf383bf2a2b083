//! `tinker version`.

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
fn version_leaves_the_data_directory_alone() {
    let home = Home::new();

    home.run(&["version"]).ok();

    assert!(!home.path("home").exists());
}
