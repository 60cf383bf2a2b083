//! Where the server keeps things under its data directory.

use std::path::{Path, PathBuf};

use tinker_types::{SamplingSessionId, SessionId, TinkerPath, TrainingRunId};

use crate::lock::server_dir;
use crate::names::{safe_id, safe_name};

/// The layout of `<home>/server`.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    root: PathBuf,
}

impl Paths {
    pub(crate) fn new(home: &Path) -> Self {
        Self {
            root: server_dir(home),
        }
    }

    /// The server's part of the data directory.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The metadata database.
    pub(crate) fn database(&self) -> PathBuf {
        self.root.join("tinker.db")
    }

    /// Counts of operations that are tried again.
    pub(crate) fn attempts(&self) -> PathBuf {
        self.root.join("attempts.json")
    }

    /// Uploaded losses.
    pub(crate) fn custom_losses(&self) -> PathBuf {
        self.root.join("losses")
    }

    /// Half-written bundles; emptied at start.
    pub(crate) fn temp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Logs and snapshots of all training runs.
    pub(crate) fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }

    /// Files that are brought in from outside.
    pub(crate) fn uploads(&self) -> PathBuf {
        self.root.join("uploads")
    }

    /// An upload, by the session that it will be.
    pub(crate) fn upload(&self, id: &SessionId) -> PathBuf {
        self.uploads().join(safe_id(id.as_str()))
    }

    /// The log of a training run.
    pub(crate) fn run_log(&self, run: &TrainingRunId) -> PathBuf {
        self.runs().join(safe_id(run.as_str())).join("log")
    }

    /// The snapshots of a training run.
    pub(crate) fn snapshots(&self, run: &TrainingRunId) -> PathBuf {
        self.runs().join(safe_id(run.as_str())).join("snapshots")
    }

    /// The log of all samples.
    pub(crate) fn sample_log(&self) -> PathBuf {
        self.root.join("samples")
    }

    /// Weights of a sampler that lives with its session.
    pub(crate) fn sampler(&self, id: &SamplingSessionId) -> PathBuf {
        self.root.join("samplers").join(safe_id(id.as_str()))
    }

    /// Weights that all samplers follow which a training run made so.
    pub(crate) fn inflight(&self, run: &TrainingRunId) -> PathBuf {
        let name = format!("{}.inflight", safe_id(run.as_str()));
        self.root.join("samplers").join(name)
    }

    /// A checkpoint: `checkpoints/<run>/<segment>/<name>`.
    pub(crate) fn checkpoint(&self, path: &TinkerPath) -> PathBuf {
        self.root
            .join("checkpoints")
            .join(safe_id(path.run.as_str()))
            .join(path.checkpoint.kind.segment())
            .join(safe_name(path.checkpoint.name()))
    }
}
