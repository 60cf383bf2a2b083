//! A base model as this side needs it: its name for the server, its tokenizer, its context length.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tinker_chat::{RendererName, Tokenizer};
use tinker_recipes::ModelFacts;

use crate::env;
use crate::failure::{Failure, Result};
use crate::settings::Target;

/// A base model whose tokenizer is at hand.
#[derive(Debug)]
pub(crate) struct BaseModel {
    /// The name the server knows it by.
    pub(crate) name: String,
    /// Its tokenizer.
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// The content of its `config.json`, or null.
    config: Value,
}

impl BaseModel {
    /// The model called `name`, or in the directory `name`, for use on `target`, with the tokenizer
    /// in `tokenizer` if given, else the model's own.
    ///
    /// # Errors
    /// No such model is known on this machine, or its tokenizer is not here.
    pub(crate) fn find(
        home: &Path,
        name: &str,
        target: &Target,
        tokenizer: Option<&Path>,
    ) -> Result<Self> {
        let name = server_name(name)?;
        let dir = match tokenizer {
            Some(dir) => dir.to_owned(),
            None => model_dir(home, &name, target)?,
        };
        Ok(Self {
            tokenizer: Tokenizer::from_dir(&dir)
                .map_err(|error| no_tokenizer(error, tokenizer.is_some()))?,
            config: read_config(&dir),
            name,
        })
    }

    /// What the learning rate is chosen by.
    pub(crate) fn facts(&self) -> ModelFacts {
        let by_name = ModelFacts::from_name(&self.name);
        let hidden_size = self.config["hidden_size"].as_u64();
        ModelFacts {
            architecture: self.config["model_type"].as_str().map(str::to_owned),
            hidden_size: hidden_size
                .and_then(|size| usize::try_from(size).ok())
                .or(by_name.hidden_size),
            ..by_name
        }
    }

    /// Longest sequence in tokens, as the model's configuration says.
    pub(crate) fn context_length(&self) -> Option<usize> {
        let length = self.config["max_position_embeddings"].as_u64()?;
        usize::try_from(length).ok()
    }

    /// The chat format that `wanted` or the model names.
    ///
    /// # Errors
    /// Nobody names one.
    pub(crate) fn renderer_name(&self, wanted: Option<RendererName>) -> Result<RendererName> {
        wanted
            .or_else(|| RendererName::recommended(&self.name, &self.tokenizer))
            .ok_or_else(|| {
                let known = RendererName::ALL.map(RendererName::as_str).join(", ");
                Failure::usage(format!("no renderer is known for `{}`", self.name))
                    .hint(format!("name one with --renderer: {known}"))
            })
    }
}

/// The full path of a model directory.
///
/// # Errors
/// It is not there, or is none.
pub(crate) fn full_path(dir: &Path) -> Result<PathBuf> {
    if !dir.join("config.json").is_file() {
        return Err(no_config(dir).hint("give a directory in the Hugging Face layout"));
    }
    Ok(dir.canonicalize().map_err(anyhow::Error::new)?)
}

fn no_config(dir: &Path) -> Failure {
    let what = format!("model directory `{}` has no config.json", dir.display());
    Failure::not_found(what)
}

/// A directory becomes its full path, which is how a server on this machine knows it.
pub(crate) fn server_name(name: &str) -> Result<String> {
    let path = Path::new(name);
    let looks_like_path = path.is_absolute() || name.starts_with('.') || name.starts_with('~');
    if path.join("config.json").is_file() {
        return Ok(full_path(path)?.display().to_string());
    }
    if looks_like_path {
        return Err(no_config(path).hint(
            "give a directory in the Hugging Face layout, or a name from `tinker model list`",
        ));
    }
    Ok(name.to_owned())
}

/// Where the model's files are: those of the embedded server, or for another one the Hugging Face
/// cache.
fn model_dir(home: &Path, name: &str, target: &Target) -> Result<PathBuf> {
    let unknown = match tinker_server::resolve_model(home, name) {
        Ok(model) => return Ok(model.dir),
        Err(error @ tinker_server::Error::NotFound(_)) => Failure::from(error),
        Err(error) => return Err(error.into()),
    };
    if let Some(dir) = offered_dir(home, name, target) {
        return Ok(dir);
    }
    match target {
        Target::Embedded => Err(unknown.hint(
            "give a model directory; or set TINKER_API_KEY or --base-url for a server that has it",
        )),
        Target::Remote { .. } => cached_dir(name).ok_or_else(|| {
            Failure::not_found(format!("the tokenizer of `{name}` is not on this machine")).hint(
                format!(
                    "pass --tokenizer DIR with its tokenizer.json, or fetch it once: \
                     hf download {name} --include 'tokenizer*' config.json"
                ),
            )
        }),
    }
}

/// The directory that the server on this machine offers under `name`, where that server is the target:
/// another one means another model by that name, perhaps.
fn offered_dir(home: &Path, name: &str, target: &Target) -> Option<PathBuf> {
    let server = tinker_server::read_lock(home).ok().flatten()?;
    let is_target = match target {
        Target::Embedded => true,
        Target::Remote { base_url, .. } => base_url.trim_end_matches('/') == server.base_url(),
    };
    server.named_models.get(name).filter(|_| is_target).cloned()
}

/// The newest snapshot of `name` in the Hugging Face cache that has a tokenizer.
fn cached_dir(name: &str) -> Option<PathBuf> {
    let folder = format!("models--{}", name.replace('/', "--"));
    let snapshots = hub_cache()?.join(folder).join("snapshots");
    let mut found: Vec<_> = std::fs::read_dir(snapshots)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|dir| dir.join("tokenizer.json").is_file())
        .collect();
    found.sort_by_key(|dir| dir.metadata().and_then(|meta| meta.modified()).ok());
    found.pop()
}

/// Where Python's `transformers` keeps models by name.
pub(crate) fn hub_cache() -> Option<PathBuf> {
    let below = |dir: PathBuf| dir.join("hub");
    env::HF_HUB_CACHE
        .get()
        .map(PathBuf::from)
        .or_else(|| env::HF_HOME.get().map(PathBuf::from).map(below))
        .or_else(|| {
            etcetera::home_dir()
                .ok()
                .map(|home| below(home.join(".cache/huggingface")))
        })
}

/// A directory that was named without need may be wrong; one that was found lacks it.
fn no_tokenizer(error: tinker_chat::Error, is_given: bool) -> Failure {
    Failure::from(error).hint(match is_given {
        true => "--tokenizer takes the directory that tokenizer.json is in",
        false => "name the directory that tokenizer.json is in with --tokenizer DIR",
    })
}

fn read_config(dir: &Path) -> Value {
    std::fs::read(dir.join("config.json"))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}
