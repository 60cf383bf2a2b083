//! How much the server takes in: each limit is a clear refusal, never a crash.

use std::time::Duration;

/// Bounds on requests and queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest body, before and after decompression. Clients cut batches at about 5 MB.
    pub max_body_bytes: usize,
    /// Most unfinished operations of one training run.
    pub max_pending_operations: usize,
    /// Most unfinished samples of all samplers together.
    pub max_pending_samples: usize,
    /// Most continuations of one sample request.
    pub max_num_samples: u32,
    /// Samplers without a name whose weights are kept per training run, the newest ones, until the
    /// session ends; at least 1.
    pub keep_unnamed_samplers: usize,
    /// Most bytes of files that the server keeps; `None` for as many as the disk has room for.
    pub max_disk_bytes: Option<u64>,
    /// Most connections at a time; `None` for any number.
    pub max_connections: Option<usize>,
    /// Longest a poll for a result is held; clients give up after 45 s.
    pub poll_hold: Duration,
    /// Longest a poll for all samples of a client is held, if that is less; clients give up after 45 s.
    pub completions_hold: Duration,
    /// Operations between two snapshots of a training run.
    pub snapshot_every: u64,
    /// Engine time between two snapshots of a training run: what a crash costs at most.
    pub snapshot_engine_time: Duration,
    /// First pause after a passing fault that keeps a training run out of memory; each one in a row
    /// is twice as long, up to 30 s.
    pub fault_pause: Duration,
    /// How long operations wait for an earlier one of their run that has not arrived, counted while the
    /// client of their session gives signs of life. Clients give a call up after five minutes.
    pub gap_patience: Duration,
    /// An adapter that nobody used for this long leaves memory and comes back on demand.
    pub unload_after: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body_bytes: 256 << 20,
            max_pending_operations: 16_384,
            max_pending_samples: 65_536,
            max_num_samples: 1024,
            keep_unnamed_samplers: 4,
            max_disk_bytes: None,
            max_connections: None,
            poll_hold: Duration::from_secs(40),
            completions_hold: Duration::from_secs(30),
            snapshot_every: 64,
            snapshot_engine_time: Duration::from_secs(30),
            fault_pause: Duration::from_secs(1),
            gap_patience: Duration::from_secs(10 * 60),
            unload_after: Duration::from_secs(30 * 60),
        }
    }
}
