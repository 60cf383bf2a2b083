//! Reading a run folder, while it is written or after, whoever wrote it.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::checkpoints::CheckpointRow;
use crate::error::{Error, Result};
use crate::jsonl::{read_rows, reason_of};
use crate::metrics::{AnyRow, MetricsRow, one_per_step};

/// Every resolved setting of the run.
pub(crate) const CONFIG: &str = "config.json";
/// One row per step.
pub(crate) const METRICS: &str = "metrics.jsonl";
/// One row per checkpoint.
pub(crate) const CHECKPOINTS: &str = "checkpoints.jsonl";
/// Where a run that is under way stands on its server.
pub(crate) const UNFINISHED: &str = "unfinished.json";
/// What was sent to the server, and its answers.
const LEDGER: &str = "ledger.jsonl";

/// A folder on disk that holds a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// The run in `path`.
    ///
    /// # Errors
    /// [`Error::NotARun`] if the folder has none of the three files, or without `config.json` only
    /// empty ones: what a disk that was full at the start leaves.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let folder = Self { path: path.into() };
        if folder.holds_run() {
            Ok(folder)
        } else {
            Err(Error::NotARun { path: folder.path })
        }
    }

    /// A view of `path` before anything is known of it.
    pub(crate) fn unchecked(path: PathBuf) -> Self {
        Self { path }
    }

    pub(crate) fn holds_run(&self) -> bool {
        let has_rows = |name| {
            let file = self.path.join(name).metadata();
            file.is_ok_and(|file| file.is_file() && file.len() > 0)
        };
        self.path.join(CONFIG).is_file() || has_rows(METRICS) || has_rows(CHECKPOINTS)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The run's name: that of its folder.
    pub fn name(&self) -> String {
        self.path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// The settings in `config.json`.
    ///
    /// # Errors
    /// The file is missing or does not hold a `T`.
    pub fn read_config<T: DeserializeOwned>(&self) -> Result<T> {
        let path = self.path.join(CONFIG);
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        parse(path, &bytes)
    }

    /// What the last writer left of a run that did not come to an end; none if it did.
    ///
    /// # Errors
    /// The file cannot be read or does not hold a `T`.
    pub fn read_unfinished<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        let path = self.path.join(UNFINISHED);
        match std::fs::read(&path) {
            Ok(bytes) => parse(path, &bytes).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", &path)(error)),
        }
    }

    /// Where the step ledger of the run is, if its writer keeps one.
    pub fn ledger_path(&self) -> PathBuf {
        self.path.join(LEDGER)
    }

    /// The metrics in step order, one row per step; none if nothing was measured yet.
    ///
    /// # Errors
    /// A line before the last is not a metrics row.
    pub fn read_metrics(&self) -> Result<Vec<MetricsRow>> {
        Ok(one_per_step(read_rows::<AnyRow>(&self.path.join(METRICS))?))
    }

    /// The checkpoints, oldest first.
    ///
    /// # Errors
    /// A line before the last is not a checkpoint row.
    pub fn read_checkpoints(&self) -> Result<Vec<CheckpointRow>> {
        read_rows(&self.path.join(CHECKPOINTS))
    }

    /// The checkpoints that training can go on from, newest first. A server may have dropped some,
    /// so try them in turn.
    ///
    /// # Errors
    /// As [`Self::read_checkpoints`].
    pub fn resume_candidates(&self) -> Result<Vec<CheckpointRow>> {
        let mut rows = self.read_checkpoints()?;
        rows.retain(|row| row.state_path.is_some());
        rows.reverse();
        Ok(rows)
    }
}

fn parse<T: DeserializeOwned>(path: PathBuf, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        Error::BadLine {
            path,
            line,
            column,
            reason: reason_of(&error),
        }
    })
}
