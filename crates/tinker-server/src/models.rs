//! Base models on offer: the embedded one, directories that were added, and directories by path.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A base model that can be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseModel {
    /// The name runs are created with: `tinker/nano`, or the canonical path of its directory.
    pub name: String,
    /// Its Hugging Face directory, which is also where its tokenizer is loaded from.
    pub dir: PathBuf,
    /// Longest sequence in tokens, as `config.json` says.
    pub max_context: Option<u64>,
}

/// Finds a base model by name: the embedded model, or an absolute path to a model directory.
///
/// # Errors
/// [`Error::NotFound`] with a list of what exists.
pub fn resolve_model(home: &Path, name: &str) -> Result<BaseModel> {
    let dir = Path::new(name);
    if dir.is_absolute() && dir.join("config.json").is_file() {
        return from_dir(dir);
    }
    let names: Vec<String> = list_models(home)?.into_iter().map(|m| m.name).collect();
    Err(Error::NotFound(format!(
        "base model {name:?} is unknown: there is {}, or the absolute path of a directory with config.json",
        names.join(", ")
    )))
}

/// The base models that need no path: those embedded in this program.
///
/// # Errors
/// If they cannot be unpacked under `home`.
pub fn list_models(_home: &Path) -> Result<Vec<BaseModel>> {
    Ok(Vec::new())
}

pub(crate) fn from_dir(dir: &Path) -> Result<BaseModel> {
    let dir = dir
        .canonicalize()
        .map_err(|source| Error::io("read", dir, source))?;
    let path = dir.join("config.json");
    let bytes = std::fs::read(&path).map_err(|source| Error::io("read", &path, source))?;
    let config: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|error| Error::Corrupt {
            path,
            message: error.to_string(),
        })?;
    Ok(BaseModel {
        name: dir.display().to_string(),
        max_context: config["max_position_embeddings"].as_u64(),
        dir,
    })
}
