//! A directory holding one saved adapter: PEFT files, optimizer state, and a manifest with checksums.
//!
//! Checkpoints, samplers that live with a session, and snapshots for recovery are all written this
//! way: into a temporary directory, synced, then renamed into place, so that a directory that can be
//! seen is whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tinker_engine::{AdapterState, LoraSpec, adapter};
use tinker_types::{LoraConfig, Timestamp, TinkerPath, TrainingRunId};

use crate::adapter_files::{
    OPTIMIZER_FILE, WEIGHTS_FILE, decode_state, encode_optimizer, encode_weights, target_modules,
};
use crate::disk::{Disk, create_dir, read_file, remove_dir, sync_dir};
use crate::error::{Error, Result};

/// The manifest format this program writes and the newest it reads.
pub(crate) const FORMAT_VERSION: u32 = 1;
const MANIFEST_FILE: &str = "manifest.json";
/// Name of PEFT's description of an adapter.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
const SET_ASIDE: &str = ".old";

/// What a bundle holds and where it comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format_version: u32,
    /// `weights`, `sampler_weights`, `sampler` or `snapshot`.
    pub(crate) kind: String,
    /// The checkpoint's path, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<TinkerPath>,
    pub(crate) run: TrainingRunId,
    pub(crate) base_model: String,
    /// Revision of the base model's files; the adapter fits no other.
    pub(crate) base_revision: String,
    pub(crate) lora: LoraConfig,
    /// Seed that the adapter was created with.
    pub(crate) seed: u64,
    /// Optimizer steps taken.
    pub(crate) step: u64,
    /// The run's last operation that is part of it.
    pub(crate) seq_id: u64,
    /// The operation that wrote it: the same one executed again finds its own work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request_id: Option<String>,
    /// The checkpoint that it is a copy of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) copied_from: Option<TinkerPath>,
    /// The first log segment after a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) log_segment: Option<u64>,
    /// Device and precision it was trained with.
    pub(crate) precision: String,
    pub(crate) server_version: String,
    pub(crate) created_at: Timestamp,
    pub(crate) files: BTreeMap<String, FileEntry>,
}

/// Size and checksum of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileEntry {
    pub(crate) size_bytes: u64,
    /// SHA-256, lower-case hexadecimal.
    pub(crate) sha256: String,
}

impl Manifest {
    /// How the adapter was created.
    pub(crate) const fn spec(&self) -> LoraSpec {
        LoraSpec {
            rank: self.lora.rank as usize,
            seed: self.seed,
            train_attn: self.lora.train_attn,
            train_mlp: self.lora.train_mlp,
            train_unembed: self.lora.train_unembed,
        }
    }

    /// Bytes of all files.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.files.values().map(|f| f.size_bytes).sum()
    }
}

/// PEFT's description of an adapter.
#[derive(Serialize)]
struct PeftConfig<'a> {
    peft_type: &'static str,
    task_type: &'static str,
    base_model_name_or_path: &'a str,
    r: u32,
    lora_alpha: f32,
    lora_dropout: f32,
    bias: &'static str,
    fan_in_fan_out: bool,
    inference_mode: bool,
    /// Listed always: without it PEFT guesses, and silently loads a part of the adapter.
    target_modules: Vec<String>,
}

/// Writes a bundle. `manifest.files` is filled in; the optimizer's state is included on demand.
///
/// With `replace`, a bundle that is there is moved out of the way first.
///
/// # Errors
/// If the disk refuses; nothing is left behind, and what was there is still there.
pub(crate) fn write(
    disk: &dyn Disk,
    temp_root: &Path,
    dir: &Path,
    manifest: Manifest,
    state: &AdapterState,
    with_optimizer: bool,
    replace: bool,
) -> Result<Manifest> {
    write_aside(disk, temp_root, manifest, state, with_optimizer)?.install(disk, dir, replace)
}

/// A bundle that is written and on the disk, and not yet in its place.
pub(crate) struct Aside {
    temp: PathBuf,
    manifest: Manifest,
}

impl Aside {
    /// Moves it to its place; with `replace`, a bundle that is there is moved out of the way first.
    ///
    /// # Errors
    /// If the disk refuses; nothing is left behind, and what was there is still there.
    pub(crate) fn install(self, disk: &dyn Disk, dir: &Path, replace: bool) -> Result<Manifest> {
        let installed = install(disk, &self.temp, dir, replace);
        if installed.is_err() {
            // The error that was first is the one to report.
            let _ = remove_dir(&self.temp);
        }
        installed.map(|()| self.manifest)
    }
}

/// Writes a bundle as [`write`](write()) does, for [`Aside::install`] to move it to its place.
///
/// # Errors
/// If the disk refuses; nothing is left behind.
pub(crate) fn write_aside(
    disk: &dyn Disk,
    temp_root: &Path,
    mut manifest: Manifest,
    state: &AdapterState,
    with_optimizer: bool,
) -> Result<Aside> {
    let mut files: Vec<(&str, Vec<u8>)> = vec![
        (WEIGHTS_FILE, encode_weights(state)?),
        (CONFIG_FILE, peft_config(&manifest, state)?),
    ];
    if with_optimizer {
        files.push((OPTIMIZER_FILE, encode_optimizer(state)?));
    }
    manifest.files = files
        .iter()
        .map(|(name, bytes)| ((*name).to_owned(), file_entry(bytes)))
        .collect();
    put_aside(disk, temp_root, manifest, files)
}

/// Copies a bundle's files, checking every checksum, beside a manifest that `edit` has changed.
///
/// # Errors
/// [`Error::NotFound`] if there is none, [`Error::Corrupt`] naming a damaged file, or the disk
/// refuses; nothing is left behind.
pub(crate) fn copy(
    disk: &dyn Disk,
    temp_root: &Path,
    from: &Path,
    to: &Path,
    edit: impl FnOnce(&mut Manifest),
) -> Result<Manifest> {
    let mut manifest = present_manifest(disk, from)?;
    let names: Vec<String> = manifest.files.keys().cloned().collect();
    let mut files = Vec::new();
    for name in &names {
        files.push((name.as_str(), read_checked(disk, from, &manifest, name)?));
    }
    edit(&mut manifest);
    put_aside(disk, temp_root, manifest, files)?.install(disk, to, false)
}

/// Writes files with their manifest into a new directory.
fn put_aside(
    disk: &dyn Disk,
    temp_root: &Path,
    manifest: Manifest,
    mut files: Vec<(&str, Vec<u8>)>,
) -> Result<Aside> {
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::Invalid(e.to_string()))?;
    files.push((MANIFEST_FILE, text));
    let temp = temp_root.join(uuid::Uuid::now_v7().to_string());
    if let Err(error) = write_files(disk, &temp, &files) {
        // The write error is the one to report.
        let _ = remove_dir(&temp);
        return Err(error);
    }
    Ok(Aside { temp, manifest })
}

fn write_files(disk: &dyn Disk, temp: &Path, files: &[(&str, Vec<u8>)]) -> Result<()> {
    create_dir(disk, temp)?;
    for (name, bytes) in files {
        let path = temp.join(name);
        disk.write_new(&path, bytes)
            .map_err(|e| Error::io("write", &path, e))?;
    }
    sync_dir(temp).map_err(|e| Error::io("write", temp, e))
}

fn install(disk: &dyn Disk, temp: &Path, dir: &Path, replace: bool) -> Result<()> {
    let fault = |e| Error::io("write", dir, e);
    if let Some(parent) = dir.parent() {
        create_dir(disk, parent)?;
    }
    let old = set_aside(dir);
    let replaced = replace && dir.exists();
    if replaced {
        remove_dir(&old)?;
        disk.rename(dir, &old).map_err(fault)?;
    }
    if let Err(error) = disk.rename(temp, dir) {
        if replaced {
            disk.rename(&old, dir).map_err(fault)?;
        }
        return Err(fault(error));
    }
    if replaced && let Err(error) = remove_dir(&old) {
        // The new one is in its place; the next start tries again.
        tracing::warn!(
            error = error.with_causes(),
            "cannot remove a replaced bundle"
        );
    }
    Ok(())
}

/// Where a bundle is while another takes its place. No bundle's own name begins with a dot.
fn set_aside(dir: &Path) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    dir.with_file_name(format!(".{name}{SET_ASIDE}"))
}

/// Removes what a replacement left beside a bundle, so that it does not come back.
///
/// # Errors
/// If the disk refuses.
pub(crate) fn forget_replaced(dir: &Path) -> Result<()> {
    remove_dir(&set_aside(dir))
}

/// Goes through a directory tree for bundles whose replacement a crash cut short: those whose place
/// is empty are put back, the others are removed.
///
/// # Errors
/// If the disk refuses.
pub(crate) fn restore_replaced(disk: &dyn Disk, root: &Path) -> Result<()> {
    let fault = |e| Error::io("read", root, e);
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fault(error)),
    };
    for entry in entries {
        let entry = entry.map_err(fault)?;
        if !entry.file_type().map_err(fault)?.is_dir() {
            continue;
        }
        let (path, name) = (entry.path(), entry.file_name());
        let replaced = name
            .to_str()
            .and_then(|n| n.strip_prefix('.')?.strip_suffix(SET_ASIDE));
        let Some(target) = replaced.map(|name| path.with_file_name(name)) else {
            restore_replaced(disk, &path)?;
            continue;
        };
        if target.exists() {
            remove_dir(&path)?;
        } else {
            tracing::warn!(path = %target.display(), "a crash cut its replacement short; it is as before");
            disk.rename(&path, &target)
                .map_err(|e| Error::io("write", &target, e))?;
        }
    }
    Ok(())
}

/// Reads the manifest of a bundle; `None` if there is no bundle.
///
/// # Errors
/// If it is damaged or was written by a newer version.
pub(crate) fn read_manifest(disk: &dyn Disk, dir: &Path) -> Result<Option<Manifest>> {
    let path = dir.join(MANIFEST_FILE);
    let bytes = match read_file(disk, &path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", &path, error)),
    };
    let corrupt = |message: String| Error::Corrupt {
        path: path.clone(),
        message,
    };
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
    if manifest.format_version > FORMAT_VERSION {
        return Err(Error::Newer {
            message: format!(
                "its format version {} is newer than this program's {FORMAT_VERSION}: use a newer tinker",
                manifest.format_version
            ),
            path,
        });
    }
    Ok(Some(manifest))
}

/// Reads the manifest of a bundle that must be there.
///
/// # Errors
/// [`Error::NotFound`] if it is not, and as [`read_manifest`].
pub(crate) fn present_manifest(disk: &dyn Disk, dir: &Path) -> Result<Manifest> {
    read_manifest(disk, dir)?
        .ok_or_else(|| Error::NotFound(format!("there is no saved adapter in {}", dir.display())))
}

/// Reads a bundle back, checking every checksum.
///
/// # Errors
/// [`Error::NotFound`] if there is none; [`Error::Corrupt`] naming the damaged file.
pub(crate) fn read(
    disk: &dyn Disk,
    dir: &Path,
    with_optimizer: bool,
) -> Result<(Manifest, AdapterState)> {
    let manifest = present_manifest(disk, dir)?;
    let weights = read_checked(disk, dir, &manifest, WEIGHTS_FILE)?;
    let optimizer = if with_optimizer {
        Some(read_checked(disk, dir, &manifest, OPTIMIZER_FILE)?)
    } else {
        None
    };
    let with_step = optimizer.as_deref().map(|bytes| (bytes, manifest.step));
    let state = decode_state(dir, manifest.spec(), &weights, with_step)?;
    Ok((manifest, state))
}

/// Checks every file of a bundle against its manifest; a directory without one is fine.
///
/// # Errors
/// [`Error::Corrupt`] naming the damaged file, or it cannot be read.
pub(crate) fn verify(disk: &dyn Disk, dir: &Path) -> Result<()> {
    let Some(manifest) = read_manifest(disk, dir)? else {
        return Ok(());
    };
    let mut names = manifest.files.keys();
    names.try_for_each(|name| read_checked(disk, dir, &manifest, name).map(drop))
}

fn read_checked(disk: &dyn Disk, dir: &Path, manifest: &Manifest, name: &str) -> Result<Vec<u8>> {
    let path: PathBuf = dir.join(name);
    let corrupt = |message: String| Error::Corrupt {
        path: path.clone(),
        message,
    };
    let expected = manifest
        .files
        .get(name)
        .ok_or_else(|| corrupt("the manifest does not list it".into()))?;
    let bytes = read_file(disk, &path).map_err(|e| Error::io("read", &path, e))?;
    if file_entry(&bytes) != *expected {
        return Err(corrupt(format!(
            "{} bytes whose checksum is not the manifest's",
            bytes.len()
        )));
    }
    Ok(bytes)
}

fn file_entry(bytes: &[u8]) -> FileEntry {
    let digest = Sha256::digest(bytes);
    FileEntry {
        size_bytes: bytes.len() as u64,
        sha256: digest.iter().map(|b| format!("{b:02x}")).collect(),
    }
}

fn peft_config(manifest: &Manifest, state: &AdapterState) -> Result<Vec<u8>> {
    let config = PeftConfig {
        peft_type: "LORA",
        task_type: "CAUSAL_LM",
        base_model_name_or_path: &manifest.base_model,
        r: manifest.lora.rank,
        lora_alpha: adapter::ALPHA,
        lora_dropout: 0.0,
        bias: "none",
        fan_in_fan_out: false,
        inference_mode: true,
        target_modules: target_modules(state),
    };
    serde_json::to_vec_pretty(&config).map_err(|e| Error::Invalid(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::OsDisk;
    use std::fs::File;
    use std::io;
    use std::sync::atomic::{AtomicI64, Ordering};

    /// A disk that is gone after a number of renames, as for a killed process.
    #[derive(Debug)]
    struct GoneAfter(AtomicI64);

    impl Disk for GoneAfter {
        fn create_dir_all(&self, path: &Path) -> io::Result<()> {
            OsDisk.create_dir_all(path)
        }
        fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
            OsDisk.write_new(path, bytes)
        }
        fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()> {
            OsDisk.append(file, path, bytes)
        }
        fn truncate(&self, file: &File, len: u64) -> io::Result<()> {
            OsDisk.truncate(file, len)
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            if self.0.fetch_sub(1, Ordering::SeqCst) > 0 {
                return OsDisk.rename(from, to);
            }
            Err(io::ErrorKind::Other.into())
        }
    }

    fn bundle(path: &Path, content: &[u8]) {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join(WEIGHTS_FILE), content).unwrap();
    }

    /// Replaces a bundle on a disk that takes `renames`, then starts again; what is there then.
    fn after_crash(renames: i64) -> Vec<u8> {
        let root = tempfile::tempdir().unwrap();
        let (temp, dir) = (root.path().join("tmp/1"), root.path().join("run/weights/x"));
        bundle(&dir, b"old");
        bundle(&temp, b"new");
        let disk = GoneAfter(AtomicI64::new(renames));

        assert_eq!(install(&disk, &temp, &dir, true).is_ok(), renames >= 2);
        restore_replaced(&OsDisk, root.path()).unwrap();

        assert_eq!(fs::read_dir(dir.parent().unwrap()).unwrap().count(), 1);
        fs::read(dir.join(WEIGHTS_FILE)).unwrap()
    }

    #[test]
    fn a_crash_between_two_renames_keeps_the_old_bundle() {
        assert_eq!(after_crash(0), b"old");
        assert_eq!(after_crash(1), b"old");
        assert_eq!(after_crash(2), b"new");
    }

    #[test]
    fn what_was_replaced_does_not_come_back() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("x");
        bundle(&dir, b"new");
        bundle(&set_aside(&dir), b"old");

        restore_replaced(&OsDisk, root.path()).unwrap();

        assert_eq!(fs::read(dir.join(WEIGHTS_FILE)).unwrap(), b"new");
        assert!(!set_aside(&dir).exists());
    }
}
