//! Saving a run's weights: training checkpoints, sampler checkpoints, and samplers without a name.

use std::path::Path;
use std::sync::Arc;

use tinker_engine::AdapterState;
use tinker_types::{
    CheckpointId, CheckpointKind, SamplerKind, SamplingSessionId, SaveWeightsExternalRequest,
    SaveWeightsExternalResponse, SaveWeightsForSamplerRequest, SaveWeightsForSamplerResponse,
    SaveWeightsRequest, SaveWeightsResponse, TinkerPath, TrainingRunId,
};

use super::snapshots::manifest;
use super::{Queued, Worker};
use crate::bundle::{self, Manifest};
use crate::catalog::{Run, Sampler, SavedCheckpoint};
use crate::clock::{Millis, now};
use crate::error::{Error, Result};
use crate::names::safe_name;
use crate::operation::Outcome;

/// Shortest and longest life of a checkpoint, in seconds: an hour to ten years.
const TTL_SECONDS: std::ops::RangeInclusive<u64> = 3600..=10 * 365 * 24 * 3600;

/// Longest name of a checkpoint's directory, in bytes: file systems take 255, and while it is
/// replaced it is called `.<name>.old`.
const MAX_FILE_NAME: usize = 250;

/// What both kinds of named save have in common.
struct NamedSave<'a> {
    kind: CheckpointKind,
    name: Option<&'a str>,
    overwrite: bool,
    ttl_seconds: Option<u64>,
    user_metadata: Option<&'a std::collections::BTreeMap<String, String>>,
}

impl Worker {
    pub(super) fn save_weights(
        &mut self,
        run: &TrainingRunId,
        seq: u64,
        queued: &Queued,
        request: &SaveWeightsRequest,
    ) -> Result<Outcome> {
        let save = NamedSave {
            kind: CheckpointKind::Training,
            name: request.path.as_deref(),
            overwrite: request.overwrite,
            ttl_seconds: request.ttl_seconds,
            user_metadata: request.user_metadata.as_ref(),
        };
        let path = self.save_named(run, seq, queued, &save)?;
        Ok(Outcome::json(&SaveWeightsResponse {
            path,
            tag: Default::default(),
        }))
    }

    pub(super) fn save_for_sampler(
        &mut self,
        run: &TrainingRunId,
        seq: u64,
        queued: &Queued,
        request: &SaveWeightsForSamplerRequest,
    ) -> Result<Outcome> {
        let inflight = match &request.kind {
            SamplerKind::Snapshot => false,
            SamplerKind::Inflight if request.path.is_none() => true,
            SamplerKind::Inflight => {
                return Err(Error::Invalid(
                    "kind \"inflight\" is for samplers without a name: leave out path, or save a snapshot".into(),
                ));
            }
            other => {
                return Err(Error::Invalid(format!(
                    "kind {:?} is unknown to this server: it has \"snapshot\" and \"inflight\"",
                    other.as_str()
                )));
            }
        };
        let mut response = SaveWeightsForSamplerResponse {
            path: None,
            sampling_session_id: None,
            tag: Default::default(),
        };
        match (&request.path, request.sampling_session_seq_id) {
            (None, Some(number)) => {
                response.sampling_session_id =
                    Some(self.save_unnamed(run, seq, queued, number, inflight)?);
            }
            (name, _) => {
                let save = NamedSave {
                    kind: CheckpointKind::Sampler,
                    name: name.as_deref(),
                    overwrite: false,
                    ttl_seconds: request.ttl_seconds,
                    user_metadata: request.user_metadata.as_ref(),
                };
                response.path = Some(self.save_named(run, seq, queued, &save)?);
            }
        }
        Ok(Outcome::json(&response))
    }

    /// Saves weights as files for use outside the service, in PEFT's layout and without the
    /// optimizer's state.
    pub(super) fn save_external(
        &mut self,
        run: &TrainingRunId,
        seq: u64,
        queued: &Queued,
        request: &SaveWeightsExternalRequest,
    ) -> Result<Outcome> {
        let recipients = request.age_encryption_recipients.as_deref();
        if recipients.is_some_and(|recipients| !recipients.is_empty()) {
            return Err(Error::Invalid(
                "age_encryption_recipients is not supported by this server: save without, and encrypt the files once they are downloaded".into(),
            ));
        }
        let save = NamedSave {
            kind: CheckpointKind::External,
            name: Some(&request.path),
            overwrite: false,
            ttl_seconds: request.ttl_seconds,
            user_metadata: None,
        };
        let path = self.save_named(run, seq, queued, &save)?;
        let saved = self.core.catalog.find_checkpoint(&path);
        Ok(Outcome::json(&SaveWeightsExternalResponse {
            size_bytes: saved.map(|saved| saved.size_bytes),
            path: Some(path),
            tag: Default::default(),
        }))
    }

    fn save_named(
        &mut self,
        run: &TrainingRunId,
        seq: u64,
        queued: &Queued,
        save: &NamedSave<'_>,
    ) -> Result<TinkerPath> {
        let name = save.name.map_or_else(|| format!("{seq:06}"), str::to_owned);
        let checkpoint = CheckpointId::new(save.kind, name)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        let path = TinkerPath {
            run: run.clone(),
            checkpoint,
        };
        let expires_at = expiry(save.ttl_seconds)?;
        check_file_name(&path)?;
        let dir = self.core.paths.checkpoint(&path);
        let row = self.core.catalog.run(run)?;
        let core = Arc::clone(&self.core);
        // Directory and row change together.
        let _changing = core.change_checkpoints();
        let written = match bundle::read_manifest(core.disk.as_ref(), &dir) {
            // Written by this very operation before a crash: only its row may be missing.
            Ok(Some(manifest)) if is_own(&manifest, queued) => manifest,
            Err(unreadable) if !save.overwrite => return Err(unreadable),
            Ok(Some(_)) if !save.overwrite => {
                return Err(Error::Invalid(format!(
                    "checkpoint {path} already exists: choose another name{}",
                    if save.kind == CheckpointKind::Training {
                        ", or set overwrite"
                    } else {
                        ""
                    }
                )));
            }
            _ => {
                let (mut manifest, state) = self.exported(run, &row, save.kind.segment())?;
                manifest.seq_id = seq;
                manifest.path = Some(path.clone());
                manifest.request_id = Some(queued.request_id.to_string());
                self.write(
                    &dir,
                    manifest,
                    &state,
                    save.kind == CheckpointKind::Training,
                )?
            }
        };
        self.core.catalog.put_checkpoint(SavedCheckpoint {
            path: path.clone(),
            base_model: row.base_model,
            lora: written.lora.clone(),
            size_bytes: written.size_bytes(),
            user_metadata: save.user_metadata.cloned(),
            public: false,
            created_at: now(),
            expires_at,
        })?;
        // The request that asked for it is over: the log names the key all the same.
        core.on_behalf_of(&row.session_id, || {
            core.note_checkpoint("checkpoint_created", &path);
        });
        Ok(path)
    }

    /// Saves weights for a sampler of the run's session. The weights are the sampler's own, and what
    /// the run does later does not reach them; or, `inflight`, they are those of all such samplers
    /// of the run. A sample under way keeps the weights that it began with.
    fn save_unnamed(
        &mut self,
        run: &TrainingRunId,
        seq: u64,
        queued: &Queued,
        number: u64,
        inflight: bool,
    ) -> Result<SamplingSessionId> {
        let row = self.core.catalog.run(run)?;
        let id = SamplingSessionId::of_session(&row.session_id, number);
        let dir = if inflight {
            self.core.paths.inflight(run)
        } else {
            self.core.paths.sampler(&id)
        };
        let sampler = Sampler {
            id: id.clone(),
            session_id: row.session_id.clone(),
            base_model: row.base_model.clone(),
            model_path: None,
            request_id: Some(queued.request_id.to_string()),
            created_at: now(),
            n_clients: 1,
            inflight,
        };
        if let Ok(known) = self.core.catalog.sampler(&id)
            && known.request_id != sampler.request_id
        {
            return Err(Error::Conflict(format!(
                "sampler {id} already exists: every sampler of a session needs its own number"
            )));
        }
        let own = bundle::read_manifest(self.core.disk.as_ref(), &dir)
            .ok()
            .flatten()
            .filter(|m| is_own(m, queued));
        if own.is_none() {
            let (mut manifest, state) = self.exported(run, &row, "sampler")?;
            manifest.seq_id = seq;
            manifest.request_id = Some(queued.request_id.to_string());
            self.write(&dir, manifest, &state, false)?;
        }
        self.core.catalog.put_sampler(sampler)?;
        let (base, active) = self.active(run)?;
        let copy = base.backend.snapshot_adapter(active.adapter)?;
        base.keep_weights(dir, copy);
        self.drop_older_samplers(run, &row.base_model);
        Ok(id)
    }

    /// Frees the memory of a run's older unnamed samplers, and drops those beyond the last few. One
    /// that is being sampled from has its turn after a later save.
    fn drop_older_samplers(&mut self, run: &TrainingRunId, base_model: &str) {
        let Some(base) = self.bases.get_mut(base_model) else {
            return;
        };
        let newest_first = self.core.catalog.unnamed_samplers(run);
        for (age, id) in newest_first.into_iter().enumerate().skip(1) {
            let is_free = base.release_weights(&self.core.paths.sampler(&id));
            if is_free && age >= self.core.limits.keep_unnamed_samplers {
                self.core.discard_sampler_weights(&id);
            }
        }
    }

    fn exported(
        &mut self,
        run: &TrainingRunId,
        row: &Run,
        kind: &str,
    ) -> Result<(Manifest, AdapterState)> {
        let version = self.core.version.clone();
        let (base, active) = self.active(run)?;
        let state = base.backend.export_adapter(active.adapter)?;
        let manifest = manifest(kind, run, row, &state, base, &version);
        Ok((manifest, state))
    }

    fn write(
        &self,
        dir: &Path,
        manifest: Manifest,
        state: &AdapterState,
        with_optimizer: bool,
    ) -> Result<Manifest> {
        let n_bytes = n_bytes_of(state, with_optimizer);
        let _room = self.core.quota.reserve(n_bytes, "saved weights")?;
        bundle::write(
            self.core.disk.as_ref(),
            &self.core.paths.temp(),
            dir,
            manifest,
            state,
            with_optimizer,
            true,
        )
    }
}

/// Bytes of the numbers that are saved.
pub(super) fn n_bytes_of(state: &AdapterState, with_optimizer: bool) -> u64 {
    let n_weights: usize = state.weights.values().map(|weight| weight.data.len()).sum();
    let n_moments: usize = state.moments.values().map(|(a, b)| a.len() + b.len()).sum();
    let n_gradient: usize = state.gradient.values().map(Vec::len).sum();
    let n_optimizer = if with_optimizer {
        n_moments + n_gradient
    } else {
        0
    };
    ((n_weights + n_optimizer) * size_of::<f32>()) as u64
}

/// Refuses a checkpoint whose name, escaped, is too long for a file.
fn check_file_name(path: &TinkerPath) -> Result<()> {
    let n_bytes = safe_name(path.checkpoint.name()).len();
    if n_bytes <= MAX_FILE_NAME {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "checkpoint name {:?} takes {n_bytes} bytes as a file name, more than {MAX_FILE_NAME}: choose a shorter one, or one of plain letters",
        path.checkpoint.name()
    )))
}

fn is_own(manifest: &Manifest, queued: &Queued) -> bool {
    manifest.request_id.as_deref() == Some(queued.request_id.as_str())
}

/// When a checkpoint is deleted.
///
/// # Errors
/// [`Error::Invalid`] if the time to live is out of range.
pub(crate) fn expiry(ttl_seconds: Option<u64>) -> Result<Option<Millis>> {
    match ttl_seconds {
        None => Ok(None),
        Some(ttl) if TTL_SECONDS.contains(&ttl) => Ok(Some(now() + ttl as Millis * 1000)),
        Some(ttl) => Err(Error::Invalid(format!(
            "ttl_seconds {ttl} must be between {} and {}",
            TTL_SECONDS.start(),
            TTL_SECONDS.end()
        ))),
    }
}
