//! Base models on offer: the embedded one, directories that were added, and directories by path.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tinker_engine::Quantization;

use crate::disk::{Disk, OsDisk, create_dir, remove_dir};
use crate::error::{Error, Result};

/// Name of the model inside this program.
const NANO: &str = "tinker/nano";

/// The files of the model inside this program.
/// A static, since a constant would be copied into every unit of code that reads it.
static NANO_FILES: &[(&str, &[u8])] = &[
    (
        "config.json",
        include_bytes!("../../../models/nano/config.json"),
    ),
    (
        "generation_config.json",
        include_bytes!("../../../models/nano/generation_config.json"),
    ),
    (
        "chat_template.jinja",
        include_bytes!("../../../models/nano/chat_template.jinja"),
    ),
    (
        "model.safetensors",
        include_bytes!("../../../models/nano/model.safetensors"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../../models/nano/tokenizer.json"),
    ),
    (
        "tokenizer_config.json",
        include_bytes!("../../../models/nano/tokenizer_config.json"),
    ),
];

/// What a tokenizer is loaded from; the rest of a model stays out of the hub cache.
const TOKENIZER_FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Files that other tokenizers have. A marker in the cache says that this one does not, which spares
/// clients without a network a long search for them.
const ABSENT_FILES: &[&str] = &[
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
];

/// A base model that can be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseModel {
    /// The name runs are created with: `tinker/nano`, or the canonical path of its directory.
    pub name: String,
    /// Its Hugging Face directory, which is also where its tokenizer is loaded from.
    pub dir: PathBuf,
    /// Longest sequence in tokens, as `config.json` says.
    pub max_context: Option<u64>,
    /// Architecture, as `config.json` says.
    pub architecture: Option<String>,
    /// Forty hexadecimal digits that change with the model's files, and `+` with the name of a
    /// [`Quantization`] where a server holds them with fewer bits: an adapter belongs to one revision. Of
    /// directories, `config.json` and the sizes of the safetensors files are looked at.
    pub revision: String,
}

/// Finds a base model by name: the embedded model, or an absolute path to a model directory.
///
/// The embedded model is unpacked under `home` when it is first asked for.
///
/// # Errors
/// [`Error::NotFound`] with a list of what exists.
pub fn resolve_model(home: &Path, name: &str) -> Result<BaseModel> {
    ModelRegistry::new(home.to_owned(), &[])?.resolve(name)
}

/// The base models that need no path: those embedded in this program.
///
/// # Errors
/// If they cannot be unpacked under `home`.
pub fn list_models(home: &Path) -> Result<Vec<BaseModel>> {
    ModelRegistry::new(home.to_owned(), &[])?.list()
}

/// The base models a server offers.
#[derive(Debug, Clone)]
pub(crate) struct ModelRegistry {
    home: PathBuf,
    added: Vec<BaseModel>,
    weights: Option<Quantization>,
}

impl ModelRegistry {
    /// The embedded model and the directories `added`.
    ///
    /// # Errors
    /// If a directory is not a model's.
    pub(crate) fn new(home: PathBuf, added: &[PathBuf]) -> Result<Self> {
        let added = added
            .iter()
            .map(|dir| from_dir(dir))
            .collect::<Result<_>>()?;
        Ok(Self {
            home,
            added,
            weights: None,
        })
    }

    /// Says in revisions that weights are held with fewer bits: what is trained on these fits no others.
    #[must_use]
    pub(crate) fn held_as(mut self, weights: Option<Quantization>) -> Self {
        self.weights = weights;
        self
    }

    /// With how many bits weights are held, if with fewer than in their files.
    pub(crate) const fn weights(&self) -> Option<Quantization> {
        self.weights
    }

    /// A base model by name or absolute path.
    ///
    /// # Errors
    /// [`Error::NotFound`] with a list of what exists.
    pub(crate) fn resolve(&self, name: &str) -> Result<BaseModel> {
        let mut model = self.find(name)?;
        if let Some(weights) = self.weights {
            model.revision = format!("{}+{}", model.revision, weights.name());
        }
        Ok(model)
    }

    fn find(&self, name: &str) -> Result<BaseModel> {
        if name == NANO {
            return self.nano();
        }
        if let Some(found) = self.added.iter().find(|model| model.name == name) {
            return Ok(found.clone());
        }
        let dir = Path::new(name);
        if dir.is_absolute() && dir.join("config.json").is_file() {
            return from_dir(dir);
        }
        let names: Vec<&str> = std::iter::once(NANO)
            .chain(self.added.iter().map(|model| model.name.as_str()))
            .collect();
        Err(Error::NotFound(format!(
            "base model {name:?} is unknown: there is {}, or the absolute path of a directory with config.json and safetensors",
            names.join(", ")
        )))
    }

    /// All models that have a name here.
    ///
    /// # Errors
    /// If the embedded model cannot be unpacked.
    pub(crate) fn list(&self) -> Result<Vec<BaseModel>> {
        let mut all = vec![self.nano()?];
        all.extend(self.added.iter().cloned());
        Ok(all)
    }

    /// The embedded model, unpacked to `<home>/models/tinker/nano/<hash>`.
    fn nano(&self) -> Result<BaseModel> {
        let root = self.home.join("models").join(NANO);
        let dir = root.join(nano_revision());
        if !dir.is_dir() {
            let temp = root.join(format!("{}.tmp", uuid::Uuid::now_v7()));
            let unpacked = unpack(NANO_FILES.iter().copied(), &temp)
                .and_then(|()| move_into_place(&temp, &dir));
            if unpacked.is_err() {
                // The unpacking error is the one to report.
                let _ = remove_dir(&temp);
            }
            unpacked?;
        }
        let described = from_dir(&dir)?;
        Ok(BaseModel {
            name: NANO.into(),
            revision: nano_revision().to_owned(),
            ..described
        })
    }

    /// Puts the embedded model's tokenizer into a Hugging Face hub cache, so that clients which
    /// load tokenizers by model name find it without a network.
    ///
    /// # Errors
    /// If the cache cannot be written.
    pub(crate) fn fill_hub_cache(&self, cache: &Path) -> Result<()> {
        let repository = cache.join("models--tinker--nano");
        let revision = nano_revision();
        let snapshot = repository.join("snapshots").join(revision);
        let reference = repository.join("refs").join("main");
        if !snapshot.is_dir() {
            let temp = repository.join(format!("{}.tmp", uuid::Uuid::now_v7()));
            let files = NANO_FILES.iter().copied();
            unpack(
                files.filter(|(name, _)| TOKENIZER_FILES.contains(name)),
                &temp,
            )?;
            create_dir(&OsDisk, &repository.join("snapshots"))?;
            move_into_place(&temp, &snapshot)?;
        }
        let absent = repository.join(".no_exist").join(revision);
        unpack(ABSENT_FILES.iter().map(|name| (*name, &[][..])), &absent)?;
        create_dir(&OsDisk, &repository.join("refs"))?;
        OsDisk
            .write_new(&reference, revision.as_bytes())
            .map_err(|e| Error::io("write", &reference, e))
    }
}

/// Forty hexadecimal digits over the embedded files, like a hub commit.
fn nano_revision() -> &'static str {
    static REVISION: OnceLock<String> = OnceLock::new();
    REVISION.get_or_init(|| {
        let mut hasher = blake3::Hasher::new();
        for (name, bytes) in NANO_FILES {
            hasher.update(name.as_bytes());
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        }
        hasher.finalize().to_hex().chars().take(40).collect()
    })
}

fn unpack<'a>(files: impl Iterator<Item = (&'a str, &'a [u8])>, dir: &Path) -> Result<()> {
    create_dir(&OsDisk, dir)?;
    for (name, bytes) in files {
        let path = dir.join(name);
        OsDisk
            .write_new(&path, bytes)
            .map_err(|e| Error::io("write", &path, e))?;
    }
    Ok(())
}

/// Renames a directory; another process that was quicker is fine.
fn move_into_place(temp: &Path, dir: &Path) -> Result<()> {
    match OsDisk.rename(temp, dir) {
        Err(_) if dir.is_dir() => remove_dir(temp),
        other => other.map_err(|e| Error::io("write", dir, e)),
    }
}

fn from_dir(dir: &Path) -> Result<BaseModel> {
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
        revision: dir_revision(&dir, &bytes)?,
        name: dir.display().to_string(),
        max_context: config["max_position_embeddings"].as_u64(),
        architecture: config["architectures"][0].as_str().map(str::to_owned),
        dir,
    })
}

fn dir_revision(dir: &Path, config: &[u8]) -> Result<String> {
    let fault = |error| Error::io("read", dir, error);
    let mut sizes = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(fault)? {
        let entry = entry.map_err(fault)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            // Followed through links, which hub caches consist of.
            let metadata = std::fs::metadata(entry.path()).map_err(fault)?;
            sizes.push(format!("{name} {}\n", metadata.len()));
        }
    }
    sizes.sort();
    let mut hasher = blake3::Hasher::new();
    hasher.update(config);
    hasher.update(sizes.concat().as_bytes());
    Ok(hasher.finalize().to_hex().chars().take(40).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_model_is_unpacked_once() {
        let home = tempfile::tempdir().unwrap();

        let first = resolve_model(home.path(), NANO).unwrap();
        let again = resolve_model(home.path(), NANO).unwrap();

        assert_eq!(first, again);
        assert_eq!(first.name, NANO);
        assert!(first.dir.join("model.safetensors").is_file());
        assert!(first.max_context.is_some());
    }

    #[test]
    fn an_unknown_model_lists_what_exists() {
        let home = tempfile::tempdir().unwrap();

        let error = resolve_model(home.path(), "meta/llama")
            .unwrap_err()
            .to_string();

        assert!(
            error.contains("\"meta/llama\" is unknown: there is tinker/nano"),
            "{error}"
        );
    }

    #[test]
    fn a_directory_is_named_by_its_canonical_path() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("m");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("config.json"), r#"{"max_position_embeddings":64}"#).unwrap();
        let roundabout = dir.join("..").join("m");

        let model = resolve_model(home.path(), roundabout.to_str().unwrap()).unwrap();

        assert_eq!(model.dir, dir.canonicalize().unwrap());
        assert_eq!(model.name, model.dir.display().to_string());
        assert_eq!(model.max_context, Some(64));
    }

    #[test]
    fn the_hub_cache_points_at_the_tokenizer() {
        let home = tempfile::tempdir().unwrap();
        let cache = home.path().join("hub");
        let registry = ModelRegistry::new(home.path().to_owned(), &[]).unwrap();

        registry.fill_hub_cache(&cache).unwrap();
        registry.fill_hub_cache(&cache).unwrap();

        let repository = cache.join("models--tinker--nano");
        let revision = std::fs::read_to_string(repository.join("refs/main")).unwrap();
        let snapshot = repository.join("snapshots").join(revision);
        assert!(snapshot.join("tokenizer.json").is_file());
        assert!(!snapshot.join("model.safetensors").exists());
    }
}
