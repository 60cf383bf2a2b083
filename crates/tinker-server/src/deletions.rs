//! What is deleted, or has had its time: it leaves sight in one step, then its row, then the disk. So a
//! kill in between leaves nothing that looks whole and is not.

use std::path::{Path, PathBuf};

use tinker_types::{SamplingSessionId, TinkerPath};

use crate::bundle;
use crate::catalog::Catalog;
use crate::core::Core;
use crate::disk::{Disk, remove_dir};
use crate::engine::Command;
use crate::error::{Error, Result};
use crate::paths::Paths;

/// What directories that are being removed are called, before a number.
const DELETED: &str = "deleted-";

/// Samplers without a checkpoint are kept this long after the last sign of their session.
const KEEP_SESSION_MS: i64 = 24 * 60 * 60 * 1000;

impl Core {
    /// Removes a checkpoint from catalog and disk.
    ///
    /// # Errors
    /// [`Error::NotFound`] with a list of what the run has.
    pub(crate) fn delete_checkpoint(&self, path: &TinkerPath) -> Result<()> {
        let _changing = self.change_checkpoints();
        if self.catalog.find_own_checkpoint(path).is_none() {
            return Err(self.catalog.no_checkpoint(path));
        }
        self.discard_checkpoint(path)?;
        self.note_checkpoint("checkpoint_deleted", path);
        Ok(())
    }

    /// Removes checkpoints whose time is up.
    pub(crate) fn discard_expired(&self) {
        let _changing = self.change_checkpoints();
        for path in self.catalog.expired_checkpoints() {
            match self.discard_checkpoint(&path) {
                Ok(()) => self.note_checkpoint("checkpoint_expired", &path),
                Err(error) => {
                    tracing::warn!(%path, error = error.with_causes(), "cannot remove an expired checkpoint");
                }
            }
        }
    }

    /// Removes the weights of samplers that lived with a session which is long gone.
    pub(crate) fn discard_stale_samplers(&self) {
        for id in self
            .catalog
            .stale_samplers(self.clock.now() - KEEP_SESSION_MS)
        {
            let removed = self.catalog.sampler(&id).and_then(|sampler| {
                let trash = self.move_to_trash(&self.own_weights(&sampler))?;
                self.catalog.remove_sampler(&id)?;
                self.remove_trash(&trash)
            });
            if let Err(error) = removed {
                tracing::warn!(sampler.id = %id, error = error.with_causes(), "cannot remove a sampler");
            }
        }
    }

    /// Removes the weights of a sampler without a name. Its row stays, to say what became of it.
    pub(crate) fn discard_sampler_weights(&self, id: &SamplingSessionId) {
        let Ok(sampler) = self.catalog.sampler(id) else {
            return;
        };
        let dir = self.own_weights(&sampler);
        let removed = self.move_to_trash(&dir).and_then(|trash| {
            self.send(Command::ForgetWeights(dir));
            self.remove_trash(&trash)
        });
        if let Err(error) = removed {
            tracing::warn!(sampler.id = %id, error = error.with_causes(), "cannot remove the weights of a sampler");
        }
    }

    /// Takes a directory out of sight in one step: a half-removed one is never taken for whole. One
    /// that is not there is fine.
    pub(crate) fn move_to_trash(&self, dir: &Path) -> Result<PathBuf> {
        let name = format!("{DELETED}{}", uuid::Uuid::now_v7());
        let trash = self.paths.temp().join(name);
        match self.disk.rename(dir, &trash) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", dir, error))
            }
            _ => Ok(trash),
        }
    }

    /// The caller holds [`Self::change_checkpoints`].
    fn discard_checkpoint(&self, path: &TinkerPath) -> Result<()> {
        let dir = self.paths.checkpoint(path);
        bundle::forget_replaced(&dir)?;
        let trash = self.move_to_trash(&dir)?;
        self.catalog.remove_checkpoint(path)?;
        self.send(Command::ForgetWeights(dir));
        self.remove_trash(&trash)
    }

    /// Removes what was moved to the trash.
    fn remove_trash(&self, trash: &Path) -> Result<()> {
        remove_dir(trash)?;
        self.quota.note_removal();
        Ok(())
    }
}

/// Removes the rows of checkpoints whose directories were on their way out when the last server was
/// killed: a list must not show what cannot be loaded.
pub(crate) fn finish_deletions(disk: &dyn Disk, paths: &Paths, catalog: &Catalog) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(paths.temp()) else {
        return Ok(());
    };
    for entry in entries.filter_map(std::io::Result::ok) {
        let is_deleted = entry.file_name().to_string_lossy().starts_with(DELETED);
        // Without a readable manifest it was half removed, which comes after its row.
        let manifest = is_deleted.then(|| bundle::read_manifest(disk, &entry.path()));
        if let Some(Ok(Some(manifest))) = manifest
            && let Some(path) = manifest.path
            && !paths.checkpoint(&path).exists()
        {
            tracing::info!(%path, "finishing a deletion that the end of the last server cut short");
            catalog.remove_checkpoint(&path)?;
        }
    }
    Ok(())
}
