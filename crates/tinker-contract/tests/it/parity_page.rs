//! `docs/parity.md`: every row names a test, and the test exists.

use std::path::{Path, PathBuf};

use tinker_types::{ClientConfig, DynamicConfig};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn page() -> String {
    read(&root().join("docs/parity.md"))
}

/// The rows of all tables, without their heads.
fn rows(page: &str) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut lines = page.lines().peekable();
    while let Some(line) = lines.next() {
        let is_head = lines.peek().is_some_and(|next| next.starts_with("|---"));
        if line.starts_with("| ") && !is_head {
            let cells = line.trim_matches('|').split(" | ");
            rows.push(cells.map(|cell| cell.trim().to_owned()).collect());
        }
    }
    rows
}

/// Where a test is, below the root: `api/`, `http/`, `types/` and `contract/` are test folders.
fn file_of(place: &str) -> PathBuf {
    let (folder, rest) = place.split_once('/').expect("a folder");
    match folder {
        "api" | "http" | "types" | "contract" => {
            format!("crates/tinker-{folder}/tests/it/{rest}.rs").into()
        }
        _ => Path::new("crates").join(place),
    }
}

#[test]
fn every_row_names_a_test_that_exists() {
    let page = page();
    let rows = rows(&page);
    assert!(rows.len() > 100, "{} rows", rows.len());

    for row in rows {
        let test = row.last().unwrap().trim_matches('`');
        let (place, name) = test
            .split_once("::")
            .unwrap_or_else(|| panic!("{row:?} names no test"));
        let text = read(&root().join(file_of(place)));
        let is_there = text
            .lines()
            .zip(text.lines().skip(1))
            .any(|(above, line)| above.contains("test") && line.contains(&format!("fn {name}(")));
        assert!(is_there, "{place} has no test {name}");
    }
}

#[test]
fn every_setting_of_the_server_has_its_row() {
    let page = page();
    let fields = [
        serde_json::to_value(ClientConfig::default()).unwrap(),
        serde_json::to_value(DynamicConfig::default()).unwrap(),
    ];

    for field in fields
        .iter()
        .flat_map(|json| json.as_object().unwrap().keys())
    {
        assert!(page.contains(&format!("`{field}`")), "{field} has no row");
    }
}
