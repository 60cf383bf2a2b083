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
use crate::disk::{Disk, create_dir, remove_dir, sync_dir};
use crate::error::{Error, Result};

/// The manifest format this program writes and the newest it reads.
pub(crate) const FORMAT_VERSION: u32 = 1;
const MANIFEST_FILE: &str = "manifest.json";
const CONFIG_FILE: &str = "adapter_config.json";

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
    mut manifest: Manifest,
    state: &AdapterState,
    with_optimizer: bool,
    replace: bool,
) -> Result<Manifest> {
    let mut files = vec![
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
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::Invalid(e.to_string()))?;
    files.push((MANIFEST_FILE, text));
    let temp = temp_root.join(uuid::Uuid::now_v7().to_string());
    let written =
        write_files(disk, &temp, &files).and_then(|()| install(disk, &temp, dir, replace));
    if written.is_err() {
        // The write error is the one to report.
        let _ = remove_dir(&temp);
    }
    written.map(|()| manifest)
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
    let old = temp.with_extension("old");
    let replaced = replace && dir.exists();
    if replaced {
        disk.rename(dir, &old).map_err(fault)?;
    }
    if let Err(error) = disk.rename(temp, dir) {
        if replaced {
            disk.rename(&old, dir).map_err(fault)?;
        }
        return Err(fault(error));
    }
    if replaced { remove_dir(&old) } else { Ok(()) }
}

/// Reads the manifest of a bundle; `None` if there is no bundle.
///
/// # Errors
/// If it is damaged or was written by a newer version.
pub(crate) fn read_manifest(dir: &Path) -> Result<Option<Manifest>> {
    let path = dir.join(MANIFEST_FILE);
    let bytes = match fs::read(&path) {
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
        return Err(corrupt(format!(
            "its format version {} is newer than this program's {FORMAT_VERSION}: use a newer tinker",
            manifest.format_version
        )));
    }
    Ok(Some(manifest))
}

/// Reads a bundle back, checking every checksum.
///
/// # Errors
/// [`Error::NotFound`] if there is none; [`Error::Corrupt`] naming the damaged file.
pub(crate) fn read(dir: &Path, with_optimizer: bool) -> Result<(Manifest, AdapterState)> {
    let manifest = read_manifest(dir)?.ok_or_else(|| {
        Error::NotFound(format!("there is no saved adapter in {}", dir.display()))
    })?;
    let weights = read_checked(dir, &manifest, WEIGHTS_FILE)?;
    let optimizer = if with_optimizer {
        Some(read_checked(dir, &manifest, OPTIMIZER_FILE)?)
    } else {
        None
    };
    let with_step = optimizer.as_deref().map(|bytes| (bytes, manifest.step));
    let state = decode_state(dir, manifest.spec(), &weights, with_step)?;
    Ok((manifest, state))
}

fn read_checked(dir: &Path, manifest: &Manifest, name: &str) -> Result<Vec<u8>> {
    let path: PathBuf = dir.join(name);
    let corrupt = |message: String| Error::Corrupt {
        path: path.clone(),
        message,
    };
    let expected = manifest
        .files
        .get(name)
        .ok_or_else(|| corrupt("the manifest does not list it".into()))?;
    let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
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
