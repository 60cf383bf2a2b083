//! Data that somebody made must say how: each directory of fixtures, models and data has a README.

use std::path::Path;

use anyhow::Result;

use super::entries;

pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for parent in ["fixtures", "models"] {
        for dir in entries(&root.join(parent))?
            .into_iter()
            .filter(|path| path.is_dir())
        {
            require_readme(root, &dir, &mut complaints);
        }
    }
    require_readme(root, &root.join("examples/data"), &mut complaints);
    Ok(complaints)
}

fn require_readme(root: &Path, dir: &Path, complaints: &mut Vec<String>) {
    if dir.is_dir() && !dir.join("README.md").is_file() {
        let name = dir.strip_prefix(root).unwrap_or(dir).display();
        complaints.push(format!(
            "{name}: no README.md says where its files come from"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixture_without_source_is_refused() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("fixtures/wire")).unwrap();

        let before = check(root.path()).unwrap();
        std::fs::write(root.path().join("fixtures/wire/README.md"), "recorded").unwrap();
        let after = check(root.path()).unwrap();

        assert_eq!(
            before,
            ["fixtures/wire: no README.md says where its files come from"]
        );
        assert!(after.is_empty());
    }
}
