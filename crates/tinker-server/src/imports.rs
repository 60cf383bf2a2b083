//! Adapters from outside: files are sent to signed addresses and become an external checkpoint, in a
//! session of its own, once they are found to fit their base model.
//!
//! An upload is named by its session, so only whoever began it can finish it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tinker_engine::arch::Arch;
use tinker_engine::peft::read_peft;
use tinker_engine::{AdapterState, LoraSpec, estimate_adapter};
use tinker_types::{
    CheckpointId, CheckpointKind, CreateSessionRequest, LoraConfig, SessionId, StartUploadRequest,
    TinkerPath, TrainingRunId,
};

use crate::adapter_files::WEIGHTS_FILE;
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::bundle::{self, CONFIG_FILE, FORMAT_VERSION, Manifest};
use crate::caller;
use crate::catalog::{Run, SavedCheckpoint, Session};
use crate::clock::{now, timestamp};
use crate::core::{Core, lock};
use crate::disk::{create_dir, read_file, remove_dir, write_private};
use crate::error::{Error, Result};
use crate::links::LIFE;
use crate::memory::{Ask, Promise, Purpose};
use crate::models::BaseModel;
use crate::quota::Room;
use crate::receiving::Receiving;

/// What an upload consists of: PEFT's layout, as `save_weights_external` writes it.
pub(crate) const FILES: [&str; 2] = [CONFIG_FILE, WEIGHTS_FILE];

/// What was asked for, beside the files.
const REQUEST_FILE: &str = "upload.json";

/// What the sessions of uploads are tagged with.
const TAG: &str = "external_weights_upload";

/// Most uploads of a key that are not finished; each may hold as much as its files are long.
const MAX_UNFINISHED: usize = 16;

/// Most bytes of a file beside its numbers: names and shapes, settings.
const BESIDE_NUMBERS: u64 = 16 << 20;

/// How often an adapter is in memory while it is read and written.
const COPIES: u64 = 3;

/// Name of the checkpoint that an upload becomes.
const NAME: &str = "uploaded";

impl App {
    /// Begins an upload.
    pub(crate) fn start_upload(&self, request: &StartUploadRequest) -> ApiResult<SessionId> {
        self.check_open()?;
        let core = &self.core;
        let base = core.models.resolve(&request.base_model)?;
        check_rank(&base, request.lora_config.rank)?;
        let text = serde_json::to_vec(request)
            .map_err(|error| ApiError::internal("internal error", error.to_string()))?;
        self.check_sessions()?;
        core.check_upload_room(text.len() as u64, "an upload")?;
        // Of two that begin at once, the second counts the first.
        let _beginning = lock(&core.uploads);
        core.check_unfinished_uploads()?;
        let session = core
            .catalog
            .create_session(session_of_upload(request), None)?;
        let dir = core.paths.upload(&session);
        create_dir(core.disk.as_ref(), &dir)?;
        write_private(core.disk.as_ref(), &dir.join(REQUEST_FILE), &text)?;
        Ok(session)
    }

    /// Begins to take a file of an upload, of so many bytes if the sender says how many; the same file sent
    /// again takes its place. Returns how long it may be, too.
    pub(crate) fn begin_receiving(
        &self,
        upload: &SessionId,
        file: &str,
        n_bytes: Option<u64>,
    ) -> ApiResult<(Receiving, u64)> {
        self.check_open()?;
        if !FILES.contains(&file) {
            let files = FILES.join(" and ");
            return Err(ApiError::not_found(format!(
                "an upload has no file {file:?}: it takes {files}"
            )));
        }
        let dir = self.core.paths.upload(upload);
        if !dir.is_dir() {
            return Err(no_upload(upload).into());
        }
        let most = self.core.largest_file(upload, &dir, file)?;
        if let Some(n_bytes) = n_bytes.filter(|n| *n > most) {
            return Err(too_long(file, n_bytes, most));
        }
        self.check_piece(file, n_bytes.unwrap_or(0))?;
        let path = dir.join(file);
        let claim = Claim::of(&self.core, upload, path.clone())?;
        let receiving = Receiving::begin(Arc::clone(&self.core), path, claim)?;
        Ok((receiving, most))
    }

    /// Refuses so many bytes more of a file that there is no room for.
    pub(crate) fn check_piece(&self, file: &str, n_bytes: u64) -> ApiResult<()> {
        let what = format!("the upload's {file}");
        self.core.check_upload_room(n_bytes, &what)
    }

    /// Makes a checkpoint of an upload whose files are all there. Asked again it says the same.
    pub(crate) fn finish_upload(&self, upload: &SessionId) -> ApiResult<TinkerPath> {
        self.check_open()?;
        let core = &self.core;
        core.catalog.session(upload)?;
        let path = path_of(upload)?;
        let dir = core.paths.upload(upload);
        let _finishing = Claim::of(core, upload, dir.clone())?;
        let files = FILES.map(|file| Claim::of(core, upload, dir.join(file)));
        let _files = files.into_iter().collect::<ApiResult<Vec<_>>>()?;
        if core.catalog.find_own_checkpoint(&path).is_some() {
            return Ok(path);
        }
        let request = core.upload_request(upload, &dir)?;
        let base = core.models.resolve(&request.base_model)?;
        let _memory = core.promise_for_upload(&base, &request)?;
        let state = adapter_in(&dir, &base, &request.lora_config)?;
        let n_values: usize = state.weights.values().map(|weight| weight.data.len()).sum();
        let _room = core.keep_upload_room(4 * n_values as u64, "the uploaded weights")?;
        core.keep_upload(&path, upload, &base, &state)?;
        remove_dir(&dir)?;
        core.quota.note_removal();
        Ok(path)
    }
}

/// Keeps others from an upload, or from a file of one, until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    core: Arc<Core>,
    path: PathBuf,
}

impl Claim {
    /// Takes an upload's directory or a file in it.
    ///
    /// # Errors
    /// 429 if another request has it.
    fn of(core: &Arc<Core>, upload: &SessionId, path: PathBuf) -> ApiResult<Self> {
        if lock(&core.uploads).insert(path.clone()) {
            let core = Arc::clone(core);
            return Ok(Self { core, path });
        }
        Err(ApiError::busy(format!(
            "another request is at work on upload {upload}: ask again when it is answered"
        )))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.core.uploads).remove(&self.path);
    }
}

impl Core {
    /// Most bytes of a file of an upload: no adapter of the rank that was announced has more numbers, and each
    /// takes four bytes at most.
    fn largest_file(&self, upload: &SessionId, dir: &Path, file: &str) -> Result<u64> {
        if file != WEIGHTS_FILE {
            return Ok(BESIDE_NUMBERS);
        }
        let request = self.upload_request(upload, dir)?;
        let base = self.models.resolve(&request.base_model)?;
        Ok(estimate_adapter(&base.dir, &largest_adapter(&request))? + BESIDE_NUMBERS)
    }

    /// Memory to read an adapter: its file, its numbers, and these in the layout of a checkpoint.
    fn promise_for_upload(
        &self,
        base: &BaseModel,
        request: &StartUploadRequest,
    ) -> Result<Promise> {
        let n_bytes = estimate_adapter(&base.dir, &largest_adapter(request))?;
        self.memory.promise(&Ask {
            purpose: Purpose::Task,
            n_bytes: n_bytes.saturating_mul(COPIES),
            what: format!("an uploaded adapter of rank {}", request.lora_config.rank),
            advice: "finish the upload again when other work has ended, or upload an adapter of a lower rank",
        })
    }

    /// As [`Self::check_upload_room`], and keeps the room until it is filled.
    fn keep_upload_room(&self, n_bytes: u64, what: &str) -> ApiResult<Room<'_>> {
        let room = self.quota.reserve(n_bytes, what);
        room.map_err(|error| ApiError::bad_request(error.to_string()))
    }

    /// Refuses what there is no room for at once: nothing waits for it.
    fn check_upload_room(&self, n_bytes: u64, what: &str) -> ApiResult<()> {
        let room = self.quota.check(n_bytes, what);
        room.map_err(|error| ApiError::bad_request(error.to_string()))
    }

    /// Refuses an upload of a key that has many under way.
    fn check_unfinished_uploads(&self) -> ApiResult<()> {
        let owner = caller::current_key();
        let is_unfinished = |session: &Session| {
            session.owner == owner
                && session.request.tags.iter().any(|tag| tag == TAG)
                && self.paths.upload(&session.id).is_dir()
        };
        let sessions = self.catalog.sessions();
        let n = sessions.iter().filter(|s| is_unfinished(s)).count();
        if n < MAX_UNFINISHED {
            return Ok(());
        }
        Err(ApiError::busy(format!(
            "{n} uploads are not finished, and {MAX_UNFINISHED} may be: finish one, or wait until it is given up an hour after its last file"
        )))
    }

    fn upload_request(&self, upload: &SessionId, dir: &Path) -> Result<StartUploadRequest> {
        let path = dir.join(REQUEST_FILE);
        let bytes = match read_file(self.disk.as_ref(), &path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(no_upload(upload));
            }
            Err(error) => return Err(Error::io("read", &path, error)),
        };
        serde_json::from_slice(&bytes).map_err(|error| Error::Corrupt {
            path,
            message: error.to_string(),
        })
    }

    /// Writes the checkpoint, then the rows that show it. Others wait for the last step alone.
    fn keep_upload(
        &self,
        path: &TinkerPath,
        session: &SessionId,
        base: &BaseModel,
        state: &AdapterState,
    ) -> Result<()> {
        let disk = self.disk.as_ref();
        let manifest = self.manifest_of_upload(path, base, state);
        let aside = bundle::write_aside(disk, &self.paths.temp(), manifest, state, false)?;
        let _changing = self.change_checkpoints();
        let manifest = aside.install(disk, &self.paths.checkpoint(path), true)?;
        self.catalog.put_run(Run {
            id: path.run.clone(),
            session_id: session.clone(),
            base_model: base.name.clone(),
            lora: manifest.lora.clone(),
            user_metadata: None,
            created_at: now(),
            last_request_at: now(),
            corrupted: None,
            optimizer: Default::default(),
        })?;
        self.catalog.put_checkpoint(SavedCheckpoint {
            path: path.clone(),
            base_model: base.name.clone(),
            size_bytes: manifest.size_bytes(),
            lora: manifest.lora,
            user_metadata: None,
            public: false,
            created_at: now(),
            expires_at: None,
        })?;
        self.note_checkpoint("checkpoint_uploaded", path);
        Ok(())
    }

    fn manifest_of_upload(
        &self,
        path: &TinkerPath,
        base: &BaseModel,
        state: &AdapterState,
    ) -> Manifest {
        let spec = state.spec;
        Manifest {
            format_version: FORMAT_VERSION,
            kind: path.checkpoint.kind.segment().to_owned(),
            path: Some(path.clone()),
            run: path.run.clone(),
            base_model: base.name.clone(),
            base_revision: base.revision.clone(),
            lora: LoraConfig {
                rank: spec.rank as u32,
                seed: Some(spec.seed),
                train_unembed: spec.train_unembed,
                train_mlp: spec.train_mlp,
                train_attn: spec.train_attn,
            },
            seed: spec.seed,
            step: 0,
            seq_id: 0,
            request_id: None,
            copied_from: None,
            log_segment: None,
            precision: "uploaded".to_owned(),
            server_version: self.version.clone(),
            created_at: timestamp(now()),
            files: Default::default(),
        }
    }

    /// Removes uploads that can no longer be completed: their links have expired.
    pub(crate) fn discard_stale_uploads(&self) {
        let Ok(entries) = fs::read_dir(self.paths.uploads()) else {
            return;
        };
        let limit = Duration::from_millis(LIFE.unsigned_abs());
        // Nobody begins to work on one while it is looked at.
        let claimed = lock(&self.uploads);
        for entry in entries.flatten() {
            let dir = entry.path();
            if claimed.iter().any(|path| path.starts_with(&dir)) {
                continue;
            }
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let is_stale = modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > limit));
            if !is_stale {
                continue;
            }
            match remove_dir(&dir) {
                Ok(()) => self.quota.note_removal(),
                Err(error) => {
                    tracing::warn!(error = error.with_causes(), "cannot remove an old upload");
                }
            }
        }
    }
}

/// The largest adapter of the rank that was announced.
fn largest_adapter(request: &StartUploadRequest) -> LoraSpec {
    LoraSpec {
        rank: request.lora_config.rank as usize,
        seed: 0,
        train_attn: true,
        train_mlp: true,
        train_unembed: true,
    }
}

/// Refuses a rank that no module has a use for: its adapter would be larger than what it changes.
fn check_rank(base: &BaseModel, rank: u32) -> ApiResult<()> {
    let refused = |error: tinker_engine::Error| ApiError::bad_request(error.to_string());
    let most = Arch::load(&base.dir).map_err(refused)?.hidden_size;
    if (1..=most).contains(&(rank as usize)) {
        return Ok(());
    }
    Err(ApiError::bad_request(format!(
        "lora_config.rank {rank} must be between 1 and {most}, the width of {}",
        base.name
    )))
}

/// The adapter that the files hold.
///
/// # Errors
/// 400 if a file is missing, does not fit the base model or what was announced, or holds a value that
/// is not finite.
fn adapter_in(dir: &Path, base: &BaseModel, announced: &LoraConfig) -> ApiResult<AdapterState> {
    if let Some(missing) = FILES.iter().find(|file| !dir.join(file).is_file()) {
        return Err(ApiError::bad_request(format!(
            "{missing} has not been sent: PUT it to its address, then finish the upload"
        )));
    }
    let state = read_peft(dir, &base.dir, announced.rank as usize)
        .map_err(|error| ApiError::bad_request(error.to_string()))?;
    for (name, tensor) in &state.weights {
        if let Some(at) = tensor.data.iter().position(|value| !value.is_finite()) {
            let value = tensor.data[at];
            return Err(ApiError::bad_request(format!(
                "tensor {name} has {value} at element {at}: an adapter has finite weights only"
            )));
        }
    }
    Ok(state)
}

/// The refusal of a file that is longer than it can be.
pub(crate) fn too_long(file: &str, n_bytes: u64, most: u64) -> ApiError {
    ApiError::too_large(format!(
        "{file} has {n_bytes} bytes or more, and an adapter of the rank that was announced has {most} at most"
    ))
}

fn path_of(upload: &SessionId) -> ApiResult<TinkerPath> {
    let checkpoint = CheckpointId::new(CheckpointKind::External, NAME.to_owned())
        .map_err(|error| ApiError::bad_request(error.to_string()))?;
    Ok(TinkerPath {
        run: TrainingRunId::of_session(upload, 0),
        checkpoint,
    })
}

fn session_of_upload(request: &StartUploadRequest) -> CreateSessionRequest {
    CreateSessionRequest {
        tags: vec![TAG.into()],
        user_metadata: Default::default(),
        sdk_version: env!("CARGO_PKG_VERSION").into(),
        project_id: request.destination_project_id.clone(),
        display_name: Some(format!("weights from outside for {}", request.base_model)),
        tag: Default::default(),
    }
}

fn no_upload(upload: &SessionId) -> Error {
    Error::NotFound(format!(
        "upload {upload} is unknown or was given up: start one with external_weights_upload_start"
    ))
}
