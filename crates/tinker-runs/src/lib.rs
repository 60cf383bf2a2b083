//! Run folders: the record of a training run on disk, in the file schemas of the Tinker cookbook.
//!
//! A folder holds `config.json` (every resolved setting), `metrics.jsonl` (one row per step) and
//! `checkpoints.jsonl` (one row per checkpoint). [`RunFolder`] reads one, whoever wrote it;
//! [`RunWriter`] is the one process that may write it; [`Runs`] finds them under a directory.

mod checkpoints;
mod durable;
mod error;
mod folder;
mod jsonl;
mod metrics;
mod runs;
mod writer;

pub use checkpoints::CheckpointRow;
pub use error::{Error, Result};
pub use folder::RunFolder;
pub use metrics::MetricsRow;
pub use runs::{RunEntry, Runs};
pub use writer::RunWriter;
