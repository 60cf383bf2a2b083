//! A base model in memory: its backend, the sampler weights loaded beside it, and the samples that
//! run on it.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tinker_chat::Tokenizer;
use tinker_engine::{AdapterId, AdapterState, Backend, LoraSpec, Precision, Quantization, Work};

use super::Worker;
use super::samples::Sampling;
use crate::bundle::{self, Manifest};
use crate::clock::Clock;
use crate::device::Loader;
use crate::disk::Disk;
use crate::error::{Error, Result, is_passing_io};
use crate::memory::{Ask, Promise, Purpose};

/// Memory of sampler weights that stay loaded, the last ones apart: a loop that samples from every
/// step's weights would otherwise fill the memory.
const MAX_SAMPLER_BYTES: usize = 512 << 20;

/// A loaded base model.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) backend: Box<dyn Backend>,
    /// Revision of its files.
    pub(super) revision: String,
    /// Missing for directories without one; then there are no stop strings and no end token.
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    pub(super) sampling: Sampling,
    weights: HashMap<PathBuf, SamplerWeights>,
    /// Deleted while samples were drawn from them.
    orphans: Vec<SamplerWeights>,
    /// Weights that are about to be sampled from.
    pub(super) reserved: Option<AdapterId>,
    clock: Clock,
}

#[derive(Debug)]
struct SamplerWeights {
    adapter: AdapterId,
    bytes: usize,
    last_used: Instant,
}

impl Worker {
    /// The base model of a name, loaded on first use.
    pub(super) fn base(&mut self, name: &str) -> Result<&mut Base> {
        if !self.bases.contains_key(name) {
            let loaded = self.load_base(name)?;
            self.bases.insert(name.to_owned(), loaded);
        }
        self.bases
            .get_mut(name)
            .ok_or_else(|| Error::NotFound(format!("base model {name} is not loaded")))
    }

    fn load_base(&mut self, name: &str) -> Result<Base> {
        let model = self.core.models.resolve(name)?;
        let started = Instant::now();
        let backend = self.load_backend(name, &model.dir)?;
        let tokenizer = load_tokenizer(&model.dir)?;
        if let Some(tokenizer) = &tokenizer {
            check_vocabulary(&model.dir, tokenizer)?;
        }
        tracing::info!(
            model = name,
            precision = backend.info().precision,
            duration_ms = started.elapsed().as_millis() as u64,
            "loaded a base model"
        );
        Ok(Base {
            sampling: Sampling::new(backend.info()),
            revision: model.revision,
            backend,
            tokenizer,
            weights: HashMap::new(),
            orphans: Vec::new(),
            reserved: None,
            clock: self.core.clock.clone(),
        })
    }

    /// Loads a model onto the device that takes it, which need not be the first.
    fn load_backend(&mut self, name: &str, dir: &Path) -> Result<Box<dyn Backend>> {
        let core = Arc::clone(&self.core);
        let loaded = self.load_with(&core.loader, name, dir);
        match (loaded, &core.second_loader) {
            (Err(Error::Engine(error)), Some(second)) => {
                tracing::info!(model = name, "computing on the CPU: {error}");
                self.load_with(second, name, dir)
            }
            (loaded, _) => loaded,
        }
    }

    /// Loads a model that there is memory for.
    ///
    /// The engine says of a file that it cannot read as of one that is damaged: it cannot use it.
    /// Which of the two it is decides whether it is tried again later, so a look at the files tells.
    fn load_with(&mut self, loader: &Loader, name: &str, dir: &Path) -> Result<Box<dyn Backend>> {
        let _memory = self.promise(&Ask {
            purpose: Purpose::Task,
            // What is wrong with the files is for the loading to say.
            n_bytes: (loader.estimate)(dir).unwrap_or(0),
            what: format!("base model {name}"),
            advice: "take a smaller one, end other programs, or restart the server with fewer bits (--weights int8 or nf4)",
        })?;
        let load = || (loader.load)(dir, self.core.threads);
        match load() {
            Err(tinker_engine::Error::Model { .. }) => {
                check_readable(self.core.disk.as_ref(), dir)?;
                // A fault may have passed before the look.
                Ok(load()?)
            }
            loaded => Ok(loaded?),
        }
    }

    /// Memory for an adapter that is trained, with what its first pass and its first step add to it.
    pub(super) fn promise_for_adapter(&mut self, model: &str, spec: &LoraSpec) -> Result<Promise> {
        let n_bytes = self.base(model)?.backend.memory_for(Work::Adapter(spec));
        self.promise(&Ask {
            purpose: Purpose::Adapter,
            n_bytes,
            what: format!("an adapter of rank {} with its optimizer", spec.rank),
            advice: "take a lower rank or train fewer modules, end training runs (unload_model), or restart the server with fewer bits (--weights int8 or nf4)",
        })
    }

    /// Loads a saved adapter, if it was trained on this revision of the base model.
    pub(super) fn import_adapter(
        &mut self,
        model: &str,
        manifest: &Manifest,
        state: &AdapterState,
    ) -> Result<(AdapterId, Promise)> {
        self.base(model)?.check_revision(manifest)?;
        let memory = self.promise_for_adapter(model, &state.spec)?;
        let adapter = self.base(model)?.backend.import_adapter(state)?;
        Ok((adapter, memory))
    }

    /// The adapter of saved weights, loaded on first use.
    pub(super) fn weights(&mut self, model: &str, dir: &Path) -> Result<AdapterId> {
        let base = self.base(model)?;
        if let Some(known) = base.known_weights(dir) {
            return Ok(known);
        }
        let disk = Arc::clone(&self.core.disk);
        let manifest = bundle::present_manifest(disk.as_ref(), dir)?;
        let base = self.base(model)?;
        base.check_revision(&manifest)?;
        let ask = ask_for_weights(base, &manifest);
        let _memory = self.promise(&ask)?;
        let (_, state) = bundle::read(disk.as_ref(), dir, false)?;
        let base = self.base(model)?;
        let adapter = base.backend.import_adapter(&state)?;
        base.keep_weights(dir.to_owned(), adapter);
        Ok(adapter)
    }
}

/// Memory for weights that are sampled from, and to read them.
fn ask_for_weights(base: &Base, manifest: &Manifest) -> Ask<'static> {
    let spec = LoraSpec {
        rank: manifest.lora.rank as usize,
        seed: manifest.seed,
        train_attn: manifest.lora.train_attn,
        train_mlp: manifest.lora.train_mlp,
        train_unembed: manifest.lora.train_unembed,
    };
    Ask {
        purpose: Purpose::Task,
        n_bytes: base.backend.memory_for(Work::Weights(&spec)),
        what: format!("sampling from weights of rank {}", spec.rank),
        advice: "end training runs (unload_model), or restart the server with fewer bits (--weights int8 or nf4)",
    }
}

/// Reads the beginning of each file that a model is loaded from.
fn check_readable(disk: &dyn Disk, dir: &Path) -> Result<()> {
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))?;
    for entry in entries {
        let path = entry.map_err(|e| Error::io("read", dir, e))?.path();
        if !path
            .extension()
            .is_some_and(|e| e == "json" || e == "safetensors")
        {
            continue;
        }
        let read = disk.open(&path).and_then(|mut file| {
            let mut beginning = [0; 4096];
            file.read(&mut beginning)
        });
        match read {
            Err(error) if is_passing_io(&error) => return Err(Error::io("read", &path, error)),
            // What is missing or no file is for the engine to say.
            _ => {}
        }
    }
    Ok(())
}

/// A model without a usable tokenizer is served without one; a tokenizer that cannot be read for now
/// is not done without.
fn load_tokenizer(dir: &Path) -> Result<Option<Arc<Tokenizer>>> {
    match Tokenizer::from_dir(dir) {
        Ok(tokenizer) => Ok(Some(tokenizer)),
        Err(tinker_chat::Error::ReadFile { path, source }) if is_passing_io(&source) => {
            Err(Error::io("read", &path, source))
        }
        Err(error) => {
            tracing::warn!(model = %dir.display(), %error, "no tokenizer");
            Ok(None)
        }
    }
}

/// Refuses a tokenizer of another model, whose ids lead beyond the weights. The engine has checked that these are
/// as `config.json` says.
fn check_vocabulary(dir: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
    let config: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let n_rows = config["vocab_size"].as_u64();
    match (n_rows, tokenizer.highest_id()) {
        (Some(n_rows), Some(highest)) if u64::from(highest) >= n_rows => {
            Err(Error::Invalid(format!(
                "model {}: its tokenizer has token ids up to {highest}, and its weights have {n_rows} tokens: they belong to different models; put the right tokenizer.json beside the weights, or none to work with token ids alone",
                dir.display()
            )))
        }
        _ => Ok(()),
    }
}

/// Why an adapter does not fit the base model at `revision`, and what does.
fn other_base(manifest: &Manifest, revision: &str) -> String {
    let (here, there) = (Held::of(revision), Held::of(&manifest.base_revision));
    let model = &manifest.base_model;
    if here.files != there.files {
        return format!(
            "the adapter was trained on revision {} of {model}, and this is revision {revision}: it fits no other weights",
            manifest.base_revision
        );
    }
    let options = [
        ("--weights", here.weights, there.weights),
        ("--precision", here.precision, there.precision),
    ];
    let restart = |(option, here, there): (&str, Option<&str>, Option<&str>)| match there {
        _ if here == there => None,
        None => Some(format!("without {option}")),
        Some(there) => Some(format!("with {option} {there}")),
    };
    let restart: Vec<String> = options.into_iter().filter_map(restart).collect();
    format!(
        "the adapter was trained on {model} {there}, and this server holds it {here}: restart it {}",
        restart.join(" and ")
    )
}

/// What a base model's revision says, see [`crate::BaseModel::revision`].
#[derive(Debug, Clone, Copy)]
struct Held<'a> {
    files: &'a str,
    weights: Option<&'a str>,
    precision: Option<&'a str>,
}

impl<'a> Held<'a> {
    fn of(revision: &'a str) -> Self {
        let (files, rest) = revision.split_once('+').unwrap_or((revision, ""));
        let find = |names: &[&'static str]| {
            let mut known = names.iter().copied();
            known.find(|name| rest.split('+').any(|part| part == *name))
        };
        Self {
            files,
            weights: find(&Quantization::ALL.map(Quantization::name)),
            precision: find(&Precision::ALL.map(Precision::name)),
        }
    }
}

impl std::fmt::Display for Held<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "with weights {} in {}",
            self.weights.unwrap_or("as in its files"),
            self.precision.unwrap_or(Precision::F32.name())
        )
    }
}

impl Base {
    /// How many samplers' weights are loaded.
    pub(super) fn n_weights(&self) -> usize {
        self.weights.len() + self.orphans.len()
    }

    /// Whether samples are being drawn.
    pub(super) fn is_sampling(&self) -> bool {
        self.sampling.is_active()
    }

    fn check_revision(&self, manifest: &Manifest) -> Result<()> {
        if manifest.base_revision == self.revision {
            return Ok(());
        }
        Err(Error::Invalid(other_base(manifest, &self.revision)))
    }

    /// The adapter of saved weights, if it is loaded.
    fn known_weights(&mut self, dir: &Path) -> Option<AdapterId> {
        let known = self.weights.get_mut(dir)?;
        known.last_used = self.clock.instant();
        Some(known.adapter)
    }

    /// Bytes of the host that samples under way hold.
    pub(super) fn sample_bytes(&self) -> usize {
        self.on_host(self.sampling.held_bytes(self.backend.as_ref()))
    }

    /// Bytes of the host that an adapter takes.
    pub(super) fn adapter_bytes(&self, adapter: AdapterId) -> usize {
        self.on_host(self.backend.adapter_bytes(adapter))
    }

    /// What a device has of its own is not promised.
    fn on_host(&self, n_bytes: usize) -> usize {
        if self.backend.is_on_host() {
            n_bytes
        } else {
            0
        }
    }

    /// Bytes of the host that [`Self::free_kept`] frees.
    pub(super) fn kept_bytes(&self) -> usize {
        let weights = self
            .weights
            .values()
            .filter(|weights| self.is_unused(weights));
        let of_weights: usize = weights.map(|weights| weights.bytes).sum();
        self.on_host(of_weights + self.sampling.kept_bytes() + self.backend.kept_bytes())
    }

    /// Whether no samples are, or are about to be, drawn from weights.
    fn is_unused(&self, weights: &SamplerWeights) -> bool {
        self.reserved != Some(weights.adapter) && !self.sampling.uses(weights.adapter)
    }

    /// Frees what would only save time later; returns how many bytes of the host that were.
    pub(super) fn free_kept(&mut self) -> usize {
        if !self.backend.is_on_host() {
            return 0;
        }
        let of_passes = self.backend.kept_bytes();
        self.backend.free_kept();
        let of_prompts = self.sampling.free_kept(self.backend.as_mut());
        of_passes + of_prompts + self.drop_unused_weights()
    }

    /// Frees the sampler weights that no samples are being drawn from, and says how many bytes these were.
    fn drop_unused_weights(&mut self) -> usize {
        let weights = std::mem::take(&mut self.weights).into_iter();
        let (unused, used): (HashMap<_, _>, _) =
            weights.partition(|(_, weights)| self.is_unused(weights));
        self.weights = used;
        let n_bytes = unused.values().map(|weights| weights.bytes).sum();
        self.orphans.extend(unused.into_values());
        self.drop_orphans();
        n_bytes
    }

    /// Keeps an adapter as the weights of a directory.
    pub(super) fn keep_weights(&mut self, dir: PathBuf, adapter: AdapterId) {
        let weights = SamplerWeights {
            adapter,
            bytes: self.backend.adapter_bytes(adapter),
            last_used: self.clock.instant(),
        };
        self.orphans.extend(self.weights.insert(dir, weights));
        while self.weights.len() > 1 && self.weights_bytes() > MAX_SAMPLER_BYTES {
            let oldest = self
                .weights
                .iter()
                .min_by_key(|(_, weights)| weights.last_used);
            let oldest = oldest.map(|(dir, _)| dir.clone());
            self.orphans
                .extend(oldest.and_then(|dir| self.weights.remove(&dir)));
        }
        self.drop_orphans();
    }

    fn weights_bytes(&self) -> usize {
        self.weights.values().map(|weights| weights.bytes).sum()
    }

    /// Forgets the weights of a directory that was deleted.
    pub(super) fn forget_weights(&mut self, dir: &Path) {
        self.orphans.extend(self.weights.remove(dir));
        self.drop_orphans();
    }

    /// Frees the weights of a directory unless samples are being drawn from them. Says whether they
    /// are out of memory; they are loaded again on demand.
    pub(super) fn release_weights(&mut self, dir: &Path) -> bool {
        let Some(weights) = self.weights.get(dir) else {
            return true;
        };
        if self.sampling.uses(weights.adapter) {
            return false;
        }
        self.forget_weights(dir);
        true
    }

    /// Frees the sampler weights that were not used for as long as `limit` says of their directory; they
    /// are loaded again on demand.
    pub(super) fn drop_idle_weights(&mut self, limit: impl Fn(&Path) -> Duration) {
        let now = self.clock.instant();
        let idle = |weights: &SamplerWeights| now.saturating_duration_since(weights.last_used);
        let dirs: Vec<PathBuf> = self
            .weights
            .iter()
            .filter(|(dir, weights)| idle(weights) > limit(dir))
            .map(|(dir, _)| dir.clone())
            .collect();
        for dir in dirs {
            self.orphans.extend(self.weights.remove(&dir));
        }
        self.drop_orphans();
    }

    fn drop_orphans(&mut self) {
        let (backend, sampling) = (&mut self.backend, &mut self.sampling);
        self.orphans.retain(|weights| {
            let used = sampling.uses(weights.adapter);
            if !used {
                sampling.forget(backend.as_mut(), weights.adapter);
                backend.drop_adapter(weights.adapter);
            }
            used
        });
    }
}
