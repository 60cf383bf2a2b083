//! Copies of checkpoints: a run of their own, which cannot be trained, and the same bytes.

use tinker_types::{
    CopyWeightsRequest, CreateSessionRequest, ProjectId, TinkerPath, TrainingRunId,
};

use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::bundle;
use crate::catalog::{Run, SavedCheckpoint};
use crate::clock::now;
use crate::core::{Core, lock};
use crate::engine::expiry;
use crate::error::Result;

impl App {
    /// Copies a checkpoint into a project, or into a numbered run of a session. The same key, or the
    /// same number, gives the same copy.
    pub(crate) fn copy_weights(
        &self,
        request: &CopyWeightsRequest,
        key: Option<&str>,
    ) -> ApiResult<TinkerPath> {
        self.check_open()?;
        let expires_at = expiry(request.ttl_seconds)?;
        let source = &request.source_path;
        let _entering = lock(&self.entering);
        let run = match &request.destination_project_id {
            Some(project) => self.run_in_project(project, source, key)?,
            None => numbered_run(request)?,
        };
        let path = TinkerPath {
            run,
            checkpoint: source.checkpoint.clone(),
        };
        if let Some(copy) = self.core.catalog.find_checkpoint(&path) {
            self.check_same_source(&copy, source)?;
            return Ok(path);
        }
        if self.is_created(&path.run)? {
            return Err(ApiError::unprocessable(format!(
                "training run {} was created for something else: a copy takes a number of its own",
                path.run
            )));
        }
        let copy = SavedCheckpoint {
            path: path.clone(),
            created_at: now(),
            expires_at,
            public: false,
            ..self.core.source(source)?
        };
        let room = self.core.quota.reserve(copy.size_bytes, "a copy");
        let _room = room.map_err(|error| ApiError::bad_request(error.to_string()))?;
        self.core.copy_checkpoint(source, copy)?;
        Ok(path)
    }

    /// The run of a copy that goes to a project: in a session of its own, which the key finds again.
    fn run_in_project(
        &self,
        project: &ProjectId,
        source: &TinkerPath,
        key: Option<&str>,
    ) -> ApiResult<TrainingRunId> {
        let catalog = &self.core.catalog;
        let key = key.map(|key| format!("copy:{key}"));
        let known = key.as_deref().and_then(|key| catalog.session_of_key(key));
        let session = match known {
            Some(session) => session,
            None => {
                // Nothing is made for a copy of nothing.
                self.core.source(source)?;
                catalog.create_session(session_of_copy(project, source), key)?
            }
        };
        Ok(TrainingRunId::of_session(&session, 0))
    }

    fn check_same_source(&self, copy: &SavedCheckpoint, source: &TinkerPath) -> ApiResult<()> {
        let dir = self.core.paths.checkpoint(&copy.path);
        let manifest = bundle::present_manifest(self.core.disk.as_ref(), &dir)?;
        if manifest.copied_from.as_ref() == Some(source) {
            return Ok(());
        }
        Err(ApiError::unprocessable(format!(
            "{} is not a copy of {source}: another request has this idempotency key or number",
            copy.path
        )))
    }
}

fn session_of_copy(project: &ProjectId, source: &TinkerPath) -> CreateSessionRequest {
    CreateSessionRequest {
        tags: vec!["copy_weights".into()],
        user_metadata: Default::default(),
        sdk_version: env!("CARGO_PKG_VERSION").into(),
        project_id: Some(project.clone()),
        display_name: Some(format!("copy of {source}")),
        tag: Default::default(),
    }
}

fn numbered_run(request: &CopyWeightsRequest) -> ApiResult<TrainingRunId> {
    match (&request.session_id, request.model_seq_id) {
        (Some(session), Some(number)) => Ok(TrainingRunId::of_session(session, number)),
        _ => Err(ApiError::bad_request(
            "copy_weights takes a destination_project_id, or session_id and model_seq_id",
        )),
    }
}

impl Core {
    /// The checkpoint to copy.
    fn source(&self, path: &TinkerPath) -> Result<SavedCheckpoint> {
        let found = self.catalog.find_checkpoint(path);
        found.ok_or_else(|| self.catalog.no_checkpoint(path))
    }

    /// Writes the copy, then the rows that show it.
    fn copy_checkpoint(&self, source: &TinkerPath, copy: SavedCheckpoint) -> Result<()> {
        let session_id = self.session_of_run(&copy.path.run)?;
        let _changing = self.change_checkpoints();
        // It may have been deleted while this waited.
        self.source(source)?;
        let (from, to) = (
            self.paths.checkpoint(source),
            self.paths.checkpoint(&copy.path),
        );
        // What a crash left behind without a row.
        crate::disk::remove_dir(&to)?;
        bundle::copy(
            self.disk.as_ref(),
            &self.paths.temp(),
            &from,
            &to,
            |manifest| {
                manifest.path = Some(copy.path.clone());
                manifest.run = copy.path.run.clone();
                manifest.request_id = None;
                manifest.copied_from = Some(source.clone());
            },
        )?;
        self.catalog.put_run(Run {
            id: copy.path.run.clone(),
            session_id,
            base_model: copy.base_model.clone(),
            lora: copy.lora.clone(),
            user_metadata: None,
            created_at: now(),
            last_request_at: now(),
            corrupted: None,
            optimizer: self.catalog.optimizer_of(source),
        })?;
        let path = copy.path.clone();
        self.catalog.put_checkpoint(copy)?;
        let details = serde_json::json!({"tinker_path": path, "source_path": source});
        self.accounts.note("checkpoint_copied", details);
        Ok(())
    }

    fn session_of_run(&self, run: &TrainingRunId) -> Result<tinker_types::SessionId> {
        let invalid = |e: tinker_types::TypeError| crate::error::Error::Invalid(e.to_string());
        let (session, _number) = run.as_str().rsplit_once(":train:").unwrap_or_default();
        let session = session.parse().map_err(invalid)?;
        Ok(self.catalog.session(&session)?.id)
    }
}
