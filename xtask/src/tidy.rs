//! `cargo xtask tidy`: the rules of the repository that the compiler does not know.
//!
//! Each rule is a function from facts to complaints, and all complaints are shown at once.

mod fixtures;
mod layers;
mod lock;
mod sources;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

pub(crate) fn run(root: &Path) -> Result<()> {
    let complaints = complaints(root)?;
    for complaint in &complaints {
        println!("tidy: {complaint}");
    }
    if !complaints.is_empty() {
        bail!("{} rules broken", complaints.len());
    }
    println!("tidy: ok");
    Ok(())
}

/// Everything that is wrong, as sentences that name the file or crate.
fn complaints(root: &Path) -> Result<Vec<String>> {
    let mut complaints = layers::check(root)?;
    complaints.extend(sources::check(root)?);
    complaints.extend(fixtures::check(root)?);
    complaints.extend(lock::check(&read(&root.join("Cargo.lock"))?));
    Ok(complaints)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Entries of a directory in order of name; empty if there is no such directory.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let read = std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut paths = read
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_is_tidy() {
        let complaints = complaints(&crate::repository_root().unwrap()).unwrap();

        assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    }
}
