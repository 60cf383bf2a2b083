//! `cargo xtask dist`: a release archive that is the same to the byte for the same binary.

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use sha2::{Digest as _, Sha256};

use crate::process::{cargo, check, command, output, target_dir};

/// Name of the binary on this platform.
pub(crate) const BINARY: &str = if cfg!(windows) {
    "tinker.exe"
} else {
    "tinker"
};
/// What travels beside the binary.
const DOCUMENTS: [&str; 4] = ["README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT"];

pub(crate) fn run(root: &Path) -> Result<()> {
    check(&mut cargo(
        root,
        ["build", "--release", "--locked", "--package", "tinker"],
    ))?;
    let target = target_dir(root);
    let name = format!("tinker-{}-{}", env!("CARGO_PKG_VERSION"), host(root)?);
    let dist = target.join("dist");
    std::fs::create_dir_all(&dist).with_context(|| format!("cannot make {}", dist.display()))?;
    let program = target.join("release").join(BINARY);
    let mut files = vec![(BINARY.to_owned(), program, 0o755)];
    files.extend(DOCUMENTS.map(|document| (document.to_owned(), root.join(document), 0o644)));

    let archive = archive(&name, &files)?;
    let digest: String = Sha256::digest(&archive)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let path = dist.join(format!("{name}.tar.gz"));
    std::fs::write(&path, &archive).with_context(|| format!("cannot write {}", path.display()))?;
    let sum = format!("{digest}  {name}.tar.gz\n");
    std::fs::write(dist.join(format!("{name}.tar.gz.sha256")), &sum).context("cannot write sum")?;
    println!(
        "{} ({:.1} MB)\n{sum}",
        path.display(),
        archive.len() as f64 / 1e6
    );
    Ok(())
}

/// A gzipped tar of `(name in the archive, file, mode)` under the directory `top`; no times, no owners.
pub(crate) fn archive(top: &str, files: &[(String, std::path::PathBuf, u32)]) -> Result<Vec<u8>> {
    let gzip = GzBuilder::new()
        .mtime(0)
        .write(Vec::new(), Compression::best());
    let mut tar = tar::Builder::new(gzip);
    for (name, path, mode) in files {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut header = tar::Header::new_ustar();
        header.set_size(file.metadata()?.len());
        header.set_mode(*mode);
        header.set_mtime(0);
        tar.append_data(&mut header, format!("{top}/{name}"), file)
            .with_context(|| format!("cannot pack {}", path.display()))?;
    }
    Ok(tar.into_inner()?.finish()?)
}

/// The target triple that `rustc` builds for by default.
fn host(root: &Path) -> Result<String> {
    let text = output(&mut command(root, "rustc", ["-vV"]))?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(String::from).context("`rustc -vV` names no host")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_depends_on_content_and_mode_only() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };

        let pack = |file| archive("top", &[("tool".to_owned(), file, 0o755)]).unwrap();
        let first = pack(make("a", "same"));
        let second = pack(make("b", "same"));
        let other = pack(make("c", "other"));

        assert_eq!(first, second);
        assert_ne!(first, other);
    }
}
