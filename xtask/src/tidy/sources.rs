//! Rules over source files: a head on each, their length, pure `machine/`, no forgotten tests.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{entries, read};

/// Longest file, tests included.
const MAX_LINES: usize = 1000;
/// Where no clock, randomness, runtime or network may be: `now` and random draws are arguments.
const PURE_DIR: &str = "crates/tinker-http/src/machine";
/// Any of these in code under [`PURE_DIR`] breaks its promise.
const IMPURE: &[&str] = &[
    "::now()",
    "async ",
    ".await",
    "fastrand",
    "getrandom",
    "rand::",
    "reqwest",
    "std::env",
    "std::fs",
    "std::net",
    "std::thread",
    "tokio",
    "uuid",
];
/// Any of these in code anywhere is unfinished or switched-off work.
const UNFINISHED: &[&str] = &[
    concat!("#[", "ignore"),
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
];

pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for dir in ["crates", "examples", "xtask"] {
        for file in rust_files(&root.join(dir))? {
            let name = file.strip_prefix(root).unwrap_or(&file).to_path_buf();
            complaints.extend(check_text(&name, &read(&file)?));
        }
    }
    for member in entries(&root.join("crates"))?
        .into_iter()
        .chain([root.join("xtask")])
    {
        complaints.extend(check_tests(root, &member)?);
    }
    Ok(complaints)
}

/// Every `.rs` file below `dir`, build output left out.
fn rust_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in entries(dir)? {
        if path.is_dir() && !path.ends_with("target") && !path.ends_with("node_modules") {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(files)
}

fn check_text(file: &Path, text: &str) -> Vec<String> {
    let name = file.display();
    let mut complaints = Vec::new();
    if !text.starts_with("//!") {
        complaints.push(format!(
            "{name}: no `//!` paragraph says what this module decides"
        ));
    }
    let n_lines = text.lines().count();
    if n_lines > MAX_LINES {
        complaints.push(format!(
            "{name}: {n_lines} lines, at most {MAX_LINES}: split by noun"
        ));
    }
    let is_pure = file.starts_with(PURE_DIR);
    let first_test_line = text.lines().position(|line| line.trim() == "#[cfg(test)]");
    for (i, line) in text.lines().enumerate() {
        let at = i + 1;
        if let Some(word) = UNFINISHED.iter().find(|word| line.contains(**word)) {
            complaints.push(format!("{name}:{at}: `{word}` is unfinished work"));
        }
        if !is_pure || first_test_line.is_some_and(|first| i > first) {
            continue;
        }
        let code = line.split("//").next().unwrap_or(line);
        if let Some(word) = IMPURE.iter().find(|word| code.contains(**word)) {
            complaints.push(format!(
                "{name}:{at}: `{word}` in pure code: take it as an argument"
            ));
        }
    }
    complaints
}

/// One integration binary, `tests/it/main.rs`, and no file that it forgets.
fn check_tests(root: &Path, member: &Path) -> Result<Vec<String>> {
    let tests = member.join("tests");
    let mut complaints = Vec::new();
    for path in entries(&tests)? {
        if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root).unwrap_or(&path).display();
            complaints.push(format!(
                "{name}: a second test binary; make it a module of tests/it"
            ));
        }
    }
    let it = tests.join("it");
    if it.is_dir() {
        complaints.extend(forgotten_files(root, &it, &it.join("main.rs"))?);
    }
    Ok(complaints)
}

/// Files in `dir` that `parent`, the module they belong to, has no `mod` line for.
fn forgotten_files(root: &Path, dir: &Path, parent: &Path) -> Result<Vec<String>> {
    if !parent.is_file() {
        let name = parent.strip_prefix(root).unwrap_or(parent).display();
        return Ok(vec![format!(
            "{name}: missing, so that nothing in its directory runs"
        )]);
    }
    let text = read(parent)?;
    let mut complaints = Vec::new();
    for path in entries(dir)? {
        let Some(stem) = path.file_stem().and_then(|stem| stem.to_str()) else {
            continue;
        };
        let is_rust = path.extension().is_some_and(|extension| extension == "rs");
        let holds_rust = path.is_dir() && !rust_files(&path)?.is_empty();
        if path == parent || !(is_rust || holds_rust) {
            continue;
        }
        if !text
            .lines()
            .any(|line| line.trim().ends_with(&format!("mod {stem};")))
        {
            let name = path.strip_prefix(root).unwrap_or(&path).display();
            complaints.push(format!("{name}: no `mod {stem};` runs it"));
        } else if holds_rust {
            let inner = path.join("mod.rs");
            let parent = if inner.is_file() {
                inner
            } else {
                path.with_extension("rs")
            };
            complaints.extend(forgotten_files(root, &path, &parent)?);
        }
    }
    Ok(complaints)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_one(file: &str, text: &str, expect: &[&str]) {
        assert_eq!(check_text(Path::new(file), text), expect);
    }

    #[test]
    fn clock_in_machine_is_refused_but_not_in_its_comments_tests_or_elsewhere() {
        let code = "//! Head.\nlet now = Instant::now();\n// Not Instant::now() here.\n\
                    #[cfg(test)]\nlet start = Instant::now();\n";

        check_one(
            "crates/tinker-http/src/machine/retry.rs",
            code,
            &[
                "crates/tinker-http/src/machine/retry.rs:2: `::now()` in pure code: take it as an argument",
            ],
        );
        check_one("crates/tinker-http/src/clock.rs", code, &[]);
    }

    #[test]
    fn missing_head_and_long_file_are_refused() {
        let long = "line\n".repeat(1001);

        check_one(
            "crates/a/src/lib.rs",
            &long,
            &[
                "crates/a/src/lib.rs: no `//!` paragraph says what this module decides",
                "crates/a/src/lib.rs: 1001 lines, at most 1000: split by noun",
            ],
        );
    }

    #[test]
    fn switched_off_test_is_refused() {
        let word = UNFINISHED[0];
        let text = format!("//! Head.\n{word}]\n");
        let expect = format!("crates/a/src/lib.rs:2: `{word}` is unfinished work");

        check_one("crates/a/src/lib.rs", &text, &[&expect]);
    }

    #[test]
    fn forgotten_test_files_and_second_binaries_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("a/tests/it/main.rs", "//! Head.\nmod named;\nmod group;\n");
        write("a/tests/it/named.rs", "");
        write("a/tests/it/forgotten.rs", "");
        write("a/tests/it/group/mod.rs", "mod known;\n");
        write("a/tests/it/group/known.rs", "");
        write("a/tests/it/group/lost.rs", "");
        write("a/tests/it/data/case.txt", "");
        write("a/tests/second.rs", "");

        let complaints = check_tests(root.path(), &root.path().join("a")).unwrap();

        assert_eq!(
            complaints,
            [
                "a/tests/second.rs: a second test binary; make it a module of tests/it",
                "a/tests/it/forgotten.rs: no `mod forgotten;` runs it",
                "a/tests/it/group/lost.rs: no `mod lost;` runs it",
            ]
        );
    }
}
