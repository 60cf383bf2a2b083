//! What a killed server left on its disk: every directory of weights that can be seen is whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// The part of a manifest that says what is beside it.
#[derive(Deserialize)]
struct Manifest {
    files: BTreeMap<String, File>,
}

#[derive(Deserialize)]
struct File {
    size_bytes: u64,
    sha256: String,
}

/// What of the checkpoints, samplers and snapshots in a data directory is not whole, for people;
/// nothing if all is well. What is being written is elsewhere, in `tmp`.
pub(super) fn broken_weights(home: &Path) -> Vec<String> {
    let mut broken = Vec::new();
    for part in ["checkpoints", "samplers", "runs"] {
        let mut dirs = vec![home.join("server").join(part)];
        while let Some(dir) = dirs.pop() {
            let Ok(entries) = std::fs::read_dir(&dir) else {
                continue;
            };
            let paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a name").path()).collect();
            let is_bundle = paths.iter().any(|path| {
                let extension = path.extension().unwrap_or_default();
                extension == "safetensors" || extension == "json"
            });
            if is_bundle
                && !is_replaced(&dir)
                && let Err(fault) = check(&dir)
            {
                broken.push(format!("{}: {fault}", dir.display()));
            }
            dirs.extend(paths.into_iter().filter(|path| path.is_dir()));
        }
    }
    broken
}

/// Whether a directory was set aside for another, which is in its place: half of it may be removed.
/// While that is not there, this one is put back at the next start.
fn is_replaced(dir: &Path) -> bool {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let replaced = name
        .strip_prefix('.')
        .and_then(|name| name.strip_suffix(".old"));
    replaced.is_some_and(|name| dir.with_file_name(name).is_dir())
}

fn check(dir: &Path) -> Result<(), String> {
    let read = |name: &str| {
        std::fs::read(dir.join(name)).map_err(|error| format!("cannot read {name}: {error}"))
    };
    let manifest: Manifest =
        serde_json::from_slice(&read("manifest.json")?).map_err(|error| error.to_string())?;
    for (name, expected) in &manifest.files {
        let bytes = read(name)?;
        if bytes.len() as u64 != expected.size_bytes || sha256(&bytes) != expected.sha256 {
            return Err(format!("{name} is not what its manifest says"));
        }
    }
    Ok(())
}

/// SHA-256 in lower-case hexadecimal.
pub(super) fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
