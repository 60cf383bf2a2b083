//! How a download is made, and how much of it is accepted.

use std::time::Duration;

use crate::machine::RetryPolicy;

/// How a download is made.
#[derive(Debug, Clone, PartialEq)]
pub struct DownloadOptions {
    /// Parts that are fetched at the same time, 1 or more. Default 8.
    pub n_connections: usize,
    /// Bytes of a part, 1 or more. Default 8 MiB. A resumed download keeps the size it began with.
    pub part_bytes: u64,
    /// Longest time without a byte before a part is asked for anew. Default 30 s.
    pub stall_timeout: Duration,
    /// How long before their expiry addresses are replaced. Default 60 s.
    pub sign_margin: Duration,
    /// How a part is repeated that brings nothing; what it brings starts the policy afresh. Default
    /// as for calls.
    pub retry: RetryPolicy,
    /// What is accepted.
    pub limits: DownloadLimits,
    /// Replace what stands under the folder's name. Default no: it is an error.
    pub overwrite: bool,
}

/// Most of what is accepted from a server, which may be broken or hostile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DownloadLimits {
    /// Files and folders. Default 10,000.
    pub max_entries: u64,
    /// Bytes of one file. Default 256 GiB.
    pub max_file_bytes: u64,
    /// Bytes of all files, unpacked. Default 1 TiB.
    pub max_total_bytes: u64,
}

impl Default for DownloadOptions {
    fn default() -> Self {
        Self {
            n_connections: 8,
            part_bytes: 8 << 20,
            stall_timeout: Duration::from_secs(30),
            sign_margin: Duration::from_secs(60),
            retry: RetryPolicy::default(),
            limits: DownloadLimits::default(),
            overwrite: false,
        }
    }
}

impl Default for DownloadLimits {
    fn default() -> Self {
        Self {
            max_entries: 10_000,
            max_file_bytes: 256 << 30,
            max_total_bytes: 1 << 40,
        }
    }
}
