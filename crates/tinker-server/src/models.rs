//! Base models on offer: the embedded one, directories that were added, and directories by path.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tinker_engine::{Precision, Quantization};

use crate::core::lock;
use crate::disk::{Disk, OsDisk, create_dir, remove_dir};
use crate::error::{Error, Result};

/// Name of the model inside this program.
const NANO: &str = "tinker/nano";

/// The files of the model inside this program but its weights.
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
        "tokenizer.json",
        include_bytes!("../../../models/nano/tokenizer.json"),
    ),
    (
        "tokenizer_config.json",
        include_bytes!("../../../models/nano/tokenizer_config.json"),
    ),
];

/// Its weights, packed by `build.rs`.
static NANO_WEIGHTS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/nano.zst"));
const NANO_WEIGHTS_FILE: &str = "model.safetensors";

/// Forty hexadecimal digits over its files, like a hub commit: adapters belong to it. Written down, so that
/// weights are unpacked once and not whenever a server starts.
const NANO_REVISION: &str = "21c38f90d1d2fd1c94940f3b851a9349eab45273";

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
    /// The name runs are created with: `tinker/nano`, one that the server was given for a directory, or
    /// the canonical path of the directory.
    pub name: String,
    /// Its Hugging Face directory, which is also where its tokenizer is loaded from.
    pub dir: PathBuf,
    /// Longest sequence in tokens, as `config.json` says.
    pub max_context: Option<u64>,
    /// Architecture, as `config.json` says.
    pub architecture: Option<String>,
    /// Forty hexadecimal digits that change with the model's files; `+` with the name of a [`Quantization`]
    /// where a server holds them with fewer bits, and `+bf16` where it computes so: an adapter belongs to
    /// one revision. Of directories, `config.json` and the sizes of the safetensors files are looked at.
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

/// Whether a server can offer a directory under this name: the kind that hubs have, `owner/model`, not
/// one that means something else already.
///
/// # Errors
/// What is wrong with it.
pub fn check_model_name(name: &str) -> std::result::Result<(), String> {
    let is_part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.:".contains(c))
    };
    if name == NANO {
        return Err(format!("`{NANO}` is the model inside this program"));
    }
    if name.contains("://") || !name.split('/').all(is_part) || name.split('/').count() > 2 {
        return Err(format!(
            "`{name}` is no name for a model: write one such as `owner/model`, of letters, digits and -_.:"
        ));
    }
    Ok(())
}

/// The base models a server offers.
#[derive(Debug, Clone)]
pub(crate) struct ModelRegistry {
    home: PathBuf,
    added: Vec<BaseModel>,
    weights: Option<Quantization>,
    precision: Precision,
    /// Held by the one who unpacks the embedded model.
    unpacking: Arc<Mutex<()>>,
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
            precision: Precision::default(),
            unpacking: Arc::default(),
        })
    }

    /// Offers more directories, under names: programs that are written for a model of that name find it.
    ///
    /// # Errors
    /// If a directory is not a model's, or a name cannot be given (see [`check_model_name`]).
    pub(crate) fn with_names(mut self, named: &BTreeMap<String, PathBuf>) -> Result<Self> {
        for (name, dir) in named {
            check_model_name(name).map_err(Error::Invalid)?;
            self.added.push(BaseModel {
                name: name.clone(),
                ..from_dir(dir)?
            });
        }
        Ok(self)
    }

    /// Says in revisions that weights are held, or multiplied, with fewer bits: what is trained on these
    /// fits no others.
    #[must_use]
    pub(crate) fn held_as(mut self, weights: Option<Quantization>, precision: Precision) -> Self {
        self.weights = weights;
        self.precision = precision;
        self
    }

    /// With how many bits weights are held, if with fewer than in their files.
    pub(crate) const fn weights(&self) -> Option<Quantization> {
        self.weights
    }

    /// What they are computed in.
    pub(crate) const fn precision(&self) -> Precision {
        self.precision
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
        if self.precision != Precision::default() {
            model.revision = format!("{}+{}", model.revision, self.precision.name());
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
        let dir = root.join(NANO_REVISION);
        make_once(&self.unpacking, &dir, || {
            let temp = root.join(format!("{}.tmp", uuid::Uuid::now_v7()));
            let unpacked = unpack(NANO_FILES.iter().copied(), &temp)
                .and_then(|()| write(&temp, NANO_WEIGHTS_FILE, &nano_weights()?))
                .and_then(|()| move_into_place(&temp, &dir));
            if unpacked.is_err() {
                // The unpacking error is the one to report.
                let _ = remove_dir(&temp);
            }
            unpacked
        })?;
        let described = from_dir(&dir)?;
        Ok(BaseModel {
            name: NANO.into(),
            revision: NANO_REVISION.to_owned(),
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
        let revision = NANO_REVISION;
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

/// Makes a directory that is not there. Of several who want it at once one makes it, and the others wait:
/// hundreds of clients that start together would else unpack a model each.
fn make_once(making: &Mutex<()>, dir: &Path, make: impl FnOnce() -> Result<()>) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let _making = lock(making);
    if dir.is_dir() { Ok(()) } else { make() }
}

/// The weights of the embedded model as their file has them; `build.rs` says how they are packed.
fn nano_weights() -> Result<Vec<u8>> {
    let unreadable = |source| Error::io("unpack", Path::new(NANO_WEIGHTS_FILE), source);
    let halves = zstd::decode_all(NANO_WEIGHTS).map_err(unreadable)?;
    let (even, odd) = halves.split_at(halves.len().div_ceil(2));
    let mut weights = vec![0; halves.len()];
    for (pair, i) in weights.chunks_mut(2).zip(0..) {
        for (to, from) in pair.iter_mut().zip([even, odd]) {
            *to = from[i];
        }
    }
    Ok(weights)
}

fn unpack<'a>(files: impl Iterator<Item = (&'a str, &'a [u8])>, dir: &Path) -> Result<()> {
    create_dir(&OsDisk, dir)?;
    for (name, bytes) in files {
        write(dir, name, bytes)?;
    }
    Ok(())
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    OsDisk
        .write_new(&path, bytes)
        .map_err(|e| Error::io("write", &path, e))
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
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn the_embedded_model_is_that_of_the_repository_and_its_revision_that_of_the_files() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
        let weights = nano_weights().unwrap();
        assert!(weights == std::fs::read(repository.join(NANO_WEIGHTS_FILE)).unwrap());

        let mut hasher = blake3::Hasher::new();
        let mut files = NANO_FILES.to_vec();
        files.insert(3, (NANO_WEIGHTS_FILE, &weights));
        for (name, bytes) in files {
            hasher.update(name.as_bytes());
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        }
        let revision = hasher.finalize().to_hex();
        assert_eq!(&revision[..40], NANO_REVISION);
    }

    #[test]
    fn of_several_who_want_a_directory_at_once_one_makes_it() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("made");
        let (making, n_made) = (Mutex::default(), AtomicUsize::new(0));
        let all_there = Barrier::new(4);
        let want = || {
            all_there.wait();
            make_once(&making, &dir, || {
                n_made.fetch_add(1, Ordering::Relaxed);
                create_dir(&OsDisk, &dir)
            })
        };

        std::thread::scope(|scope| {
            let wanting = [(); 4].map(|()| scope.spawn(want));
            for wants in wanting {
                wants.join().unwrap().unwrap();
            }
        });

        assert_eq!(n_made.into_inner(), 1);
    }

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
    fn a_directory_is_found_by_the_name_it_was_given() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("m");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("config.json"), "{}").unwrap();
        let named = BTreeMap::from([("Qwen/Qwen3-8B".to_owned(), dir.clone())]);

        let registry = ModelRegistry::new(home.path().to_owned(), &[]).unwrap();
        let registry = registry.with_names(&named).unwrap();

        let by_name = registry.resolve("Qwen/Qwen3-8B").unwrap();
        assert_eq!(by_name.name, "Qwen/Qwen3-8B");
        let by_path = registry.resolve(dir.to_str().unwrap()).unwrap();
        assert_eq!(by_name.revision, by_path.revision);
        assert_eq!(registry.list().unwrap().last(), Some(&by_name));
    }

    #[test]
    fn names_that_mean_something_else_are_refused() {
        for name in ["a", "Qwen/Qwen3-8B", "Qwen/Qwen3.6-35B-A3B:peft:262144"] {
            assert_eq!(check_model_name(name), Ok(()), "{name}");
        }
        for name in [
            "",
            "tinker/nano",
            "/a/b",
            "./a",
            "../a",
            "a/b/c",
            "a//b",
            "a/",
            "tinker://a",
            "a b",
        ] {
            assert!(check_model_name(name).is_err(), "{name}");
        }
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
